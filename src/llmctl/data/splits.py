"""Examples that train and examples that validate, from what `--data` and `--val-data` name.

Read, split, then mix: nothing that is held out is ever among what is trained on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np

from llmctl.config.supervised import Examples
from llmctl.console import log
from llmctl.data.examples import Example, read_examples
from llmctl.data.holdout import Key, fingerprint, hold_out, mix, sample
from llmctl.data.layouts import Task
from llmctl.data.sets import Item, ItemSet


@dataclass(frozen=True)
class Split(Generic[Item]):
    """All examples of a run."""

    train: list[Item]
    val: list[Item]
    sets: list[ItemSet[Item]]
    """Where they come from."""

    @property
    def skipped(self) -> int:
        """Rows that could not be read."""
        return sum(len(found.skipped) for found in self.sets)

    @property
    def inputs(self) -> list[dict[str, Any]]:
        """Files and their hashes, for the manifest."""
        return [facts for found in self.sets for facts in found.inputs]


def read_split(config: Examples, data: list[str], seed: int, task: Task = "chat") -> Split[Example]:
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

    def read(names: list[str], role: str) -> list[ItemSet[Example]]:
        return read_examples(
            names,
            columns=config.columns,
            skip_bad_rows=config.skip_bad_rows,
            task=task,
            role=role,
        )

    return split(config, data, seed, read, fingerprint)


def split(
    config: Examples,
    data: list[str],
    seed: int,
    read: Callable[[list[str], str], list[ItemSet[Item]]],
    key: Key,
) -> Split[Item]:
    """Read everything by `read`, from names and a role, and hold out what validates.

    Args:
        config: says what to hold out.
        data: names of the examples.
        seed: chooses examples, where weights leave some out.
        read: reads them.
        key: examples of the same hash are never on both sides.

    Raises:
        DataError: as `read`, or nothing left on one of the sides.
    """
    sets = read(data, "data")
    if config.val_data:
        others = read(config.val_data, "validation")
        val = [example for found in others for example in found.examples]
        kept_parts = [found.examples for found in sets]
        return Split(_mixed(sets, kept_parts, seed, key), val, [*sets, *others])
    pool = [example for found in sets for example in found.examples]
    kept, held = hold_out(pool, size=config.val_size, fraction=config.val_fraction, key=key)
    ends = np.cumsum([len(found.examples) for found in sets])
    parts: list[list[Item]] = [[] for _ in sets]
    for number, owner in zip(kept, np.searchsorted(ends, kept, side="right"), strict=True):
        parts[owner].append(pool[number])
    return Split(_mixed(sets, parts, seed, key), [pool[number] for number in held], sets)


def _mixed(sets: list[ItemSet[Item]], parts: list[list[Item]], seed: int, key: Key) -> list[Item]:
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
        for number in sample(part, count, seed, key)
    ]
