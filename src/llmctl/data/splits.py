"""Examples that train and examples that validate, from what `--data` and `--val-data` name.

Read, split, then mix: nothing that is held out is ever among what is trained on.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from llmctl.config.supervised import Supervised
from llmctl.console import log
from llmctl.data.examples import Example, ExampleSet, read_examples
from llmctl.data.holdout import hold_out, mix, sample
from llmctl.data.layouts import Task


@dataclass(frozen=True)
class Split:
    """All examples of a run."""

    train: list[Example]
    val: list[Example]
    sets: list[ExampleSet]
    """Where they come from."""

    @property
    def skipped(self) -> int:
        """Rows that could not be read."""
        return sum(len(found.skipped) for found in self.sets)

    @property
    def inputs(self) -> list[dict[str, Any]]:
        """Files and their hashes, for the manifest."""
        return [facts for found in self.sets for facts in found.inputs]


def read_split(config: Supervised, data: list[str], seed: int, task: Task = "chat") -> Split:
    """Read everything, and hold out what validates.

    Args:
        config: says how to read, and what to hold out.
        data: names of the examples.
        seed: chooses examples, where weights leave some out.
        task: what they are for.

    Raises:
        DataError: rows that are no examples, or nothing left on one of the sides.
        NetworkError: a Hub data set that cannot be reached.
        UserError: weights or columns that make no sense.
    """
    how: dict[str, Any] = {
        "columns": config.columns,
        "skip_bad_rows": config.skip_bad_rows,
        "task": task,
    }
    sets = read_examples(data, **how)
    if config.val_data:
        others = read_examples(config.val_data, role="validation", **how)
        val = [example for found in others for example in found.examples]
        return Split(_mixed(sets, [found.examples for found in sets], seed), val, [*sets, *others])
    pool = [example for found in sets for example in found.examples]
    kept, held = hold_out(pool, size=config.val_size, fraction=config.val_fraction)
    ends = np.cumsum([len(found.examples) for found in sets])
    parts: list[list[Example]] = [[] for _ in sets]
    for number, owner in zip(kept, np.searchsorted(ends, kept, side="right"), strict=True):
        parts[owner].append(pool[number])
    return Split(_mixed(sets, parts, seed), [pool[number] for number in held], sets)


def _mixed(sets: list[ExampleSet], parts: list[list[Example]], seed: int) -> list[Example]:
    """All examples, or of each set the share that its weight asks for."""
    weights = [found.weight for found in sets if found.weight is not None]
    if len(weights) < len(sets):
        return [example for part in parts for example in part]
    counts = mix([len(part) for part in parts], weights)
    for found, part, count in zip(sets, parts, counts, strict=True):
        log.info("%s: %s of %s examples", found.name, f"{count:,}", f"{len(part):,}")
    return [
        part[number]
        for part, count in zip(parts, counts, strict=True)
        for number in sample(part, count, seed)
    ]
