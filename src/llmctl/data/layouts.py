"""Which columns of a row make an example: recognised by their names, or told by `--columns`.

In: a row, and what the user said of its columns. Out: a `Layout`; `LAYOUTS` lists those there are.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from llmctl.data.records import listed
from llmctl.errors import DataError, UserError

Task = Literal["chat", "classify", "preferences"]
Row = dict[str, Any]
ROLES: dict[Task, tuple[str, ...]] = {
    "chat": ("messages", "prompt", "response", "system", "text"),
    "classify": ("text", "label"),
    "preferences": ("prompt", "chosen", "rejected", "margin", "system", "responses", "ranks"),
}


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
PAIR = {"chosen": "chosen", "rejected": "rejected"}
MORE_OF_PAIR = {**MORE, "margin": "margin"}
PAIR_LAYOUTS = (
    Layout({"prompt": "prompt", **PAIR}, MORE_OF_PAIR),
    Layout(
        {"prompt": "instruction", **PAIR},
        {**MORE_OF_PAIR, "input": "input", "history": "history"},
    ),
    Layout({"prompt": "question", **PAIR}, MORE_OF_PAIR),
    Layout(PAIR, MORE_OF_PAIR),
)
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
        Layout({"prompt": "prompt", "response": "chosen"}, MORE),
        Layout({"text": "text"}, {}),
    ),
    "classify": (Layout({"text": "text", "label": "label"}, {}),),
    "preferences": (
        *PAIR_LAYOUTS,
        Layout({"prompt": "prompt", "responses": "responses", "ranks": "ranks"}, MORE),
    ),
}
WAYS: dict[Task, tuple[tuple[str, ...], ...]] = {
    "chat": (("messages",), ("text",), ("prompt", "response")),
    "classify": (("text", "label"),),
    "preferences": (
        ("responses", "ranks", "prompt"),
        ("prompt", "chosen", "rejected"),
    ),
}
"""Roles that `--columns` may tell: the first of which it names the first, else the last."""


def choose_layouts(columns: Sequence[str], task: Task) -> tuple[Layout, ...]:
    """The layouts to look for: those there are, or the one that `--columns` tells.

    Raises:
        UserError: columns that make no sense.
    """
    given = _roles(columns, task)
    if not given:
        return LAYOUTS[task]
    *ways, last = WAYS[task]
    needed = next((names for names in ways if given.keys() & set(names) - {"prompt"}), last)
    more = {} if "text" in needed else MORE_OF_PAIR if "rejected" in needed else MORE
    if extra := [role for role in given if role not in needed and role not in more]:
        raise UserError(f"--columns: `{extra[0]}` does not go with `{needed[0]}`")
    found = Layout({**{role: role for role in needed}, **given}, more)
    if "rejected" not in needed or "prompt" in given:
        return (found,)
    without = {role: column for role, column in found.needed.items() if role != "prompt"}
    return found, Layout(without, more)


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
            hint=f"it takes {', '.join(map(str, layouts[:-1]))} or {layouts[-1]}; "
            f"else {_how(layouts[0])}",
        )
    needed = (known or layouts[0]).needed
    missing = next(column for column in needed.values() if column not in row)
    raise DataError(f"no column `{missing}`; there is {there}", hint=_how(layouts[0]))


def _how(layout: Layout) -> str:
    """How to name the columns of a task, of which this is a layout."""
    task = next(task for task, roles in ROLES.items() if set(roles) >= layout.needed.keys())
    return "name the columns: --columns " + ",".join(f"{role}=NAME" for role in WAYS[task][-1])


def _roles(columns: Sequence[str], task: Task) -> dict[str, str]:
    """The column of each role that `--columns` gives."""
    roles = ROLES[task]
    given: dict[str, str] = {}
    for pair in (pair.strip() for text in columns for pair in text.split(",")):
        role, sign, column = pair.partition("=")
        if not (sign and column) or role in given:
            what = "given twice" if role in given else "expected ROLE=NAME"
            raise UserError(f"--columns {pair}: {what}", hint="such as prompt=q,response=a")
        if role not in roles:
            where = "of preferences" if task == "preferences" else f"in --task {task}"
            raise UserError(
                f"--columns {pair}: no role `{role}` {where}",
                hint=f"roles are {', '.join(roles)}",
            )
        given[role] = column
    return given
