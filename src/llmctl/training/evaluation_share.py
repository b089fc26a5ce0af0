"""How often a run evaluates, and on how much: planned before it runs, so that it costs little.

In: forward tokens of a step, of an evaluation and of its samples. Out: hyperparameters that say
when to evaluate and on what. Work is counted in tokens and never in seconds, so a run is planned
alike on every machine. What the user has set stays; the rest is chosen so that evaluation is at
most a tenth of the run's work: fewer evaluations first, since losses on the same data compare, then
four on less data, and fewer than four where even these are more.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmctl.config.sections import Evaluation
from llmctl.console import log
from llmctl.numbers import counted
from llmctl.training.hyperparameters import EvaluationShare, Hyperparameters

LARGEST_SHARE = 0.1
"""Of the forward tokens of a run, what its evaluations are at most, unless flags say otherwise."""
FEWEST = 4
"""Evaluations that a run keeps rather than read all of the validation data: they show a trend."""
TRAINED = 3
"""Forward tokens that a training token counts: the backward pass takes twice as many operations
(Kaplan et al., 2020, arXiv:2001.08361, section 2.1)."""


@dataclass(frozen=True)
class Work:
    """Forward tokens of the parts of a run, over all processes."""

    step: float
    """Of an optimizer step."""
    pieces: Sequence[float]
    """(N,) of each row, or window of tokens, that an evaluation may read."""
    samples: float = 0.0
    """Of the texts that the model writes at an evaluation, and before the first step."""
    once: float = 0.0
    """Of reading the validation data once more, before or after training."""


def plan_evaluation(
    values: Hyperparameters, config: Evaluation, work: Work, *, pieces: int | None
) -> tuple[Hyperparameters, int]:
    """Choose when to evaluate, and how many of the pieces to read each time.

    `pieces` are those that were asked for; None leaves the number open.

    Returns:
        Hyperparameters with `eval_every` and `evaluation` filled in, and the number of pieces.
    """
    most = len(work.pieces) if pieces is None else pieces
    wanted = count = evaluations(values.max_steps, values.eval_every)
    every = values.eval_every
    training = values.max_steps * work.step
    room = training * LARGEST_SHARE / (1 - LARGEST_SHARE) - work.samples - work.once
    if config.eval_every is None:
        each = reading(work.pieces, most) + work.samples
        least = wanted if config.early_stop else 1  # patience counts evaluations
        fewest = max(least, min(FEWEST, wanted)) if pieces is None else least
        if each and wanted * each > room:
            count = max(fewest, int(room // each))
        if count * each > room and pieces is None:
            most = fitting(work.pieces, room / count - work.samples)
            each = reading(work.pieces, most) + work.samples
            count = max(least, min(count, int(room // each)))
        every = max(every, math.ceil(values.max_steps / count))
        count = evaluations(values.max_steps, every)
    total = count * (reading(work.pieces, most) + work.samples) + work.samples + work.once
    share = total / (total + training)
    planned = EvaluationShare(count, round(total), round(training), float(f"{share:.4g}"))
    return replace(values, eval_every=every, evaluation=planned), most


def plan_rows(
    values: Hyperparameters, config: Evaluation, work: Work, *, is_open: bool
) -> Hyperparameters:
    """Plan evaluations on rows, of which each reads a part only where their number `is_open`."""
    total = len(work.pieces)
    planned, read = plan_evaluation(values, config, work, pieces=None if is_open else total)
    return planned if read == total else replace(planned, eval_rows=read)


def evaluations(max_steps: int, every: int) -> int:
    """Evaluations of a run that evaluates after the last step, too."""
    return math.ceil(max_steps / every)


def spread(total: int, count: int) -> list[int]:
    """Numbers of `count` pieces, evenly spread over `total` of them; all where there are fewer."""
    if count >= total:
        return list(range(total))
    return [int(number) for number in np.linspace(0, total - 1, count)]


def reading(pieces: Sequence[float], count: int) -> float:
    """Forward tokens of `count` pieces that are evenly spread."""
    return float(np.asarray(pieces, dtype=float)[spread(len(pieces), count)].sum())


def fitting(pieces: Sequence[float], room: float) -> int:
    """Most pieces that `room` forward tokens suffice for, at least one."""
    count = len(pieces)
    while count > 1 and (tokens := reading(pieces, count)) > room:
        count = max(1, min(count - 1, int(count * room / tokens)))
    return count


def announce_evaluation(values: Hyperparameters, *, read: int, total: int, unit: str) -> None:
    """Say how often the run evaluates and on how many `unit` of how many, and what that takes."""
    planned = values.evaluation
    if planned is None or not total:
        return
    log.info(
        "%s on %s of %s: %.2g %% of the run's work",
        counted(planned.evaluations, "evaluation"),
        "all" if read == total else f"{read:,}",
        counted(total, unit),
        100 * planned.evaluation_share,
    )
