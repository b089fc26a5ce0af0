"""Recipes as they are typed: strict YAML in, plain values and the line of every key out."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from llmctl.errors import UserError

RECIPE_BYTES = 32_000
"""More than any recipe needs, and less than a parser can be kept busy with for a second."""
RECIPE_DEPTH = 20
Place = tuple[str | int, ...]
"""Keys and numbers of list entries that lead to a value, from the outside in."""


class _StrictLoader(yaml.SafeLoader):
    """YAML without what surprises: no aliases, no duplicate keys, and `1e-4` is a number."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases are not allowed in a recipe",
                problem_mark=self.get_mark(),
            )
        self.depth += 1
        if self.depth > RECIPE_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"nested deeper than {RECIPE_DEPTH} levels",
                problem_mark=self.get_mark(),
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"duplicate key `{key.value}`", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _construct_int(loader: _StrictLoader, node: Any) -> int:
    """A number that a message can show: Python takes long, or refuses, to print longer ones."""
    value = int(loader.construct_yaml_int(node))
    if abs(value) >= 2**63:
        raise yaml.MarkedYAMLError(
            problem="a number of more than 64 bits", problem_mark=node.start_mark
        )
    return value


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def read_recipe(recipe: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """A recipe's keys and values, and the 1-based line of each key.

    Raises:
        UserError: as `read_nested`.
    """
    values, lines = read_nested(recipe)
    return values, {str(place[0]): line for place, line in lines.items() if len(place) == 1}


def read_nested(recipe: Path) -> tuple[dict[str, Any], dict[Place, int]]:
    """A recipe's keys and values, and the 1-based line of all that is in it.

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
    """The line of each key and of each entry of a list."""
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
    """Values as a recipe that `read_recipe` reads back."""
    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))
