"""Figures of an evaluation: a table of them on stderr, and the gates that they must keep."""

import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from llmctl.config.gates import Gate, split_gate
from llmctl.console import log
from llmctl.errors import GateError, UserError
from llmctl.numbers import cell, is_number

COMPARISON = "comparison"
"""Key of the numbers of answers that were compared as numbers, and as text."""
NO_FIGURES = ("stage", "out", "model", "status", "rows", "compare", "differences", COMPARISON)
"""Keys of a result that hold something else."""


def show_table(result: Mapping[str, Any]) -> None:
    """Print the figures on stderr, of two models side by side where there are two.

    Below them it says how answers were compared.
    """
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
    differences: Mapping[str, Any] = result.get("differences") or {}
    for name, value in figures_in(result).items():
        cells = [cell(value)]
        if other:
            theirs = other.get(name)
            cells += ["" if theirs is None else cell(theirs)]
            interval = differences.get(name) or {}
            cells.append(f"{interval['difference']:+.4g}" if interval else "")
            low, high = interval.get("low"), interval.get("high")
            cells.append("" if low is None else f"{low:+.4g} to {high:+.4g}")
        table.add_row(name, *cells)
    Console(stderr=True, highlight=False).print(table)
    for name, side in ((str(result["model"]), result), (str(other.get("model")), other)):
        if side.get(COMPARISON):
            ways = " and ".join(f"{count:,} as {way}" for way, count in side[COMPARISON].items())
            log.info("%s: answers were compared with their references, %s", name, ways)


def figures_in(result: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a result, without its other keys."""
    return {name: value for name, value in result.items() if name not in NO_FIGURES}


def require_known(require: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a gate on a figure that the evaluation does not give.

    Raises:
        UserError: naming those that it gives.
    """
    for text, gate in zip(require, _gates(require), strict=True):
        if gate.figure not in names:
            close = difflib.get_close_matches(gate.figure, names, n=1)
            raise UserError(
                f"--require {text}: there is no figure `{gate.figure}` here",
                hint=f"did you mean {close[0]}?" if close else f"there is {', '.join(names)}",
            )


def check_gates(require: Sequence[str], result: Mapping[str, Any]) -> None:
    """Refuse an evaluation that does not keep its gates; a difference is `difference/exact`.

    Raises:
        GateError: naming each gate and the figure.
    """
    differences: Mapping[str, Any] = result.get("differences") or {}
    figures = {
        **figures_in(result),
        **{f"difference/{name}": entry["difference"] for name, entry in differences.items()},
    }
    require_known(require, [name for name, value in figures.items() if is_number(value)])
    broken = [
        f"{gate.figure} is {figures[gate.figure]:.6g}, required {gate.sign} {gate.bound:g}"
        for gate in _gates(require)
        if not gate.holds(figures[gate.figure])
    ]
    if broken:
        raise GateError("; ".join(broken))


def _gates(require: Sequence[str]) -> list[Gate]:
    """Gates of texts that the config has found to be some."""
    return [gate for text in require if (gate := split_gate(text)) is not None]
