"""What an evaluation says: a table on stderr, lines or an object on stdout."""

import logging
from collections.abc import Mapping
from typing import Any

from llmctl.console import log

HIDDEN = ("stage", "out", "model", "status", "rows", "compare", "differences")


def show_table(result: Mapping[str, Any]) -> None:
    """Print the figures on stderr, of two models side by side where there are two."""
    if not log.isEnabledFor(logging.INFO):
        return
    from rich.console import Console
    from rich.table import Table

    other: Mapping[str, Any] = result.get("compare") or {}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("figure")
    heads = [str(result["model"]), *([str(other["model"]), "difference", "95 %"] if other else [])]
    for head in heads:
        table.add_column(head, justify="right", overflow="fold")
    apart: Mapping[str, Any] = result.get("differences") or {}
    for name, value in figures_in(result).items():
        cells = [_number(value)]
        if other:
            cells += [_number(other.get(name)), *_difference(apart.get(name))]
        table.add_row(name, *cells)
    Console(stderr=True, highlight=False).print(table)


def figures_in(result: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a result, without what else it says."""
    return {name: value for name, value in result.items() if name not in HIDDEN}


def gated(result: Mapping[str, Any]) -> dict[str, float]:
    """The figures that `--require` can name; a difference is `difference/exact`."""
    apart: Mapping[str, Any] = result.get("differences") or {}
    found = {f"difference/{name}": facts["difference"] for name, facts in apart.items()}
    return {**figures_in(result), **found}


def _difference(facts: Mapping[str, Any] | None) -> tuple[str, str]:
    if facts is None:
        return "", ""
    low, high = facts["low"], facts["high"]
    between = "" if low is None else f"{low:+.4g} to {high:+.4g}"
    return f"{facts['difference']:+.4g}", between


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
