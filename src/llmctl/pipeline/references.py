"""What a recipe's names mean: steps with names in, stages with directories and configs out.

Which fields name what is read, and what a stage's result can be to others, is said by the config
classes: `Input` beside a field, and `makes`. A name of a stage wins over a file of that name.
"""

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.config.gates import Gate
from llmctl.config.sections import StageConfig
from llmctl.console import log
from llmctl.data.sources import split_weight
from llmctl.errors import Interrupted, Terminated, UserError
from llmctl.pipeline.gates import parse_gates, require_known_metrics
from llmctl.pipeline.steps import Recipe, Step

VARIABLE = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


@dataclass(frozen=True)
class Stage:
    """One stage, ready to be checked and run."""

    name: str
    stage: str
    config: StageConfig
    needs: Mapping[str, tuple[str, ...]]
    """Names of the stages that each field reads."""
    outside: Mapping[str, tuple[str, ...]]
    """What else each field reads, as it is written there."""
    spelled: Mapping[str, tuple[str, ...]]
    """All that each field reads, in order: full names of stages, with their weights, and others."""
    gates: tuple[Gate, ...]
    file: Path
    line: int | None

    @property
    def out(self) -> Path:
        """Its directory, or its file."""
        assert self.config.out is not None
        return self.config.out

    @property
    def is_file(self) -> bool:
        """Whether the result is a file and not a run's directory."""
        return self.out.suffix == ".jsonl"

    @property
    def inputs(self) -> tuple[str, ...]:
        """Every stage that it reads, once."""
        return tuple(dict.fromkeys(name for names in self.needs.values() for name in names))

    def read(self, field: str) -> tuple[str, ...]:
        """What a field reads."""
        return self.spelled.get(field, ())

    @property
    def processes(self) -> int:
        """How many processes it takes."""
        return int(dict(self.config).get("processes") or 1)

    def wrong(self, error: UserError) -> UserError:
        """The error, saying which stage it is about."""
        error.message = f"stage `{self.name}`: {error.message}"
        if isinstance(error, Interrupted | Terminated):
            error.hint = "the same command goes on"
        return error


def resolve(recipe: Recipe, out: Path, **instead: Any) -> tuple[Stage, ...]:
    """Every stage with its config.

    Args:
        recipe: the life cycle.
        out: where the stages' directories are.
        instead: fields to set in every stage that has them, unless None.

    Raises:
        UserError: with the line of the recipe.
    """
    overrides = {name: value for name, value in instead.items() if value is not None}
    stages: dict[str, Stage] = {}
    for step in recipe.steps:
        stages[step.name] = _resolve(step, recipe.file, out, stages, overrides)
    return tuple(stages.values())


def expanded(text: str, *, where: str, file: Path, line: int | None) -> str:
    """The text with variables of the environment put in: `${env:NAME}`, `${env:NAME:-default}`.

    Raises:
        UserError: a variable that is not set and has no default.
    """

    def value(found: re.Match[str]) -> str:
        name, default = found[1], found[2]
        known = os.environ.get(name) or default
        if known is None:
            raise UserError(
                f"{where}: the environment has no {name}",
                file=file,
                line=line,
                hint=f"set it, or give a default: ${{env:{name}:-path}}",
            )
        return known

    return VARIABLE.sub(value, text)


def _resolve(
    step: Step, file: Path, out: Path, before: Mapping[str, Stage], overrides: Mapping[str, Any]
) -> Stage:
    fields = step.config_class.inputs()
    known = step.config_class.model_fields
    steering = [name for name in step.values if name in known and known[name].exclude]
    if steering:
        raise UserError(
            f"`{steering[0]}` steers one call and is no part of a life cycle",
            file=file,
            line=step.lines.get(steering[0], step.line),
            hint=f"`llmctl run` has flags; its stages write to {out / step.name}",
        )
    names, values = _Names(step, file, out, before), dict(step.values)
    for key, value in values.items():
        if key in fields:
            values[key] = names.put_in(key, value, fields[key])
        elif "${env:" in str(value):
            raise UserError(
                f"{key}: ${{env:…}} is for paths, which this field does not name",
                file=file,
                line=step.lines.get(key, step.line),
            )
    values |= {name: value for name, value in overrides.items() if name in known}
    place = out / (f"{step.name}.jsonl" if "data" in step.config_class.makes else step.name)
    try:
        config = step.config_class.build(values, {"out": place}, file, step.lines)
    except UserError as error:
        error.message = f"stage `{step.name}`: {error.message}"
        error.file, error.line = str(file), error.line or step.line
        raise
    gates = parse_gates(step.gates, file, step.line)
    require_known_metrics(gates, step.stage, file, step.line)
    needs = {key: tuple(found) for key, found in names.needs.items()}
    outside = {key: tuple(found) for key, found in names.outside.items()}
    spelled = {key: tuple(found) for key, found in names.spelled.items()}
    return Stage(step.name, step.stage, config, needs, outside, spelled, gates, file, step.line)


class _Names:
    """The names that one step's fields hold."""

    def __init__(self, step: Step, file: Path, out: Path, before: Mapping[str, Stage]) -> None:
        self.step, self.file, self.out, self.before = step, file, out, before
        self.needs: dict[str, list[str]] = {}
        self.outside: dict[str, list[str]] = {}
        self.spelled: dict[str, list[str]] = {}

    def put_in(self, key: str, value: Any, kinds: tuple[str, ...]) -> Any:
        """The value with directories for the names of stages, and the environment's variables."""
        if isinstance(value, list):
            return [self.put_in(key, item, kinds) for item in value]
        if not isinstance(value, str):
            return value
        line = self.step.lines.get(key, self.step.line)
        text = expanded(value, where=key, file=self.file, line=line)
        stem, weight = split_weight(text)
        if not kinds or stem not in self.step.scope:
            self._warn_of_slip(stem)
            return self._outside(key, text)
        name = self.step.scope[stem]
        if name is None:
            raise UserError(
                f"stage `{self.step.name}`: {key}: `{stem}` comes later, or is this stage itself",
                file=self.file,
                line=line,
                hint=f"move `{stem}` up; in a block of rounds say under `first` what it means "
                "in the first one",
            )
        if name not in self.before:  # of `first`: no stage
            return self._outside(key, name + weight)
        found = self.before[name]
        self._require_kind(key, found, kinds, line)
        self._warn_of_file(stem, found)
        self.needs.setdefault(key, []).append(name)
        self.spelled.setdefault(key, []).append(name + weight)
        return str(found.out) + weight

    def _outside(self, key: str, text: str) -> str:
        self.outside.setdefault(key, []).append(text)
        self.spelled.setdefault(key, []).append(text)
        return text

    def _require_kind(
        self, key: str, found: Stage, kinds: tuple[str, ...], line: int | None
    ) -> None:
        makes = type(found.config).makes
        if not set(kinds) & set(makes):
            gives = f"gives {_either(makes)}" if makes else "gives nothing to others"
            raise UserError(
                f"stage `{self.step.name}`: {key} takes {_either(kinds)}, and `{found.name}` "
                f"({found.stage}) {gives}",
                file=self.file,
                line=line,
            )

    def _warn_of_slip(self, name: str) -> None:
        """Say where a name is nearly a stage's: a model of it would be looked for on the Hub."""
        close = difflib.get_close_matches(name, list(self.step.scope), n=1)
        if close and "/" not in name and not Path(name).exists():
            log.warning("`%s` is no stage: did you mean `%s`?", name, close[0])

    def _warn_of_file(self, name: str, found: Stage) -> None:
        there = Path(name)
        if there.exists() and not (found.out.exists() and there.samefile(found.out)):
            log.warning("`%s` means the stage, not the file here: write ./%s for that", name, name)


WORDS = {
    "tokens": "token shards",
    "tokenizer": "a tokenizer",
    "model": "a language model",
    "reward": "a reward model",
    "data": "a file of rows",
}


def _either(kinds: tuple[str, ...]) -> str:
    return " or ".join(WORDS[kind] for kind in kinds)
