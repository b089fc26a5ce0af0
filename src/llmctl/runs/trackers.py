"""Trackers: TensorBoard, Trackio and W&B, all fed from the stream of metrics.jsonl.

In: rows as they are written there, and how the run ended. Out: what each tracker keeps.
TensorBoard's files stand in the run's directory; the others keep theirs where they always do. A
tracker that fails is left with a warning: it never ends a run.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from llmctl.config.sections import StageConfig
from llmctl.console import log
from llmctl.errors import require_extra
from llmctl.runs.ownership import EVENTS

PROJECT = "llmctl"
OFF = ("1", "ON", "YES", "TRUE")
SECONDS_TO_START = 30
NO_FIGURES = ("step", "time")

Row = Mapping[str, Any]
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Tracker:
    """One tracker at work."""

    name: str
    facts: dict[str, Any]
    """What the manifest keeps, to go on with the same run of the tracker's."""

    log: Callable[[Row], bool]
    finish: Callable[[Row, int], bool]
    """Takes the run's result, empty if it has none, and its exit code."""


@dataclass
class Tracking:
    """The trackers of one run."""

    names: Iterable[str]
    path: Path
    recipe: dict[str, Any]
    """The run's settings, without secrets."""

    working: list[Tracker] = field(default_factory=list)

    def start(self, run_id: str, known: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
        """Open them, where training begins or goes on; return what the manifest should keep.

        Args:
            run_id: names the run to trackers that have not seen it.
            known: what an earlier call returned.
            rows: of the metrics that stand: what came after a resumed checkpoint is not among them.
        """
        openers = {EVENTS: _tensorboard, "trackio": _trackio, "wandb": _wandb}
        for name in self.names:
            opened = _safely(
                name, openers[name], self.path, self.recipe, run_id, known.get(name, {}), rows
            )
            if opened is not None:
                self.working.append(opened)
                where = ", ".join(f"{key} {value}" for key, value in opened.facts.items())
                log.info("%s: %s", name, where)
        return {**known, **{tracker.name: tracker.facts for tracker in self.working}}

    def log(self, row: Row) -> None:
        """Pass a row on."""
        for tracker in list(self.working):
            if _safely(tracker.name, tracker.log, row) is None:
                self.working.remove(tracker)

    def finish(self, result: Row, code: int) -> None:
        """Say how the run ended, and wait until each tracker has it all."""
        for tracker in self.working:
            _safely(tracker.name, tracker.finish, result, code)
        self.working.clear()


def requested_trackers(config: StageConfig, stage: str, path: Path | None) -> Tracking | None:
    """The trackers that a command is to report to, not yet at work; None without any.

    Raises:
        ResourceError: one is not installed; with what to type.
    """
    names: list[str] = dict(config).get("report_to", [])
    for name in names:
        require_extra(name, name, f"--report-to {name}")
    return Tracking(names, path, config.recipe(stage)) if names and path else None


def _safely(name: str, do: Callable[..., Outcome], *given: Any) -> Outcome | None:
    """What `do` returns, None with a warning where it fails; stdout is the run's alone."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return do(*given)
    except Exception as error:  # trackers raise what they like, and none of it may end a run
        said = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning("%s failed, and the run goes on without it: %s", name, said)
        return None


def _figures(row: Row, prefix: str = "") -> dict[str, float]:
    """The numbers of a row, without those that say where it stands."""
    return {
        f"{prefix}{name}": value
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in NO_FIGURES
    }


def _tensorboard(
    path: Path, recipe: dict[str, Any], _: str, __: Mapping[str, Any], rows: Sequence[Row]
) -> Tracker:
    """Event files, written anew from the metrics that stand: what is done again is not there twice.

    TensorBoard draws times from its own clock; here they are those of training.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    folder = path / EVENTS
    shutil.rmtree(folder, ignore_errors=True)
    writer = EventFileWriter(str(folder))
    began = time.time() - (float(rows[-1].get("time", 0)) if rows else 0.0)
    last = [0]

    def write(values: list[Any], step: int, wall_time: float) -> None:
        event = Event(step=step, wall_time=wall_time, summary=Summary(value=values))
        writer.add_event(event)

    def log_row(row: Row) -> None:
        last[0] = int(row.get("step", last[0]))
        figures = _figures(row)
        values = [Summary.Value(tag=tag, simple_value=figures[tag]) for tag in figures]
        write(values, last[0], began + float(row.get("time", 0)))

    def live(row: Row) -> bool:
        log_row(row)
        writer.flush()
        return True

    def finish(result: Row, _: int) -> bool:
        figures = _figures(result, "final/")
        values = [Summary.Value(tag=tag, simple_value=figures[tag]) for tag in figures]
        if result:
            write([*values, _text("result", dict(result))], last[0], time.time())
        writer.close()
        return True

    write([_text("recipe", recipe)], 0, began)
    for row in rows:
        log_row(row)
    writer.flush()
    return Tracker(EVENTS, {"path": EVENTS}, live, finish)


def _text(tag: str, content: dict[str, Any]) -> Any:
    """A summary that TensorBoard shows as text: an object as JSON, in a block of code."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto

    shown = "\n".join(f"    {line}" for line in json.dumps(content, indent=2).splitlines())
    return Summary.Value(
        tag=tag,
        metadata=SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text")),
        tensor=TensorProto(dtype="DT_STRING", string_val=[shown.encode()]),
    )


def _trackio(
    path: Path, recipe: dict[str, Any], run_id: str, known: Mapping[str, Any], rows: Sequence[Row]
) -> Tracker:
    """A run in Trackio's own database, or on the Space that TRACKIO_SPACE_ID names.

    In a local database it is written anew from the metrics that stand. What a Space has stays:
    steps done again come twice there.
    """
    import trackio

    name = str(known.get("run") or f"{path.absolute().name}-{run_id[:8]}")
    project = str(known.get("project") or os.environ.get("TRACKIO_PROJECT") or PROJECT)
    local = not (os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"))
    if known and local:
        for earlier in trackio.Api().runs(project):
            if earlier.name == name:
                earlier.delete()
    run = trackio.init(
        project,
        name=name,
        config=recipe,
        resume="allow",
        embed=False,
        auto_log_cpu=False,
        auto_log_gpu=False,
    )
    last = [0]

    def log_row(row: Row) -> bool:
        last[0] = int(row.get("step", last[0]))
        run.log(_figures(row), step=last[0])
        return True

    def finish(result: Row, _: int) -> bool:
        if figures := _figures(result, "final/"):
            run.log(figures, step=last[0])
        trackio.finish()
        return True

    for row in rows if local or not known else []:
        log_row(row)
    return Tracker("trackio", {"project": project, "run": name}, log_row, finish)


def _wandb(
    path: Path, recipe: dict[str, Any], run_id: str, known: Mapping[str, Any], rows: Sequence[Row]
) -> Tracker:
    """A run of W&B's, offline where the Hub is switched off too, or nobody is logged in.

    A resumed one goes on under the same id. It is given the metrics that stand: what a kill kept
    from W&B is then there, and steps that its server has it passes over.
    """
    import wandb

    id_ = str(known.get("id") or run_id)
    project = str(known.get("project") or os.environ.get("WANDB_PROJECT") or PROJECT)
    hooks = sys.exit, sys.excepthook  # W&B's would show a traceback with the secrets in it
    try:
        run = wandb.init(
            project=project,
            id=id_,
            name=path.absolute().name,
            config=recipe,
            mode=_wandb_mode(),
            resume="allow",
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=SECONDS_TO_START,
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,  # the command line, which may hold a secret
                x_disable_stats=True,
            ),
        )
    finally:
        sys.exit, sys.excepthook = hooks

    def log_row(row: Row) -> bool:
        run.log(_figures(row), step=int(row.get("step", 0)))
        return True

    def finish(result: Row, code: int) -> bool:
        run.summary.update(dict(result))
        run.finish(exit_code=code)
        return True

    for row in rows:
        log_row(row)
    return Tracker("wandb", {"project": project, "id": id_, "folder": run.dir}, log_row, finish)


def _wandb_mode() -> Any:
    """How W&B should run: as WANDB_MODE says, else online where that can be."""
    import wandb

    if mode := os.environ.get("WANDB_MODE"):
        return mode
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in OFF:
        return "offline"
    if wandb.login(prompt=False):
        return "online"
    log.warning("wandb: nobody is logged in (wandb login), so it runs offline")
    return "offline"
