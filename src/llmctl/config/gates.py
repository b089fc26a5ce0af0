"""Quality gates: `exact>=0.9` of `--require`, or a figure and `>=0.9` of a recipe's `gates`.

In: text. Out: a `Gate`, which says whether a value holds.
"""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

SIGNS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
}
COMPARISON = re.compile(r"\s*(>=|<=|==|>|<)\s*([-+.\deE]+)\s*")
FIGURE = re.compile(r"\s*([^<>=\s]+)")


@dataclass(frozen=True)
class Gate:
    """A figure and the bound that it must keep."""

    figure: str
    sign: str
    bound: float

    def __str__(self) -> str:
        """Spell the gate for messages."""
        return f"{self.figure} {self.sign} {self.bound:g}"

    def holds(self, value: float) -> bool:
        """Whether a value keeps the bound; NaN keeps none."""
        return SIGNS[self.sign](value, self.bound)


def parse_gate(figure: str, comparison: str) -> Gate | None:
    """Parse a sign and a number; None where the text is something else."""
    parts = COMPARISON.fullmatch(comparison)
    if parts is None:
        return None
    try:
        return Gate(figure, parts[1], float(parts[2]))
    except ValueError:  # such as 1.2.3
        return None


def split_gate(text: str) -> Gate | None:
    """Parse figure, sign and number in one text; None where it is something else."""
    name = FIGURE.match(text)
    return None if name is None else parse_gate(name[1], text[name.end() :])
