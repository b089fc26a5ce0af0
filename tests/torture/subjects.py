"""The training commands that crash tests are run on, and which test is run on which of them."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.torture.bases import (
    make_base,
    make_chats,
    make_pairs,
    make_prompts,
    make_scorer,
    make_texts,
)

LONG = os.environ.get("TORTURE") == "long"
LENGTHS: dict[str, tuple[object, ...]] = {
    "large": ("--max-steps", 10, "--save-every", 1, "--eval-every", 5),
    "small": ("--max-steps", 12, "--save-every", 2, "--eval-every", 6, "--keep", 3),
}
"""Large runs make checkpoints of megabytes, so that a save lasts long enough to be hit; small ones
take a second."""


@dataclass(frozen=True)
class Subject:
    """A training command; `arguments` takes a tokenize run and the size."""

    name: str
    arguments: Callable[[Path, str], tuple[object, ...]]
    updates: int = 1
    """Of a step."""
    models: int = 1
    """That an update trains: each has its backward pass and its optimizer."""
    less_memory: tuple[str, ...] = ("--batch-size 2", "--grad-accum 2")
    """What a run that finds no memory tells to try."""

    def command(self, tokens: Path, size: str, out: Path, *more: object) -> tuple[object, ...]:
        """The whole command line of a run to `out`; later flags win."""
        return (*self.arguments(tokens, size), *LENGTHS[size], "-o", out, *more)

    def passes_before(self, step: int) -> int:
        """Backward passes, and steps of an optimizer, up to the beginning of a step."""
        return (step - 1) * self.updates * self.models


TUNING = (
    *("--batch-size", 4, "--lr", "1e-3", "--precision", "fp32", "--threads", 1, "--seed", 5),
    *("--val-size", 8, "--log-every", 3),
)
SAMPLES = ("--samples", 1, "--sample-tokens", 4)

PRETRAIN = Subject(
    name="pretrain",
    arguments=lambda tokens, size: (
        *("pretrain", "--tokens", tokens, "--optimizer", "adamw", "--precision", "fp32"),
        *("--batch-size", 4, "--context", 32, "--threads", 1, "--seed", 5),
        *(
            ("--layers", 4, "--hidden", 160, "--heads", 4)
            if size == "large"
            else ("--layers", 2, "--hidden", 32, "--heads", 2)
        ),
    ),
)

SFT = Subject(
    name="sft",
    arguments=lambda tokens, size: (
        *("sft", "--model", make_base(tokens, size), "--data", make_chats(tokens)),
        *(*TUNING, *SAMPLES),
    ),
)

LORA = replace(
    SFT,
    name="sft --lora --merge",
    arguments=lambda *given: (
        *(*SFT.arguments(*given), "--lora", "--lora-dropout", 0.1, "--merge"),
    ),
)
"""The same with two results: of these, one comes after the other."""

CLASSIFY = Subject(
    name="sft --task classify",
    arguments=lambda tokens, size: (
        *("sft", "--task", "classify", "--model", make_base(tokens, size)),
        *("--data", make_texts(tokens), *TUNING),
    ),
)

REWARD = Subject(
    name="reward",
    arguments=lambda tokens, size: (
        *("reward", "--model", make_base(tokens, size), "--data", make_pairs(tokens), *TUNING),
    ),
)

DPO = Subject(
    name="dpo",
    arguments=lambda tokens, size: (
        *("dpo", "--model", make_base(tokens, size), "--data", make_pairs(tokens)),
        *(*TUNING, *SAMPLES),
    ),
)

PPO = Subject(
    name="ppo",
    arguments=lambda tokens, size: (
        *("ppo", "--model", make_base(tokens, size), "--data", make_prompts(tokens), "--plain"),
        *("--reward-model", make_scorer(tokens, size), "--reward-rule", "length:3"),
        *("--score-normalization", "running", "--kl-target", 1, "--max-new-tokens", 4),
        *("--minibatches", 2, "--ppo-epochs", 1, "--samples", 1, *TUNING),
    ),
    updates=2,
    models=2,
    less_memory=("--pass-tokens",),
)

SUBJECTS = [PRETRAIN, SFT]
"""On which the short form, too, tries everything."""
BRIEF = [CLASSIFY, REWARD, DPO, PPO]
"""On which the short form tries what `cases` says."""


def every_subject(function: Callable[..., None]) -> Callable[..., None]:
    """Run a test once for each training command; in the short form for `SUBJECTS` only."""
    subjects = [*SUBJECTS, *(BRIEF if LONG else [])]
    return pytest.mark.parametrize("subject", subjects, ids=lambda s: s.name)(function)


def cases(
    name: str,
    long: Iterable[object],
    *,
    short: Iterable[object] | None = None,
    brief: Iterable[object] = (),
) -> pytest.MarkDecorator:
    """Run a test on training commands, once for each value of a parameter.

    Args:
        name: of the parameter.
        long: its values in the long form, for every command.
        short: its values in the short form, for `SUBJECTS`; those of the long one by default.
        brief: its values in the short form, for the commands in `BRIEF`.
    """
    values = list(long)
    wanted = [(SUBJECTS, values), (BRIEF, values)]
    if not LONG:
        wanted = [(SUBJECTS, values if short is None else list(short)), (BRIEF, list(brief))]
    return pytest.mark.parametrize(
        (name, "subject"),
        [
            pytest.param(value, subject, id=f"{value}-{subject.name}")
            for subjects, some in wanted
            for value in some
            for subject in subjects
        ],
    )
