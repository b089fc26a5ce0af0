"""The training commands that every crash test is run on: one row for each."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.torture.bases import make_base, make_chats


@dataclass(frozen=True)
class Subject:
    """A training command.

    `large` makes checkpoints of tens of megabytes, so that a save lasts long enough to be hit;
    `small` runs in a second. `arguments` takes a tokenize run and the size.
    """

    name: str
    entry: str
    arguments: Callable[[Path, str], tuple[object, ...]]
    large: tuple[object, ...]
    small: tuple[object, ...]

    def command(self, tokens: Path, size: str, out: Path, *more: object) -> tuple[object, ...]:
        """The whole command line of a run to `out`; later flags win."""
        shape = self.large if size == "large" else self.small
        return (*self.arguments(tokens, size), *shape, "-o", out, *more)


PRETRAIN = Subject(
    name="pretrain",
    entry="llmctl.cli:main",
    arguments=lambda tokens, _: (
        *("pretrain", "--tokens", tokens, "--optimizer", "adamw", "--precision", "fp32"),
        *("--batch-size", 4, "--context", 32, "--threads", 1, "--seed", 5),
    ),
    large=(
        *("--layers", 4, "--hidden", 160, "--heads", 4),
        *("--max-steps", 10, "--save-every", 1, "--eval-every", 5),
    ),
    small=(
        *("--layers", 2, "--hidden", 32, "--heads", 2),
        *("--max-steps", 12, "--save-every", 2, "--eval-every", 6),
    ),
)

SFT = Subject(
    name="sft",
    entry="llmctl.cli:main",
    arguments=lambda tokens, size: (
        *("sft", "--model", make_base(tokens, size), "--data", make_chats(tokens)),
        *("--batch-size", 4, "--lr", "1e-3", "--precision", "fp32", "--threads", 1, "--seed", 5),
        *("--val-size", 8, "--samples", 1, "--sample-tokens", 4, "--log-every", 3),
    ),
    large=("--max-steps", 10, "--save-every", 1, "--eval-every", 5),
    small=("--max-steps", 12, "--save-every", 2, "--eval-every", 6),
)

LORA = replace(
    SFT,
    name="sft --lora --merge",
    arguments=lambda *given: (
        *(*SFT.arguments(*given), "--lora", "--lora-dropout", 0.1, "--merge"),
    ),
)
"""The same with two results: of these, one comes after the other."""

SUBJECTS = [PRETRAIN, SFT]


def every_subject(function):
    """Run a test once for each training command."""
    return pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)(function)
