"""Draw which run fed which: runs in, boxes and arrows out, lying for a wide page or upright.

A run stands one column after the last of its inputs. The runs whose models led to the last run
stand in one row, the others beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmctl.reporting.records import RunRecord, clean
from llmctl.reporting.tables import key_figures
from llmctl.runs.lineage import LineageStep, RunInput, lineage_of, portable

SPINE = ("model", "base", "tokens", "adapter", "tokenizer")
"""Roles of inputs that are a model or become one."""
BOX = (164, 66)
GAP = (34, 18)
"""Between boxes: along the flow and across it."""
EDGE = 2
BRIEF = {"Validation loss": "nats held out", "Wins against the reference": "wins"}
LETTERS = 22
"""Characters that fit into a box."""


@dataclass(frozen=True)
class Box:
    """One run, or a model from elsewhere."""

    stage: str
    name: str
    figure: str = ""
    detail: str = ""
    state: str = "elsewhere"
    link: str = ""
    """Anchor of the run's section; empty where it has none."""
    parents: tuple[str, ...] = ()
    model_parents: tuple[str, ...] = ()
    """Parents whose model it takes."""
    x: int = 0
    y: int = 0


@dataclass(frozen=True)
class Graph:
    """A drawing."""

    width: int
    height: int
    boxes: tuple[Box, ...]
    arrows: tuple[str, ...]


def graphs(records: Sequence[RunRecord]) -> tuple[Graph, Graph] | None:
    """Draw runs and their inputs, lying and upright; None where nothing is connected."""
    nodes = _nodes(records)
    if len(nodes) < 2 or not any(node.parents for node in nodes.values()):
        return None
    places = _places(nodes)
    return _drawn(nodes, places, is_upright=False), _drawn(nodes, places, is_upright=True)


def edges(records: Sequence[RunRecord]) -> tuple[list[tuple[str, str]], list[tuple[int, int]]]:
    """Return stage and name of every node, and pairs of their places, parent first."""
    nodes = _nodes(records)
    order = {key: place for place, key in enumerate(nodes)}
    pairs = [
        (order[p], order[key]) for key, node in nodes.items() for p in node.parents if p in order
    ]
    return [(node.stage, node.name) for node in nodes.values()], pairs


def _nodes(records: Sequence[RunRecord]) -> dict[str, Box]:
    """Return every run of the report and of their lineages, and external models, parents first."""
    shown = {str(record.path.resolve()): record for record in records}
    nodes: dict[str, Box] = {}
    for record in records:
        for step in lineage_of(record.path, record.manifest):
            key = str(step.path.resolve())
            if key not in nodes:
                nodes |= {k: box for k, box in _external(step).items() if k not in nodes}
                nodes[key] = _box(step, shown.get(key))
    return nodes


def _box(step: LineageStep, record: RunRecord | None) -> Box:
    roles = {_key(item): item.role for item in step.inputs if item.run or not item.is_data}
    data = [item.path for item in step.inputs if item.run is None and item.is_data]
    more = f" +{len(data) - 1}" if len(data) > 1 else ""
    return Box(
        stage=clean(str(step.manifest.get("stage"))),
        name=record.name if record else clean(step.path.absolute().name),
        figure=_figure(record) if record else "",
        detail=clean(portable(data[0]).rpartition("/")[2]) + more if data else "",
        state=record.state if record else "elsewhere",
        link=f"stage-{record.stage}" if record else "",
        parents=tuple(roles),
        model_parents=tuple(key for key, role in roles.items() if role in SPINE),
    )


def _key(item: RunInput) -> str:
    return str(item.run.resolve()) if item.run else f"outside:{item.path}"


def _figure(record: RunRecord) -> str:
    """Return the first key figure of a run; its state where it did not complete."""
    if record.state not in ("completed", "running"):
        return record.state
    first = next(iter(key_figures(record)), None)
    if first is None:
        return ""
    return f"{first.value} {BRIEF.get(first.label, first.label.partition(',')[0].lower())}"


def _external(step: LineageStep) -> dict[str, Box]:
    """Return the models that no run on this disk made."""
    return {
        _key(item): Box(item.role.replace("_", " "), clean(portable(item.path)))
        for item in step.inputs
        if item.run is None and not item.is_data
    }


def _places(nodes: dict[str, Box]) -> dict[str, tuple[int, int]]:
    """Return column and row of every node; the longest line stands in the first row."""
    columns: dict[str, int] = {}
    for key, node in nodes.items():  # parents come first
        columns[key] = max((columns[p] + 1 for p in node.parents if p in columns), default=0)
    last = max(reversed(nodes), key=lambda key: columns[key])
    line = _line_to(last, nodes, columns)
    taken = {(column, 0) for column in range(columns[line[-1]], columns[last] + 1)}
    places = {key: (columns[key], 0) for key in line}
    for key, node in nodes.items():
        if key not in places:
            rows = [places[p][1] for p in node.parents if p in places]
            row = min(rows, default=1 + max(row for _, row in taken))
            while (columns[key], row) in taken:
                row += 1
            places[key] = (columns[key], row)
            taken.add(places[key])
    return places


def _line_to(last: str, nodes: dict[str, Box], columns: dict[str, int]) -> list[str]:
    """Return a run, then the one that its model comes from, and so on, by the longest way."""
    line = [last]
    while earlier := [
        key
        for key in nodes[line[-1]].model_parents or nodes[line[-1]].parents
        if columns.get(key, columns[line[-1]]) < columns[line[-1]]
    ]:
        line.append(max(earlier, key=lambda key: columns[key]))
    return line


def _drawn(nodes: dict[str, Box], places: dict[str, tuple[int, int]], *, is_upright: bool) -> Graph:
    width, height = BOX
    along, across = (height + GAP[0], width + GAP[1]) if is_upright else (
        width + GAP[0], height + GAP[1])  # fmt: skip

    def corner(key: str) -> tuple[int, int]:
        column, row = places[key]
        flow, side = EDGE + column * along, EDGE + row * across
        return (side, flow) if is_upright else (flow, side)

    boxes = []
    for key, node in nodes.items():
        x, y = corner(key)
        room = min(16, int((width - 28 - 7.9 * len(node.stage)) / 7))  # beside the stage in bold
        name, figure, detail = _fit(node.name, room), _fit(node.figure), _fit(node.detail)
        boxes.append(replace(node, x=x, y=y, name=name, figure=figure, detail=detail))
    arrows = tuple(
        _arrow(corner(parent), corner(key), is_upright)
        for key, node in nodes.items()
        for parent in node.parents
        if parent in places
    )
    right = max(box.x for box in boxes) + width + EDGE
    return Graph(right, max(box.y for box in boxes) + height + EDGE, tuple(boxes), arrows)


def _arrow(start: tuple[int, int], end: tuple[int, int], is_upright: bool) -> str:
    """Draw a curve from one box's side to the facing side of another, short of the tip."""
    width, height = BOX
    if is_upright:
        x1, y1, x2, y2 = start[0] + width // 2, start[1] + height, end[0] + width // 2, end[1] - 5
        middle = (y1 + y2) / 2
        return f"M{x1} {y1}C{x1} {middle:g} {x2} {middle:g} {x2} {y2}"
    x1, y1, x2, y2 = start[0] + width, start[1] + height // 2, end[0] - 5, end[1] + height // 2
    middle = x2 - GAP[0] / 2
    return f"M{x1} {y1}C{middle:g} {y1} {middle:g} {y2} {x2} {y2}"


def _fit(text: str, most: int = LETTERS) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
