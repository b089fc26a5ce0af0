"""Read the recipe of a life cycle: a YAML file in, one `Step` for each of its stages out.

Nothing but the file is read. See `references.py` for what names mean.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl.config.base import Place, read_nested
from llmctl.config.commands import command_names, config_of
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
class _Source:
    """A recipe's file, and the 1-based line of everything in it."""

    file: Path
    lines: Mapping[Place, int]

    def error(self, message: str, place: Place, hint: str | None = None) -> UserError:
        """Return an error at a place, or at the entry that lacks it."""
        line = self.lines.get(place, self.lines.get(place[:-1]))
        return UserError(message, file=self.file, line=line, hint=hint)

    def mapping(self, value: Any, place: Place) -> dict[str, Any]:
        """Return a mapping, empty for None.

        Raises:
            UserError: it is something else.
        """
        if value is not None and not isinstance(value, dict):
            text = f"`{place[-1]}` is a mapping of names to values, got {value!r}"
            raise self.error(text, place)
        return {str(key): item for key, item in (value or {}).items()}


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
    source = _Source(file, lines)
    if unknown := [key for key in values if key not in TOP_KEYS]:
        raise source.error(
            f"unknown key `{unknown[0]}`{did_you_mean(unknown[0], TOP_KEYS)}",
            (unknown[0],),
            "a life cycle has `stages`, and may have `defaults` and `out`",
        )
    defaults = source.mapping(values.get("defaults"), ("defaults",))
    steps = tuple(_steps(values.get("stages"), defaults, source))
    known = sorted({name for step in steps for name in step.config_class.model_fields})
    if odd := [key for key in defaults if key not in known]:
        text = f"defaults: no stage here has a field `{odd[0]}`{did_you_mean(odd[0], known)}"
        raise source.error(text, ("defaults", odd[0]))
    out = values.get("out")
    if out is not None and not isinstance(out, str):
        raise source.error(f"out: expected a directory, got {out!r}", ("out",))
    return Recipe(file, steps, out)


def config_class_of(stage: str) -> type[StageConfig] | None:
    """Return the config of a command that can be a stage of a life cycle; None for any other."""
    config = config_of(stage) if stage.islower() and stage not in INTERACTIVE else None
    return config if config is not None and issubclass(config, StageConfig) else None


def stage_names() -> list[str]:
    """Return every command that can be a stage."""
    return [stage for stage in command_names() if config_class_of(stage)]


def _as_one_stage(
    values: dict[str, Any], lines: Mapping[Place, int]
) -> tuple[dict[str, Any], dict[Place, int]]:
    """Turn a recipe of one stage into a life cycle of one."""
    out = {"out": values["out"]} if "out" in values else {}
    step = {key: value for key, value in values.items() if key != "out"}
    moved = {("stages", 0, *place): line for place, line in lines.items()}
    moved[("stages", 0)] = lines.get(("stage",), 1)
    return {"stages": [step], **out}, moved


def _steps(entries: Any, defaults: Mapping[str, Any], source: _Source) -> Iterator[Step]:
    """Yield every step in order, blocks repeated."""
    taken: set[str] = set()
    for part in unroll(list(_blocks(entries, source)), source.file):
        if part.name in taken:
            text = f"two stages are called `{part.name}`"
            raise source.error(text, part.place, "give one of them another `name`")
        taken.add(part.name)
        config_class = config_class_of(part.entry["stage"])
        assert config_class is not None
        own = {key: value for key, value in part.entry.items() if key not in STEP_KEYS}
        general = {k: v for k, v in defaults.items() if k in config_class.model_fields}
        lines = source.lines.items()
        at = {str(p[-1]): line for p, line in lines if p[:-1] == part.place}
        shared = {str(p[-1]): line for p, line in lines if p[:-1] == ("defaults",)}
        yield Step(
            part.name,
            part.entry["stage"],
            config_class,
            {**general, **own},
            source.mapping(part.entry.get("gates"), (*part.place, "gates")),
            part.scope,
            {**shared, **at},
            source.lines.get(part.place),
        )


def _blocks(entries: Any, source: _Source) -> Iterator[Block]:
    """Yield the entries under `stages`: single steps, and blocks of `rounds`."""
    if not isinstance(entries, list) or not entries:
        text = "`stages` is a list of stages, each with its `stage`"
        hint = "such as: - {name: tok, stage: tokenize, data: [corpus.txt]}"
        raise source.error(text, ("stages",), hint)
    for number, entry in enumerate(entries):
        place: Place = ("stages", number)
        if not (isinstance(entry, dict) and "rounds" in entry):
            yield Block(None, {}, (_entry(entry, place, source),))
            continue
        if unknown := [key for key in entry if key not in BLOCK_KEYS]:
            raise source.error(
                f"unknown key `{unknown[0]}` beside `rounds`{did_you_mean(unknown[0], BLOCK_KEYS)}",
                (*place, unknown[0]),
                "a block has `rounds`, `stages` and, for its first round, `first`",
            )
        rounds, inner = entry["rounds"], entry.get("stages")
        if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
            text = f"rounds: expected a number from 1 on, got {rounds!r}"
            raise source.error(text, (*place, "rounds"))
        if not isinstance(inner, list) or not inner:
            raise source.error("`rounds` repeats a list of `stages`, and there is none", place)
        first = source.mapping(entry.get("first"), (*place, "first"))
        within = [_entry(e, (*place, "stages", index), source) for index, e in enumerate(inner)]
        yield Block(rounds, {name: str(value) for name, value in first.items()}, tuple(within))


def _entry(entry: Any, place: Place, source: _Source) -> tuple[Place, str, dict[str, Any]]:
    """Return a step's place, name and keys, once its stage is known to exist."""
    if not isinstance(entry, dict):
        raise source.error("a stage is a mapping of keys to values", place)
    if "rounds" in entry:
        raise source.error("a block of `rounds` holds stages, no other block", place)
    stage = entry.get("stage")
    if not isinstance(stage, str) or config_class_of(stage) is None:
        known = stage_names()
        text = "no `stage`"
        if stage is not None:
            text = f"no stage `{stage}`{did_you_mean(str(stage), known)}"
        raise source.error(text, (*place, "stage"), f"stages are {', '.join(known)}")
    name = entry.get("name", stage)
    if not isinstance(name, str) or not _is_name(name):
        text = f"name: expected letters, digits, `-`, `_` and `.`, got {name!r}"
        raise source.error(text, (*place, "name"), "it is the name of the stage's directory, too")
    return place, name, entry


def _is_name(name: str) -> bool:
    plain = name.replace("-", "").replace("_", "").replace(".", "")
    return plain.isalnum() and plain.isascii() and name[0] not in "-." and len(name) <= 64
