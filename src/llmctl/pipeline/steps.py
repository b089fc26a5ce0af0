"""Read the recipe of a life cycle: a YAML file in, one `Step` for each of its stages out.

Nothing but the file is read. See `references.py` for what names mean.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl.config import commands
from llmctl.config.base import Place, read_nested
from llmctl.config.commands import config_of
from llmctl.config.sections import StageConfig
from llmctl.errors import UserError, did_you_mean
from llmctl.pipeline.rounds import Block, Scope, unroll

TOP_KEYS = ("stages", "defaults", "out")
STEP_KEYS = ("name", "stage", "gates")
BLOCK_KEYS = ("rounds", "first", "stages")
INTERACTIVE = ("chat",)
"""Commands whose result is a conversation."""


@dataclass(frozen=True)
class Step:
    """One stage of the recipe, its references still by name."""

    name: str
    stage: str
    config_class: type[StageConfig]
    values: Mapping[str, Any]
    """Its fields, defaults of the recipe included."""
    gates: Mapping[str, Any]
    scope: Scope
    """Meaning of the names in it."""
    lines: Mapping[str, int] = field(default_factory=dict)
    """1-based line of each field."""
    line: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A life cycle."""

    file: Path
    steps: tuple[Step, ...]
    out: str | None


def load(file: Path) -> Recipe:
    """Read a recipe of a life cycle, or of one stage.

    Raises:
        UserError: with the line, and what to type instead.
    """
    values, lines = read_nested(file)
    if "stage" in values and "stages" not in values:
        values, lines = _as_one_stage(values, lines)
    if unknown := [key for key in values if key not in TOP_KEYS]:
        raise UserError(
            f"unknown key `{unknown[0]}`{did_you_mean(unknown[0], TOP_KEYS)}",
            file=file,
            line=lines.get((unknown[0],)),
            hint="a life cycle has `stages`, and may have `defaults` and `out`",
        )
    defaults = _mapping(values.get("defaults"), ("defaults",), file, lines)
    steps = tuple(_steps(values.get("stages"), defaults, file, lines))
    _check_defaults(defaults, steps, file, lines)
    out = values.get("out")
    if out is not None and not isinstance(out, str):
        raise UserError(
            f"out: expected a directory, got {out!r}", file=file, line=lines.get(("out",))
        )
    return Recipe(file, steps, out)


def config_class_of(stage: str) -> type[StageConfig] | None:
    """Return the config of a command that can be a stage of a life cycle; None for any other."""
    config = config_of(stage) if stage.islower() and stage not in INTERACTIVE else None
    return config if config is not None and issubclass(config, StageConfig) else None


def stage_names() -> list[str]:
    """Return every command that can be a stage."""
    names = [name.removesuffix("Config").lower() for name in commands.__all__]
    return [name for name in names if config_class_of(name)]


def _as_one_stage(
    values: dict[str, Any], lines: Mapping[Place, int]
) -> tuple[dict[str, Any], dict[Place, int]]:
    """Turn a recipe of one stage into a life cycle of one."""
    out = {"out": values["out"]} if "out" in values else {}
    step = {key: value for key, value in values.items() if key != "out"}
    moved = {("stages", 0, *place): line for place, line in lines.items()}
    moved[("stages", 0)] = lines.get(("stage",), 1)
    return {"stages": [step], **out}, moved


def _steps(
    entries: Any, defaults: Mapping[str, Any], file: Path, lines: Mapping[Place, int]
) -> Iterator[Step]:
    """Yield every step in order, blocks repeated."""
    blocks = list(_blocks(entries, file, lines))
    taken: dict[str, int | None] = {}
    for part in unroll(blocks, file):
        line = lines.get(part.place)
        if part.name in taken:
            raise UserError(
                f"two stages are called `{part.name}`",
                file=file,
                line=line,
                hint="give one of them another `name`",
            )
        taken[part.name] = line
        kind = part.entry["stage"]
        config_class = config_class_of(kind)
        assert config_class is not None
        own = {key: value for key, value in part.entry.items() if key not in STEP_KEYS}
        general = {k: v for k, v in defaults.items() if k in config_class.model_fields}
        at = {str(p[-1]): line for p, line in lines.items() if p[:-1] == part.place}
        shared = {str(p[-1]): line for p, line in lines.items() if p[:-1] == ("defaults",)}
        gates = _mapping(part.entry.get("gates"), (*part.place, "gates"), file, lines)
        yield Step(
            part.name,
            kind,
            config_class,
            {**general, **own},
            gates,
            part.scope,
            {**shared, **at},
            line,
        )


def _blocks(entries: Any, file: Path, lines: Mapping[Place, int]) -> Iterator[Block]:
    """Yield the entries under `stages`: single steps, and blocks of `rounds`."""
    if not isinstance(entries, list) or not entries:
        raise UserError(
            "`stages` is a list of stages, each with its `stage`",
            file=file,
            line=lines.get(("stages",)),
            hint="such as: - {name: tok, stage: tokenize, data: [corpus.txt]}",
        )
    for number, entry in enumerate(entries):
        place: Place = ("stages", number)
        if not (isinstance(entry, dict) and "rounds" in entry):
            yield Block(None, {}, (_entry(entry, place, file, lines),))
            continue
        if unknown := [key for key in entry if key not in BLOCK_KEYS]:
            raise UserError(
                f"unknown key `{unknown[0]}` beside `rounds`{did_you_mean(unknown[0], BLOCK_KEYS)}",
                file=file,
                line=lines.get((*place, unknown[0])),
                hint="a block has `rounds`, `stages` and, for its first round, `first`",
            )
        rounds, inner = entry["rounds"], entry.get("stages")
        if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
            raise UserError(
                f"rounds: expected a number from 1 on, got {rounds!r}",
                file=file,
                line=lines.get((*place, "rounds")),
            )
        if not isinstance(inner, list) or not inner:
            raise UserError(
                "`rounds` repeats a list of `stages`, and there is none",
                file=file,
                line=lines.get(place),
            )
        first = _mapping(entry.get("first"), (*place, "first"), file, lines)
        within = tuple(
            _entry(step, (*place, "stages", index), file, lines) for index, step in enumerate(inner)
        )
        yield Block(rounds, {name: str(value) for name, value in first.items()}, within)


def _entry(
    entry: Any, place: Place, file: Path, lines: Mapping[Place, int]
) -> tuple[Place, str, dict[str, Any]]:
    """Return a step's place, name and keys, once its stage is known to exist."""
    line = lines.get(place)
    if not isinstance(entry, dict):
        raise UserError("a stage is a mapping of keys to values", file=file, line=line)
    if "rounds" in entry:
        raise UserError("a block of `rounds` holds stages, no other block", file=file, line=line)
    stage = entry.get("stage")
    if not isinstance(stage, str) or config_class_of(stage) is None:
        known = stage_names()
        what = "no `stage`" if stage is None else f"no stage `{stage}`"
        close = did_you_mean(str(stage), known) if stage is not None else ""
        raise UserError(
            what + close,
            file=file,
            line=lines.get((*place, "stage"), line),
            hint=f"stages are {', '.join(known)}",
        )
    name = entry.get("name", stage)
    if not isinstance(name, str) or not _is_name(name):
        raise UserError(
            f"name: expected letters, digits, `-`, `_` and `.`, got {name!r}",
            file=file,
            line=lines.get((*place, "name"), line),
            hint="it is the name of the stage's directory, too",
        )
    return place, name, entry


def _is_name(name: str) -> bool:
    plain = name.replace("-", "").replace("_", "").replace(".", "")
    return plain.isalnum() and plain.isascii() and name[0] not in "-." and len(name) <= 64


def _check_defaults(
    defaults: Mapping[str, Any], steps: tuple[Step, ...], file: Path, lines: Mapping[Place, int]
) -> None:
    known = sorted({name for step in steps for name in step.config_class.model_fields})
    for key in defaults:
        if key not in known:
            raise UserError(
                f"defaults: no stage here has a field `{key}`{did_you_mean(key, known)}",
                file=file,
                line=lines.get(("defaults", key)),
            )


def _mapping(value: Any, place: Place, file: Path, lines: Mapping[Place, int]) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(
            f"`{place[-1]}` is a mapping of names to values, got {value!r}",
            file=file,
            line=lines.get(place),
        )
    return {str(key): item for key, item in value.items()}
