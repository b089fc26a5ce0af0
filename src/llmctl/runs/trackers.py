"""Trackers: TensorBoard, Trackio and W&B, all fed from the stream of metrics.jsonl.

In: rows as they are written there, and how the run ended. Out: what each tracker keeps, written by
accelerate's tracker classes. TensorBoard's files stand in the run's directory; the others keep
theirs where they always do. A tracker that fails is left with a warning: it never ends a run.
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
POSITION = ("step", "time")
"""Fields of a row that say where it stands; they are no metrics."""

Row = Mapping[str, Any]
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Tracker:
    """One tracker at work."""

    name: str
    record: dict[str, Any]
    """Kept in the manifest, to continue the same run of the tracker's."""

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
        """Open the trackers where training begins or continues; return what the manifest keeps.

        `run_id` names the run to trackers that have not seen it, `known` is what an earlier call
        returned, and `rows` are the metrics that stand, without those after the checkpoint that a
        run resumes from.
        """
        openers = {EVENTS: _tensorboard, "trackio": _trackio, "wandb": _wandb}
        for name in self.names:
            tracker = _safely(
                name, openers[name], self.path, self.recipe, run_id, known.get(name, {}), rows
            )
            if tracker is not None:
                self.working.append(tracker)
                where = ", ".join(f"{key} {value}" for key, value in tracker.record.items())
                log.info("%s: %s", name, where)
        return {**known, **{tracker.name: tracker.record for tracker in self.working}}

    def log(self, row: Row) -> None:
        """Pass a row on to each tracker."""
        for tracker in list(self.working):
            if _safely(tracker.name, tracker.log, row) is None:
                self.working.remove(tracker)

    def finish(self, result: Row, code: int) -> None:
        """Report how the run ended, and wait until each tracker has it all."""
        for tracker in self.working:
            _safely(tracker.name, tracker.finish, result, code)
        self.working.clear()


def requested_trackers(config: StageConfig, stage: str, path: Path | None) -> Tracking | None:
    """Return a command's trackers, not yet at work; raise a ResourceError if one is missing."""
    names: list[str] = dict(config).get("report_to", [])
    for name in names:
        require_extra(name, name, f"--report-to {name}")
    return Tracking(names, path, config.recipe(stage)) if names and path else None


def _safely(name: str, call: Callable[..., Outcome], *arguments: Any) -> Outcome | None:
    """Return what `call` does, None with a warning where it fails; keep stdout for the result."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return call(*arguments)
    except (Exception, SystemExit) as error:  # what trackers raise must not end a run
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning("%s failed, and the run goes on without it: %s", name, reason)
        return None


def _metrics(row: Row, prefix: str = "") -> dict[str, float]:
    """Return the numbers of a row, without those that say where it stands."""
    return {
        f"{prefix}{name}": value
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in POSITION
    }


def _tensorboard(
    path: Path, recipe: dict[str, Any], _: str, __: Mapping[str, Any], rows: Sequence[Row]
) -> Tracker:
    """Write event files anew from the metrics that stand, so that no step is there twice.

    Their times are those of training, not TensorBoard's clock.
    """
    from accelerate.tracking import TensorBoardTracker
    from tensorboard.plugins.text.summary_v2 import text_pb

    shutil.rmtree(path / EVENTS, ignore_errors=True)
    tracker = _started(TensorBoardTracker(EVENTS, path))
    began = time.time() - (float(rows[-1].get("time", 0)) if rows else 0.0)
    last = 0

    def write_text(tag: str, content: dict[str, Any], wall_time: float) -> None:
        shown = "\n".join(f"    {line}" for line in json.dumps(content, indent=2).splitlines())
        tracker.writer.file_writer.add_summary(text_pb(tag, shown), last, wall_time)

    def log_row(row: Row) -> bool:
        nonlocal last
        last = int(row.get("step", last))
        tracker.log(_metrics(row), step=last, walltime=began + float(row.get("time", 0)))
        return True

    def finish(result: Row, _: int) -> bool:
        if result:
            tracker.log(_metrics(result, "final/"), step=last)
            write_text("result", dict(result), time.time())
        tracker.finish()
        return True

    write_text("recipe", recipe, began)
    for row in rows:
        log_row(row)
    return Tracker(EVENTS, {"path": EVENTS}, log_row, finish)


def _trackio(
    path: Path, recipe: dict[str, Any], run_id: str, known: Mapping[str, Any], rows: Sequence[Row]
) -> Tracker:
    """Open a run in Trackio's own database, or on the Space that TRACKIO_SPACE_ID names.

    A local database is written anew from the metrics that stand. A Space keeps what it has: steps
    done again come twice there.
    """
    import trackio
    from accelerate.tracking import TrackioTracker

    name = str(known.get("run") or f"{path.absolute().name}-{run_id[:8]}")
    project = str(known.get("project") or os.environ.get("TRACKIO_PROJECT") or PROJECT)
    is_local = not (os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"))
    if known and is_local:
        for earlier in trackio.Api().runs(project):
            if earlier.name == name:
                earlier.delete()
    quiet = {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
    tracker = _started(TrackioTracker(project, name=name, config=recipe, resume="allow", **quiet))
    last = 0

    def log_row(row: Row) -> bool:
        nonlocal last
        last = int(row.get("step", last))
        tracker.log(_metrics(row), step=last)
        return True

    def finish(result: Row, _: int) -> bool:
        if metrics := _metrics(result, "final/"):
            tracker.log(metrics, step=last)
        trackio.finish()
        return True

    for row in rows if is_local or not known else []:
        log_row(row)
    return Tracker("trackio", {"project": project, "run": name}, log_row, finish)


def _wandb(
    path: Path, recipe: dict[str, Any], run_id: str, known: Mapping[str, Any], rows: Sequence[Row]
) -> Tracker:
    """Open a run of W&B's, offline where the Hub is switched off too, or nobody is logged in.

    A resumed run continues under the same id. It is given the metrics that stand: those that a kill
    kept from W&B are then there, and its server passes over steps that it has.
    """
    import wandb
    from accelerate.tracking import WandBTracker

    id_ = str(known.get("id") or run_id)
    project = str(known.get("project") or os.environ.get("WANDB_PROJECT") or PROJECT)
    settings = wandb.Settings(
        silent=True,
        console="off",
        init_timeout=SECONDS_TO_START,
        disable_git=True,
        disable_code=True,
        x_disable_meta=True,  # the command line, which may hold a secret
        x_disable_stats=True,
    )
    hooks = sys.exit, sys.excepthook  # W&B's would show a traceback with the secrets in it
    try:
        tracker = _started(
            WandBTracker(
                project,
                id=id_,
                name=path.absolute().name,
                config=recipe,
                mode=_wandb_mode(),
                resume="allow",
                settings=settings,
            )
        )
    finally:
        sys.exit, sys.excepthook = hooks

    def log_row(row: Row) -> bool:
        tracker.log(_metrics(row), step=int(row.get("step", 0)))
        return True

    def finish(result: Row, code: int) -> bool:
        tracker.run.summary.update(dict(result))
        tracker.run.finish(exit_code=code)
        wandb.teardown()  # `finish` does not wait for the file, which W&B's own process writes
        return True

    for row in rows:
        log_row(row)
    record = {"project": project, "id": id_, "folder": tracker.run.dir}
    return Tracker("wandb", record, log_row, finish)


def _started(tracker: Any) -> Any:
    """Start one of accelerate's trackers, in this process whatever its rank: ours is the main."""
    tracker.main_process_only = False
    tracker.start()
    return tracker


def _wandb_mode() -> Any:
    """Return W&B's mode: as WANDB_MODE says, else online where that can be."""
    import wandb

    if mode := os.environ.get("WANDB_MODE"):
        return mode
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in OFF:
        return "offline"
    if wandb.login(prompt=False):
        return "online"
    log.warning("wandb: nobody is logged in (wandb login), so it runs offline")
    return "offline"
