"""The base of configs: strict fields, recipes, and errors that name the flag or the line.

A recipe is strict YAML: plain values in, with the line of every key.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from llmctl.errors import UserError, did_you_mean
from llmctl.redact import redacted

RECIPE_BYTES = 32_000
"""More than any recipe needs, and less than a parser can be kept busy with for a second."""
RECIPE_DEPTH = 20
Place = tuple[str | int, ...]
"""Keys and numbers of list entries that lead to a value, from the outside in."""


def _problem(text: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=mark)


class _StrictLoader(yaml.SafeLoader):
    """YAML without what surprises: no aliases, no duplicate keys, and `1e-4` is a number."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise _problem("aliases are not allowed in a recipe", self.get_mark())
        self.depth += 1
        if self.depth > RECIPE_DEPTH:
            raise _problem(f"nested deeper than {RECIPE_DEPTH} levels", self.get_mark())
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise _problem(f"duplicate key `{key.value}`", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _construct_int(loader: _StrictLoader, node: Any) -> int:
    """Construct an integer of at most 64 bits: Python may refuse to print longer ones."""
    value = int(loader.construct_yaml_int(node))
    if abs(value) >= 2**63:
        raise _problem("a number of more than 64 bits", node.start_mark)
    return value


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def read_recipe(recipe: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Read a recipe's keys and values, and the 1-based line of each key.

    Raises:
        UserError: as `read_nested`.
    """
    values, lines = read_nested(recipe)
    return values, {str(place[0]): line for place, line in lines.items() if len(place) == 1}


def read_nested(recipe: Path) -> tuple[dict[str, Any], dict[Place, int]]:
    """Read a recipe's keys and values, and the 1-based line of everything in it.

    Raises:
        UserError: the file is missing, too large, not UTF-8, or not a plain YAML mapping.
    """
    try:
        raw = recipe.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the recipe: {error.strerror}", file=recipe) from None
    if len(raw) > RECIPE_BYTES:
        raise UserError(
            f"a recipe of {len(raw):,} bytes; the limit is {RECIPE_BYTES:,}", file=recipe
        )
    try:
        loader = _StrictLoader(raw.decode())
        node = loader.get_single_node()
        values = loader.construct_document(node) if node is not None else {}
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 at byte {error.start}", file=recipe) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(
            f"malformed YAML: {error.problem or error.context}",
            file=recipe,
            line=mark.line + 1 if mark else None,
        ) from None
    except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:  # a date of 99 months, …
        raise UserError(f"malformed YAML: {error}", file=recipe) from None
    if not isinstance(values, dict):
        raise UserError(
            f"expected a mapping of keys to values, got a {type(values).__name__}", file=recipe
        )
    return values, dict(_lines(node, ()))


def _lines(node: Any, place: Place) -> Iterator[tuple[Place, int]]:
    """Yield the line of each key and of each entry of a list."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, key.value)
            yield inner, key.start_mark.line + 1
            yield from _lines(value, inner)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield (*place, number), value.start_mark.line + 1
            yield from _lines(value, (*place, number))


def to_yaml(values: Mapping[str, Any]) -> str:
    """Format values as a recipe that `read_recipe` reads back."""
    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))


class _Named:
    """Names in the annotation of a field."""

    def __init__(self, *names: str) -> None:
        self.names = names


class Also(_Named):
    """Other spellings of a flag, in kebab-case and without dashes; `--help` does not show them."""


class Flag(_Named):
    """The flag's own spellings, with their dashes and the long one first; else the field's name."""


class Argument(_Named):
    """Marks a field that is given by its place, not by a flag; its name in `--help`."""


class Input(_Named):
    """Marks a field that names an input; a life cycle may name a stage's result there.

    The names are kinds of results that it takes (see `Config.makes`), none for what no stage makes.
    """


def parse_count(value: Any) -> Any:
    """Parse `20M`, `1.5GB`, `64k` or `1e9` as a whole number; leave other types to pydantic."""
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

    def given(self) -> set[str]:
        """Return names of the fields that differ from their defaults."""
        return {
            name
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.default
        }

    @classmethod
    def flag(cls, name: str) -> str:
        """Return the flag that sets a field, as a user would type it."""
        for item in cls.model_fields[name].metadata:
            if isinstance(item, Flag | Argument):
                return item.names[0]
        return "--" + name.replace("_", "-")

    def require_field(self, name: str, kinds: str) -> None:
        """Refuse to do without a field.

        Raises:
            ValueError: it is empty; names what it takes.
        """
        if not getattr(self, name):
            raise ValueError(f"{self.flag(name)} is required: {kinds}")

    def at_most_one(self, *names: str) -> None:
        """Refuse several fields that say the same.

        Raises:
            ValueError: naming two that are given.
        """
        given = [self.flag(name) for name in names if name in self.given()]
        if len(given) > 1:
            raise ValueError(f"give {given[0]} or {given[1]}, not both")

    def refuse(self, names: Iterable[str], reason: str) -> None:
        """Refuse fields that would not be used.

        Raises:
            ValueError: the reason, in which `{}` is the first flag of them that is given.
        """
        given = [self.flag(name) for name in names if name in self.given()]
        if given:
            raise ValueError(reason.format(given[0]))


class Config(Fields):
    """The fields of one command."""

    makes: ClassVar[tuple[str, ...]] = ()
    """Kinds of its result for other commands: tokens, tokenizer, model, reward or data."""

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
        """Build the config of a recipe's values (with their 1-based lines) and of flags, which win.

        Raises:
            UserError: an unknown key, a value that does not fit, or a field that is missing.
        """
        for key in values:
            if key not in cls.model_fields:
                here = cls.other_spellings().get(key.replace("_", "-"), "").replace("-", "_")
                close = f": it is called `{here}` here" if here else ""
                close = close or did_you_mean(key, cls.model_fields)
                raise UserError(f"unknown key `{key}`{close}", file=recipe, line=lines.get(key))
        try:
            return cls.model_validate({**values, **flags})
        except ValidationError as error:
            raise cls._explain(error, recipe, lines, flags) from None

    def recipe(self, stage: str) -> dict[str, Any]:
        """Return the resolved config as recipe keys, without secrets and control flags."""
        return {"stage": stage, **redacted(self.model_dump(mode="json"))}

    def to_yaml(self, stage: str) -> str:
        """Return the resolved config as a recipe that `load` reads back."""
        return to_yaml(self.recipe(stage))

    @classmethod
    def inputs(cls) -> dict[str, tuple[str, ...]]:
        """Return the fields that name inputs, each with the kinds of results that it takes."""
        return {
            name: item.names
            for name, field in cls.model_fields.items()
            for item in field.metadata
            if isinstance(item, Input)
        }

    @classmethod
    def other_spellings(cls) -> dict[str, str]:
        """Return hidden spelling -> flag name, both in kebab-case and without dashes in front."""
        return {
            other: cls.flag(name).removeprefix("--")
            for name, field in cls.model_fields.items()
            for item in field.metadata
            if isinstance(item, Also)
            for other in item.names
        }

    @classmethod
    def _explain(
        cls,
        error: ValidationError,
        recipe: Path | None,
        lines: Mapping[str, int],
        flags: Mapping[str, Any],
    ) -> UserError:
        """Return the first error, in terms of the flag or recipe line that it came from."""
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
