"""Quality gates: what a recipe demands of a stage's figures, and whether it holds."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmctl.config.gates import SIGNS, Gate, parse_gate
from llmctl.errors import GateError, UserError


@dataclass(frozen=True)
class Verdict:
    """A gate, and the figure that was found."""

    gate: Gate
    value: float
    holds: bool

    def as_json(self) -> dict[str, Any]:
        """For pipeline.json and `--json`."""
        return {**asdict(self.gate), "value": self.value, "holds": self.holds}


def parse_gates(values: Mapping[str, Any], file: Path, line: int | None) -> tuple[Gate, ...]:
    """The gates of a stage: figure -> `>=0.9`.

    Raises:
        UserError: what is no comparison with a number.
    """
    gates = []
    for figure, text in values.items():
        gate = parse_gate(figure, str(text))
        if gate is None:
            raise UserError(
                f"gates: {figure}: expected a sign and a number, got {text!r}",
                file=file,
                line=line,
                hint=f'such as {figure}: ">=0.9"; signs are {", ".join(SIGNS)}',
            )
        gates.append(gate)
    return tuple(gates)


def judge(gates: tuple[Gate, ...], result: Mapping[str, Any]) -> tuple[Verdict, ...]:
    """Every gate against a stage's result.

    Raises:
        GateError: the result has no such figure.
    """
    found = dict(figures(result))
    for gate in gates:
        if gate.figure not in found:
            close = difflib.get_close_matches(gate.figure, list(found), n=1)
            raise GateError(
                f"gate `{gate}`: the stage gave no figure of that name"
                + (f": did you mean `{close[0]}`?" if close else ""),
                hint=f"it gave {', '.join(list(found)[:12])}",
            )
    return tuple(
        Verdict(gate, found[gate.figure], gate.holds(found[gate.figure])) for gate in gates
    )


def figures(value: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a result, those of inner objects as `outer.inner`."""
    for key, item in value.items():
        if isinstance(item, bool):
            continue
        if isinstance(item, int | float):
            yield before + key, float(item)
        elif isinstance(item, Mapping):
            yield from figures(item, f"{before}{key}.")
