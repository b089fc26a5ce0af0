"""Learning curves of fine-tuning equal those that transformers' and TRL's trainers gave.

`tests/fixtures/curves/curves.json` was recorded before one loop replaced them.
"""

import json

import pytest

from tests.training.objectives import CURVES, RECORDER

KNOWN = json.loads((CURVES / "curves.json").read_text())["cases"]
CLOSE = {"rel": 1e-5, "abs": 1e-7}
COARSE = {"rel": 1e-2, "abs": 1e-4}
"""Of bfloat16 products and 4-bit weights."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("curves")


def test_every_case_was_recorded():
    assert set(KNOWN) == set(RECORDER.CASES)
    assert not [name for name, case in KNOWN.items() if "error" in case]


@pytest.mark.parametrize("case", KNOWN)
def test_the_curve_is_the_same(cli, folder, case):
    def run(arguments):
        result = cli(*arguments)
        assert result.code == 0, result.err

    curve, known = RECORDER.record(case, folder, run), KNOWN[case]
    close = COARSE if case in ("sft-bf16", "sft-qlora") else CLOSE
    assert set(curve) == set(known)
    assert curve.pop("flags") == known["flags"]
    evaluation = curve.pop("evaluation")
    assert evaluation == pytest.approx(known["evaluation"], **close)
    assert len(curve["loss"]) == 20
    for name, values in curve.items():
        assert values == pytest.approx(known[name], **close), name
