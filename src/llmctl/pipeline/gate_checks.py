"""Quality gates of a recipe: parse them, refuse those on unknown metrics, check a result."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from llmctl import metrics
from llmctl.config.gates import SIGNS, Gate, parse_gate
from llmctl.errors import GateError, UserError, did_you_mean
from llmctl.numbers import is_number


@dataclass(frozen=True)
class GateResult:
    """A gate, the value that it was checked against, and whether it holds."""

    gate: Gate
    value: float
    holds: bool

    def as_json(self) -> dict[str, Any]:
        """For pipeline.json and `--json`."""
        return {**asdict(self.gate), "value": self.value, "holds": self.holds}


def parse_gates(values: Mapping[str, Any], file: Path, line: int | None) -> tuple[Gate, ...]:
    """Parse the gates of a stage: metric -> `>=0.9`.

    Raises:
        UserError: a value that is no comparison with a number.
    """
    gates = []
    for name, text in values.items():
        gate = parse_gate(name, str(text))
        if gate is None:
            metric = metrics.find(name)
            sign = "<=" if metric and metric.better == "lower" else ">="
            raise UserError(
                f"gates: {name}: expected a sign and a number, got {text!r}",
                file=file,
                line=line,
                hint=f'such as {name}: "{sign}0.9"; signs are {", ".join(SIGNS)}',
            )
        gates.append(gate)
    return tuple(gates)


def require_known_metrics(gates: Sequence[Gate], stage: str, file: Path, line: int | None) -> None:
    """Refuse gates on metrics that the stage's result never has.

    Some come only where the recipe asks for them: those are missed once the stage has ended.

    Raises:
        UserError: naming the metric, and the one that may be meant.
    """
    known = metrics.result_names(stage)
    for gate in gates:
        if not any(fnmatchcase(gate.figure, pattern) for pattern in known):
            close = did_you_mean(gate.figure, known)
            raise UserError(
                f"gates: `{stage}` gives no figure `{gate.figure}`{close}",
                file=file,
                line=line,
                hint=f"it can give {', '.join(known)}" if known else "it gives no figures",
            )


def check_gates(gates: Sequence[Gate], result: Mapping[str, Any]) -> tuple[GateResult, ...]:
    """Check every gate against a stage's result.

    Raises:
        GateError: the result has no such metric.
    """
    values = dict(flatten(result))
    for gate in gates:
        if gate.figure not in values:
            close = did_you_mean(gate.figure, list(values))
            raise GateError(
                f"gate `{gate}`: the stage gave no figure of that name{close}",
                hint=f"it gave {', '.join(list(values)[:12])}",
            )
    return tuple(
        GateResult(gate, values[gate.figure], gate.holds(values[gate.figure])) for gate in gates
    )


def flatten(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number of a result, those of nested objects as `outer.inner`."""
    for key, item in result.items():
        if is_number(item):
            yield prefix + key, float(item)
        elif isinstance(item, Mapping):
            yield from flatten(item, f"{prefix}{key}.")
