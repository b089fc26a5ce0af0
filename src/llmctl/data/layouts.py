"""Which columns of a row make an example: recognised by their names, or told by `--columns`.

In: a row, and what the user said of its columns. Out: a `Layout`; `LAYOUTS` lists those there are.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from llmctl.data.records import listed
from llmctl.errors import DataError, UserError

Task = Literal["chat", "classify"]
Row = dict[str, Any]
CHAT_ROLES = ("messages", "prompt", "response", "system", "text")
HOW = "name the columns: --columns prompt=NAME,response=NAME"


class Layout(NamedTuple):
    """Columns that make an example."""

    needed: dict[str, str]
    """Column of each role."""
    more: dict[str, str]
    """The same for what a row may lack."""

    def __str__(self) -> str:
        """As messages name it."""
        return " + ".join(f"`{column}`" for column in self.needed.values())


MORE = {"system": "system", "tools": "tools"}
LAYOUTS: dict[Task, tuple[Layout, ...]] = {  # a row is of the first that it has the columns of
    "chat": (
        Layout({"messages": "messages"}, MORE),
        Layout({"messages": "conversations"}, MORE),
        Layout({"prompt": "prompt", "response": "completion"}, MORE),
        Layout({"prompt": "prompt", "response": "response"}, MORE),
        Layout(
            {"prompt": "instruction", "response": "output"},
            {**MORE, "input": "input", "history": "history"},
        ),
        Layout({"prompt": "question", "response": "answer"}, MORE),
        Layout({"text": "text"}, {}),
    ),
    "classify": (Layout({"text": "text", "label": "label"}, {}),),
}


def choose_layouts(columns: Sequence[str], task: Task) -> tuple[Layout, ...]:
    """The layouts to look for: those there are, or the one that `--columns` tells.

    Raises:
        UserError: columns that make no sense.
    """
    given = _roles(columns, CHAT_ROLES if task == "chat" else ("text", "label"), task)
    if not given:
        return LAYOUTS[task]
    whole = [("text", "label")] if task == "classify" else [("messages",), ("text",)]
    needed = next((names for names in whole if given.keys() & set(names)), ("prompt", "response"))
    more = {} if "text" in needed else MORE
    if extra := [role for role in given if role not in needed and role not in more]:
        raise UserError(f"--columns: `{extra[0]}` does not go with `{needed[0]}`")
    return (Layout({**{role: role for role in needed}, **given}, more),)


def layout_of(
    row: Row, layouts: tuple[Layout, ...], known: Layout | None, first: int | None
) -> Layout:
    """The layout of a row, which must be that of the rows before it.

    Args:
        row: what is there.
        layouts: what it may be.
        known: what the rows before it are.
        first: line of the first of them.

    Raises:
        DataError: it is none of them, or another than the rows before it.
    """
    found = next((one for one in layouts if row.keys() >= set(one.needed.values())), None)
    if found is not None and known is not None and found is not known:
        raise DataError(f"this row is {found}, but that of line {first} is {known}")
    if found is not None:
        return found
    there = listed(list(row))
    if known is None and len(layouts) > 1:
        raise DataError(
            f"no example in these columns: {there}",
            hint=f"it takes {', '.join(map(str, layouts[:-1]))} or {layouts[-1]}; else {HOW}",
        )
    needed = (known or layouts[0]).needed
    missing = next(column for column in needed.values() if column not in row)
    hint = "name the columns: --columns text=NAME,label=NAME" if "label" in needed else HOW
    raise DataError(f"no column `{missing}`; there is {there}", hint=hint)


def _roles(columns: Sequence[str], roles: Sequence[str], task: Task) -> dict[str, str]:
    """The column of each role that `--columns` gives."""
    given: dict[str, str] = {}
    for pair in (pair.strip() for text in columns for pair in text.split(",")):
        role, sign, column = pair.partition("=")
        if not (sign and column) or role in given:
            what = "given twice" if role in given else "expected ROLE=NAME"
            raise UserError(f"--columns {pair}: {what}", hint="such as prompt=q,response=a")
        if role not in roles:
            raise UserError(
                f"--columns {pair}: no role `{role}` in --task {task}",
                hint=f"roles are {', '.join(roles)}",
            )
        given[role] = column
    return given
