"""Gates: which texts are some, and what they let through."""

import math

import pytest

from llmctl.config.gates import Gate, parse_gate, split_gate


@pytest.mark.parametrize("sign", [">=", "<=", ">", "<", "=="])
def test_a_gate_is_read_as_it_is_written(sign):
    assert split_gate(f" a/b {sign} -1.5e-3 ") == Gate("a/b", sign, -0.0015)
    assert parse_gate("a b", f"{sign}2") == Gate("a b", sign, 2.0)


@pytest.mark.parametrize(
    "text", ["exact", "exact=1", "exact=>1", ">=1", "exact>=1.2.3", "a>b", "a>"]
)
def test_what_is_no_gate(text):
    assert split_gate(text) is None


def test_bounds():
    assert [Gate("a", "<", 1).holds(value) for value in (0.9, 1.0, math.nan)] == [
        True,
        False,
        False,
    ]
    assert [Gate("a", "<=", 1).holds(value) for value in (1.0, 1.1, math.nan)] == [
        True,
        False,
        False,
    ]
    assert [Gate("a", "==", 1).holds(value) for value in (1.0, 1.1, math.nan)] == [
        True,
        False,
        False,
    ]
