"""Numbers as log lines have them."""

import pytest

from llmctl.numbers import byte_size, counted, duration, short_number


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59, "59s"), (61, "1m01s"), (3600, "1h00m"), (7503, "2h05m"), (2e5, "2d07h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(7, "7"), (1234, "1.23k"), (35_200, "35.2k"), (1.24e9, "1.24B")]
)
def test_short_numbers(number, text):
    assert short_number(number) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 prompts"), (1, "1 prompt"), (2, "2 prompts"), (1234, "1,234 prompts")],
)
def test_counts(count, text):
    assert counted(count, "prompt") == text


def test_counts_of_nouns_without_an_s():
    assert counted(1, "class", "classes") == "1 class"
    assert counted(3, "class", "classes") == "3 classes"


@pytest.mark.parametrize(("count", "text"), [(7, "7 B"), (1234.4, "1.2 kB"), (1.24e9, "1.2 GB")])
def test_sizes(count, text):
    assert byte_size(count) == text
