"""Turn a config class into a Typer command: one flag per field, and one for a recipe.

Values reach pydantic as they were typed, so that every message about a value comes from one place.
"""

import inspect
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from llmctl.config.base import Argument, Config, Flag

CONTROL_PANEL = "Output"


def command(
    stage: str, config_class: type[Config], run: Callable[[Any], int]
) -> Callable[..., int]:
    """Return a function whose signature Typer reads as one flag per field, and which runs a config.

    The recipe's `stage` key must be the command's name.
    """

    def call(recipe: Path | None = None, **flags: Any) -> int:
        given = {k: v for k, v in flags.items() if v is not None and v != []}
        return run(config_class.load(stage, recipe, given))

    has_recipe = any(field.exclude is not True for field in config_class.model_fields.values())
    recipe = [_RECIPE] if has_recipe else []
    call.__signature__ = inspect.Signature([*recipe, *_flags(config_class)])  # type: ignore[attr-defined]
    return call


def token_normalizer(config_class: type[Config]) -> Callable[[str], str]:
    """Accept snake_case and the names that other tools use."""
    others = config_class.other_spellings()

    def normalize(token: str) -> str:
        kebab = token.replace("_", "-")
        return others.get(kebab, kebab)

    return normalize


_RECIPE = inspect.Parameter(
    "recipe",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FILE",
            help="YAML recipe; flags override it.",
            rich_help_panel=CONTROL_PANEL,
        ),
    ],
)


def panels(config_class: type[Config]) -> dict[str, list[str]]:
    """Return panel title -> field names: own fields first, then each shared group."""
    grouped: dict[str, list[str]] = {}
    titles = dict.fromkeys((config_class.__name__, "StageConfig"), "Options")
    titles["Reporting"] = CONTROL_PANEL
    for owner in config_class.__mro__:
        own = [n for n in inspect.get_annotations(owner) if n in config_class.model_fields]
        title = titles.get(owner.__name__, owner.__name__)
        taken = {name for names in grouped.values() for name in names}
        if new := [name for name in own if name not in taken]:
            grouped.setdefault(title, []).extend(new)
    if CONTROL_PANEL in grouped:
        grouped[CONTROL_PANEL] = grouped.pop(CONTROL_PANEL)
    return grouped


def _flags(config_class: type[Config]) -> Iterator[inspect.Parameter]:
    for panel, names in panels(config_class).items():
        for name in names:
            field = config_class.model_fields[name]
            option = _option(config_class, name, field, panel)
            kind: Any = _cli_type(field.annotation)
            annotation: Any = Annotated[kind | None, option]
            yield inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
            )


def _option(config_class: type[Config], name: str, field: FieldInfo, panel: str) -> Any:
    for item in field.metadata:
        if isinstance(item, Argument):
            return typer.Argument(metavar=item.names[0], help=help_text(field))
    given = next((item.names for item in field.metadata if isinstance(item, Flag)), None)
    names = list(given or [config_class.flag(name)])
    kind = _cli_type(field.annotation)
    if kind is bool:
        if field.exclude is not True:
            names[0] += "/--no-" + names[0].removeprefix("--")
        return typer.Option(*names, help=help_text(field), rich_help_panel=panel)
    choices = literal_choices(field.annotation)
    return typer.Option(
        *names,
        help=help_text(field),
        metavar=metavar(field),
        rich_help_panel=panel,
        autocompletion=(lambda: choices) if choices else None,
    )


def help_text(field: FieldInfo) -> str:
    """Return the field's docstring on one line, with its default."""
    text = " ".join((field.description or "").split())
    default = field.default
    if default is PydanticUndefined:
        return f"{text} (required)"
    if default is None or default == [] or default is False:
        return text
    return f"{text} (default: {default})"


def metavar(field: FieldInfo) -> str:
    """Return the value's placeholder in `--help`."""
    if choices := literal_choices(field.annotation):
        return "|".join(choices)
    names = {int: "INTEGER", float: "NUMBER", Path: "PATH", str: "TEXT"}
    return next((names[t] for t in _members(field.annotation) if t in names), "TEXT")


def literal_choices(annotation: Any) -> list[str]:
    """Return the values of a `Literal`, or of a list of them, or nothing."""
    for member in _members(annotation):
        if get_origin(member) is Literal:
            return list(get_args(member))
    return []


def _cli_type(annotation: Any) -> Any:
    """Return the type that Typer parses: a flag, a list or text; pydantic does the rest."""
    for member in _unwrapped(annotation):
        if member is bool:
            return bool
        if get_origin(member) is list:
            return list[str]
    return str


def _members(annotation: Any) -> Iterator[Any]:
    for member in _unwrapped(annotation):
        yield from get_args(member) if get_origin(member) is list else [member]


def _unwrapped(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Annotated:
        yield from _unwrapped(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            if member is not types.NoneType:
                yield from _unwrapped(member)
    else:
        yield annotation
