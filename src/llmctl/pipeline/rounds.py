"""Unroll blocks of stages that a recipe repeats: blocks in, stages in the order they run out.

In round 2 of a block its stages are called NAME-2. A name of the block means this round's stage
where that comes before, else the last round's, and in the first round what `first` says. After the
block it means that of the last round.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.config.base import Place
from llmctl.errors import UserError

ROUND = "${round}"
"""The round's number, in the text of a block's stages."""
Scope = Mapping[str, str | None]
"""Name -> the stage that it means, by its full name; None for one that comes later."""


@dataclass(frozen=True)
class Block:
    """Stages that run once, or in rounds."""

    rounds: int | None
    first: Mapping[str, str]
    """Round-1 value of names that refer to the previous round."""
    entries: tuple[tuple[Place, str, dict[str, Any]], ...]
    """Place in the file, name, and keys of each stage."""


@dataclass(frozen=True)
class UnrolledStage:
    """One stage in one round."""

    name: str
    place: Place
    entry: Mapping[str, Any]
    scope: Scope


def unroll(blocks: Sequence[Block], file: Path) -> Iterator[UnrolledStage]:
    """Yield every stage in order.

    Raises:
        UserError: `first` names what is no stage of its block.
    """
    later: dict[str, str | None] = {name: None for block in blocks for _, name, _ in block.entries}
    known: dict[str, str | None] = {}
    for block in blocks:
        names = [name for _, name, _ in block.entries]
        if odd := [name for name in block.first if name not in names]:
            raise UserError(
                f"first: `{odd[0]}` is no stage of this block",
                file=file,
                hint=f"it says what {', '.join(f'`{name}`' for name in names)} mean in round 1",
            )
        for number in range(1, (block.rounds or 1) + 1):
            before = _round_before(block, number, known)
            for place, name, entry in block.entries:
                full = name if block.rounds is None else f"{name}-{number}"
                filled = entry if block.rounds is None else _fill_in(entry, str(number))
                yield UnrolledStage(full, place, filled, {**later, **known, **before})
                known[full] = before[name] = full
        if block.rounds is not None:
            known |= {name: f"{name}-{block.rounds}" for name in names}


def _round_before(
    block: Block, number: int, known: Mapping[str, str | None]
) -> dict[str, str | None]:
    """Return what the block's names mean as a round begins."""
    names = [name for _, name, _ in block.entries]
    if block.rounds is None:
        return dict.fromkeys(names)
    if number > 1:
        return {name: f"{name}-{number - 1}" for name in names}
    first = {name: block.first.get(name) for name in names}
    return {name: known.get(value or "", value) for name, value in first.items()}


def _fill_in(value: Any, number: str) -> Any:
    """Put the number of the round into the texts of a value."""
    if isinstance(value, str):
        return value.replace(ROUND, number)
    if isinstance(value, dict):
        return {key: _fill_in(item, number) for key, item in value.items()}
    return [_fill_in(item, number) for item in value] if isinstance(value, list) else value
