"""What must hold of an evaluation: `exact>=0.9` in, a refusal out where it does not."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmctl.config.commands.evaluate import GATE
from llmctl.errors import GateError, UserError

HOLDS = {
    ">=": lambda value, bound: value >= bound,
    "<=": lambda value, bound: value <= bound,
    ">": lambda value, bound: value > bound,
    "<": lambda value, bound: value < bound,
}


def require_known(require: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a gate on a figure that will not be there.

    Raises:
        UserError: with those that will.
    """
    for text in require:
        name = _parts(text)[0]
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            raise UserError(
                f"--require {text}: there is no figure `{name}` here",
                hint=f"did you mean {close[0]}?" if close else f"there is {', '.join(names)}",
            )


def check_gates(require: Sequence[str], figures: Mapping[str, Any]) -> None:
    """Refuse an evaluation of which something does not hold.

    Raises:
        GateError: naming each gate and the figure.
    """
    require_known(require, [name for name, value in figures.items() if _is_number(value)])
    broken = []
    for text in require:
        name, sign, bound = _parts(text)
        value = float(figures[name])
        if math.isnan(value) or not HOLDS[sign](value, bound):
            broken.append(f"{name} is {value:.6g}, required {sign} {bound:g}")
    if broken:
        raise GateError("; ".join(broken))


def _parts(text: str) -> tuple[str, str, float]:
    found = GATE.fullmatch(text)
    assert found is not None, "the config has looked at it"
    return found["name"], found["sign"], float(found["bound"])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
