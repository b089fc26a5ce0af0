"""What every config shares: strict fields, recipes, and errors that name the flag or the line."""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from llmctl.config.reading import read_recipe, to_yaml
from llmctl.errors import UserError
from llmctl.redact import redacted


@dataclass(frozen=True)
class Also:
    """Other spellings of a flag, accepted but not shown in `--help`."""

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        """Names in kebab-case, without dashes in front."""
        object.__setattr__(self, "names", names)


@dataclass(frozen=True)
class Flag:
    """The flag's own spellings, where they are not the field's name in kebab-case."""

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        """Names with their dashes, the long one first."""
        object.__setattr__(self, "names", names)


@dataclass(frozen=True)
class Argument:
    """Marks a field that is given by its place, not by a flag."""

    name: str
    """What `--help` calls it."""


@dataclass(frozen=True)
class Input:
    """Marks a field that names what is read; a life cycle may name a stage's result there."""

    kinds: tuple[str, ...]
    """What it may be (see `Config.makes`); empty for what no stage makes."""

    def __init__(self, *kinds: str) -> None:
        """Kinds as in `Config.makes`."""
        object.__setattr__(self, "kinds", kinds)


def parse_count(value: Any) -> Any:
    """`20M`, `1.5GB`, `64k` or `1e9` as a whole number; anything else is left to pydantic."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(
        r"([0-9]+(?:\.[0-9]+)?(?:[eE][0-9]+)?)\s*([kKmMgGtTbB]?)[bB]?", value.strip()
    )
    if match is None:
        raise ValueError("expected a count such as 5000, 20M or 1.5GB")
    scale = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
    number = float(match[1]) * scale[match[2].lower()]
    if not math.isfinite(number) or number != int(number):
        raise ValueError("expected a whole number")
    return int(number)


Count = Annotated[int, BeforeValidator(parse_count)]


class Fields(BaseModel):
    """A frozen set of fields; the docstring under each field is its help text."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


class Config(Fields):
    """The fields of one command."""

    makes: ClassVar[tuple[str, ...]] = ()
    """What its result can be to other commands: tokens, tokenizer, model, reward or data."""

    @classmethod
    def load(cls, stage: str, recipe: Path | None, flags: Mapping[str, Any]) -> Self:
        """Resolve defaults < recipe < flags, where flags maps field names to given values.

        Raises:
            UserError: an unknown key, a value that does not fit, or a field that is missing.
        """
        lines: dict[str, int] = {}
        values: dict[str, Any] = {}
        if recipe is not None:
            values, lines = read_recipe(recipe)
            named = values.pop("stage", stage)
            if named != stage:
                raise UserError(
                    f"the recipe is for `{named}`, not for `{stage}`",
                    file=recipe,
                    line=lines.get("stage"),
                    hint=f"run: llmctl {named} -c {recipe}",
                )
        return cls.build(values, flags, recipe, lines)

    @classmethod
    def build(
        cls,
        values: Mapping[str, Any],
        flags: Mapping[str, Any],
        recipe: Path | None,
        lines: Mapping[str, int],
    ) -> Self:
        """The config of these values of a recipe and these flags, which win.

        Args:
            values: by field name.
            flags: by field name.
            recipe: the file that the values stand in.
            lines: 1-based line of each value.

        Raises:
            UserError: an unknown key, a value that does not fit, or a field that is missing.
        """
        for key in values:
            if key not in cls.model_fields:
                raise UserError(
                    f"unknown key `{key}`" + cls._suggest(key), file=recipe, line=lines.get(key)
                )
        try:
            return cls.model_validate({**values, **flags})
        except ValidationError as error:
            raise cls._explain(error, recipe, lines, flags) from None

    def recipe(self, stage: str) -> dict[str, Any]:
        """The resolved config as recipe keys, without secrets and what steers only this call."""
        return {"stage": stage, **redacted(self.model_dump(mode="json"))}

    def to_yaml(self, stage: str) -> str:
        """The resolved config as a recipe that `load` reads back."""
        return to_yaml(self.recipe(stage))

    def given(self) -> set[str]:
        """Names of the fields that differ from their defaults."""
        return {
            name
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.default
        }

    @classmethod
    def flag(cls, name: str) -> str:
        """The flag that sets a field, as a user would type it."""
        for item in cls.model_fields[name].metadata:
            if isinstance(item, Flag):
                return item.names[0]
            if isinstance(item, Argument):
                return item.name
        return "--" + name.replace("_", "-")

    @classmethod
    def inputs(cls) -> dict[str, tuple[str, ...]]:
        """The fields that name what is read, each with the kinds of results that it takes."""
        return {
            name: item.kinds
            for name, field in cls.model_fields.items()
            for item in field.metadata
            if isinstance(item, Input)
        }

    @classmethod
    def other_spellings(cls) -> dict[str, str]:
        """Hidden spelling -> flag name, both in kebab-case and without dashes in front."""
        return {
            other: cls.flag(name).removeprefix("--")
            for name, field in cls.model_fields.items()
            for item in field.metadata
            if isinstance(item, Also)
            for other in item.names
        }

    @classmethod
    def _suggest(cls, key: str) -> str:
        spelled = key.replace("_", "-")
        if spelled in cls.other_spellings():
            return f": it is called `{cls.other_spellings()[spelled].replace('-', '_')}` here"
        close = difflib.get_close_matches(key, cls.model_fields, n=1)
        return f": did you mean `{close[0]}`?" if close else ""

    @classmethod
    def _explain(
        cls,
        error: ValidationError,
        recipe: Path | None,
        lines: Mapping[str, int],
        flags: Mapping[str, Any],
    ) -> UserError:
        """The first thing wrong, said in terms of the flag or the recipe line it came from."""
        first = error.errors()[0]
        if not first["loc"]:
            return UserError(first["msg"].removeprefix("Value error, "))
        name = str(first["loc"][0])
        flag = cls.flag(name)
        if first["type"] == "missing":
            return UserError(f"{flag} is required", hint=f"pass {flag} or set `{name}` in a recipe")
        reason = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        message = f"{reason}, got {first['input']!r}"
        if name in flags:
            return UserError(f"{flag}: {message}")
        return UserError(f"{name}: {message}", file=recipe, line=lines.get(name))
