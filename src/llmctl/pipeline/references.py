"""Resolve a recipe's names: steps with names in, stages with directories and configs out.

Config classes say which fields name an input (`Input` beside the field), and what a stage's result
can be to others (`makes`). A name of a stage wins over a file of that name.
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
from llmctl.pipeline.gate_checks import parse_gates, require_known_metrics
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
    external: Mapping[str, tuple[str, ...]]
    """Other inputs of each field, as they are written there."""
    references: Mapping[str, tuple[str, ...]]
    """All inputs of each field, in order: full names of stages, with their weights, and others."""
    gates: tuple[Gate, ...]
    file: Path
    line: int | None

    @property
    def out(self) -> Path:
        """Directory or file of its result."""
        assert self.config.out is not None
        return self.config.out

    @property
    def is_file(self) -> bool:
        """Whether the result is a file and not a run's directory."""
        return self.out.suffix == ".jsonl"

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the stages that it reads, each once."""
        return tuple(dict.fromkeys(name for names in self.needs.values() for name in names))

    @property
    def processes(self) -> int:
        """Number of processes that it runs in."""
        return int(dict(self.config).get("processes") or 1)

    def error(self, kind: type[UserError], message: str, hint: str | None = None) -> UserError:
        """Return an error at the stage's line of the recipe."""
        return kind(message, file=self.file, line=self.line, hint=hint)

    def named_in(self, error: UserError) -> UserError:
        """Put the stage's name before the error's message."""
        error.message = f"stage `{self.name}`: {error.message}"
        if isinstance(error, Interrupted | Terminated):
            error.hint = "the same command goes on"
        return error


def resolve(recipe: Recipe, out: Path, **overrides: Any) -> tuple[Stage, ...]:
    """Build the config of every stage, each with a directory of its own in `out`.

    Overrides that are not None are set in every stage that has such a field.

    Raises:
        UserError: with the line of the recipe.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    stages: dict[str, Stage] = {}
    for step in recipe.steps:
        stages[step.name] = _resolve(step, recipe.file, out, stages, given)
    return tuple(stages.values())


def expand_variables(text: str, *, where: str, file: Path, line: int | None) -> str:
    """Put variables of the environment into a text: `${env:NAME}`, `${env:NAME:-default}`.

    Raises:
        UserError: a variable that is not set and has no default.
    """

    def value(match: re.Match[str]) -> str:
        name, default = match[1], match[2]
        content = os.environ.get(name) or default
        if content is None:
            raise UserError(
                f"{where}: the environment has no {name}",
                file=file,
                line=line,
                hint=f"set it, or give a default: ${{env:{name}:-path}}",
            )
        return content

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
    names, values = _ReferenceResolver(step, file, out, before), dict(step.values)
    for key, value in values.items():
        if key in fields:
            values[key] = names.resolve_value(key, value, fields[key])
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
    needs, external, references = (
        {key: tuple(texts) for key, texts in inputs.items()}
        for inputs in (names.needs, names.external, names.references)
    )
    return Stage(step.name, step.stage, config, needs, external, references, gates, file, step.line)


class _ReferenceResolver:
    """Resolves the names in one step's fields."""

    def __init__(self, step: Step, file: Path, out: Path, before: Mapping[str, Stage]) -> None:
        self.step, self.file, self.out, self.before = step, file, out, before
        self.needs: dict[str, list[str]] = {}
        self.external: dict[str, list[str]] = {}
        self.references: dict[str, list[str]] = {}

    def resolve_value(self, key: str, value: Any, kinds: tuple[str, ...]) -> Any:
        """Put directories for stages' names, and the environment's variables, into a value."""
        if isinstance(value, list):
            return [self.resolve_value(key, item, kinds) for item in value]
        if not isinstance(value, str):
            return value
        line = self.step.lines.get(key, self.step.line)
        text = expand_variables(value, where=key, file=self.file, line=line)
        stem, weight = split_weight(text)
        if not kinds or stem not in self.step.scope:
            close = difflib.get_close_matches(stem, list(self.step.scope), n=1)
            if close and "/" not in stem and not Path(stem).exists():  # it is looked for on the Hub
                log.warning("`%s` is no stage: did you mean `%s`?", stem, close[0])
            return self._external(key, text)
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
            return self._external(key, name + weight)
        stage = self.before[name]
        self._require_kind(key, stage, kinds, line)
        path = Path(stem)
        if path.exists() and not (stage.out.exists() and path.samefile(stage.out)):
            log.warning("`%s` means the stage, not the file here: write ./%s for that", stem, stem)
        self.needs.setdefault(key, []).append(name)
        self.references.setdefault(key, []).append(name + weight)
        return str(stage.out) + weight

    def _external(self, key: str, text: str) -> str:
        self.external.setdefault(key, []).append(text)
        self.references.setdefault(key, []).append(text)
        return text

    def _require_kind(
        self, key: str, stage: Stage, kinds: tuple[str, ...], line: int | None
    ) -> None:
        makes = type(stage.config).makes
        if not set(kinds) & set(makes):
            gives = f"gives {_either(makes)}" if makes else "gives nothing to others"
            raise UserError(
                f"stage `{self.step.name}`: {key} takes {_either(kinds)}, and `{stage.name}` "
                f"({stage.stage}) {gives}",
                file=self.file,
                line=line,
            )


KIND_NAMES = {
    "tokens": "token shards",
    "tokenizer": "a tokenizer",
    "model": "a language model",
    "reward": "a reward model",
    "data": "a file of rows",
}


def _either(kinds: tuple[str, ...]) -> str:
    return " or ".join(KIND_NAMES[kind] for kind in kinds)
