"""Run stages in order: skip what is unchanged, resume what broke, run anew what changed."""

import contextlib
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from llmctl.commands import report
from llmctl.config.commands.report import ReportConfig
from llmctl.config.sections import Stages
from llmctl.console import log
from llmctl.errors import GateError, OutputError, UserError, from_json
from llmctl.files import check_out, sha256_file, writing
from llmctl.pipeline.content_hash import content_hash
from llmctl.pipeline.gate_checks import GateResult, check_gates
from llmctl.pipeline.references import Stage
from llmctl.pipeline.status import (
    Action,
    PipelineStatus,
    choose_action,
    is_complete,
    open_status,
    read_status,
    result_of,
)
from llmctl.pipeline.view import StageView, show_gates
from llmctl.runs import lock
from llmctl.runs.directory import read_manifest
from llmctl.runs.ownership import made_directory, parse_object
from llmctl.signals import handled_by, signal_error

PAGE = "report.html"
ACTION_TEXTS: dict[Action, str] = {
    "begin": "starts",
    "resume": "goes on where it was",
    "replace": "runs anew",
    "skip": "unchanged, skipped",
}


class PipelineRunner:
    """The stages of a recipe in a directory, and which of them are wanted."""

    def __init__(
        self, stages: tuple[Stage, ...], out: Path, recipe: Path, config: Stages, command: str
    ) -> None:
        """Nothing is read or written yet."""
        self.stages, self.out, self.recipe, self.config = stages, out, recipe, config
        self.command = command
        self.addresses: dict[str, str] = {}
        """Content hash of each stage so far."""

    def actions(self, status: PipelineStatus) -> Iterator[tuple[Stage, Action | None]]:
        """Yield the action of each stage, None for one to be left as it is.

        The addresses of the stages before it must be known by the time it is asked for.

        Raises:
            OutputError: a stage that is to be left as it is, and is read, is not complete.
        """
        names = [stage.name for stage in self.stages]
        only, first = self.config.only, self.config.from_stage
        begin = names.index(first) if first else 0
        rerun: set[str] = set()
        for place, stage in enumerate(self.stages):
            entry = status.entry(stage)
            if place < begin or (only and stage.name != only):
                if entry and is_complete(stage, entry):  # whatever it was made from
                    self.addresses[stage.name] = str(entry.get("address"))
                yield stage, None
                continue
            self._require_inputs(stage)
            address = self.addresses[stage.name] = content_hash(stage, self.addresses)
            forced = self.config.overwrite or stage.name == first or bool(rerun & {*stage.inputs})
            if forced and (first or self.config.overwrite):
                rerun.add(stage.name)
            yield stage, choose_action(stage, address, entry, forced=forced)

    def has_work(self) -> bool:
        """Whether any stage is to run.

        Raises:
            OutputError: as `actions`.
        """
        actions = self.actions(read_status(self.out))
        return any(action not in (None, "skip") for _, action in actions)

    def to_check(self) -> tuple[Stage, ...]:
        """Return the stages that may run."""
        if self.config.only:
            return tuple(stage for stage in self.stages if stage.name == self.config.only)
        names = [stage.name for stage in self.stages]
        begin = names.index(self.config.from_stage) if self.config.from_stage else 0
        return self.stages[begin:]

    def run(self) -> dict[str, Any]:
        """Run the stages, and return the result of the whole.

        Raises:
            UserError: as the first stage that failed raised it.
        """
        read_status(self.out)  # refuses a directory that is one run
        page = self.out / PAGE
        if page.exists():
            check_out(page, overwrite=report.is_ours(page))
        with writing(self.out), made_directory(self.out), lock.locked(self.out):
            status = open_status(self.out, self.recipe, self.stages)
            view = StageView(self.stages)
            try:
                with view.shown():
                    self._run_all(status, view)
            except BaseException as error:
                _record_failure(status, error)
                show_gates(view.rows)
                if isinstance(error, GateError):
                    log.info("report: %s", write_page(self.out))
                if isinstance(error, UserError):
                    error.report = self._result(status, view)
                raise
            status.update(state="completed", exit_code=0)
            show_gates(view.rows)
            written = write_page(self.out)
        return {**self._result(status, view), "report": written}

    def _run_all(self, status: PipelineStatus, view: StageView) -> None:
        process_state = None
        for stage, action in self.actions(status):
            if action is None:
                view.end(stage.name, "left", {})
            elif action == "skip":
                self._skip(stage, status, view)
            else:
                from llmctl.pipeline.isolation import ProcessState  # torch, for stages that run

                process_state = process_state or ProcessState()
                with process_state.restored():
                    self._run_one(stage, action, status, view)

    def _skip(self, stage: Stage, status: PipelineStatus, view: StageView) -> None:
        result = result_of(stage, status.entry(stage))
        address = self.addresses[stage.name]
        status.update_stage(stage, address=address, state="completed", result=result)
        gates = _check_gates(stage, result, status)
        view.end(stage.name, "unchanged", result, gates)
        _require_gates(stage, gates)

    def _run_one(
        self, stage: Stage, action: Action, status: PipelineStatus, view: StageView
    ) -> None:
        """Run a stage, and write its status before and after."""
        view.begin(stage.name, ACTION_TEXTS[action])
        began = time.monotonic()
        replaces = {}
        if action != "resume":
            replaces["replaces"] = None if stage.is_file else read_manifest(stage.out).get("run_id")
        address = self.addresses[stage.name]
        status.update_stage(stage, address=address, state="running", error=None, **replaces)
        try:
            result = _run_stage(stage, action)
        except BaseException as error:
            signalled = signal_error(error)
            state = "preempted" if signalled else "failed"
            status.update_stage(stage, state=state, error=str(signalled or error))
            view.end(stage.name, state, {}, (), time.monotonic() - began)
            if isinstance(error, UserError):
                raise stage.named_in(error) from None
            raise
        seconds = time.monotonic() - began
        hashes = {"sha256": sha256_file(stage.out)} if stage.is_file else {}
        status.update_stage(
            stage, state="completed", result=result, seconds=round(seconds, 1), **hashes
        )
        gates = _check_gates(stage, result, status)
        view.end(stage.name, "completed", result, gates, seconds)
        _require_gates(stage, gates)

    def _require_inputs(self, stage: Stage) -> None:
        for name in stage.inputs:
            if name not in self.addresses:
                raise OutputError(
                    f"stage `{stage.name}` reads `{name}`, which is not complete",
                    file=self.out / name,
                    hint=f"run it first: --only {name}, or leave --only and --from out",
                )

    def _result(self, status: PipelineStatus, view: StageView) -> dict[str, Any]:
        """Return what `--json` prints: each stage with its result."""
        stages = []
        for stage in self.stages:
            entry = status.entry(stage)
            row = {
                "name": stage.name,
                "stage": stage.stage,
                "state": view.rows[stage.name].state,
                "out": str(stage.out),
            }
            kept = {key: entry.get(key) for key in ("address", "seconds", "gates", "error")}
            stages.append({**row, **kept, "result": entry.get("result") or {}})
        state = status.summary.get("state")
        return {"stage": self.command, "out": str(self.out), "status": state, "stages": stages}


def _run_stage(stage: Stage, action: Action) -> dict[str, Any]:
    """Run a stage in this process or, where it takes several, in others; return its result."""
    flags = {"resume": True} if action == "resume" else {"overwrite": action == "replace"}
    if stage.stage == "rank":  # answers of people are appended to, never replaced
        flags = {}
    if stage.processes > 1:
        return launch(stage, flags)
    config = stage.config.model_copy(update=flags)
    command = import_module(f"llmctl.commands.{stage.stage}")
    with contextlib.redirect_stdout(io.StringIO()):
        result = command.run(config)
    return dict(result or {})


def _record_failure(status: PipelineStatus, error: BaseException) -> None:
    signalled = signal_error(error)
    expected = signalled or (error if isinstance(error, UserError) else None)
    status.update(
        state="preempted" if signalled else "failed",
        exit_code=expected.code if expected else 1,
        error=str(expected or error),
    )


def _check_gates(
    stage: Stage, result: Mapping[str, Any], status: PipelineStatus
) -> tuple[GateResult, ...]:
    """Check a stage's gates, and write how they stand."""
    try:
        gates = check_gates(stage.gates, result)
    except GateError as error:
        raise stage.named_in(error) from None
    status.update_stage(stage, gates=[gate.as_json() for gate in gates])
    return gates


def _require_gates(stage: Stage, gates: tuple[GateResult, ...]) -> None:
    """Refuse a result that fails a gate."""
    if broken := [gate for gate in gates if not gate.holds]:
        first = broken[0]
        text = f"stage `{stage.name}`: gate {first.gate} does not hold: it is {first.value:.4g}"
        hint = "the stage is complete and stays; those after it were not begun"
        raise stage.error(GateError, text, hint)


def launch(stage: Stage, flags: dict[str, bool]) -> dict[str, Any]:
    """Run a stage as a command of its own, which launches its processes; return its result.

    Signals are passed on, so that it saves; its stderr is copied to ours. It runs in a session of
    its own: a terminal's Ctrl-C would else reach it twice, and end it at once.

    Raises:
        UserError: as the command said it, with its exit code.
    """
    with tempfile.TemporaryDirectory(prefix="llmctl-") as folder:
        recipe = Path(folder) / f"{stage.name}.yaml"
        recipe.write_text(stage.config.to_yaml(stage.stage))
        options = [f"--{name.replace('_', '-')}" for name, wanted in flags.items() if wanted]
        command = [sys.executable, "-m", "llmctl", stage.stage, "-c", str(recipe)]
        command += ["-o", str(stage.out), "--json", *options]
        with (Path(folder) / "stdout").open("w+b") as stdout:
            code = _run_command(command, stdout.fileno())
            stdout.seek(0)
            lines = stdout.read().splitlines()
    result = parse_object(lines[-1]) if lines else {}
    if code:
        error = result.get("error")
        raise from_json(error if isinstance(error, dict) else {}, code)
    return result


def _run_command(command: list[str], stdout: int) -> int:
    """Run a command to its end, and return the exit code as a shell tells it."""
    with subprocess.Popen(
        command, stdout=stdout, stderr=subprocess.PIPE, start_new_session=True, text=True
    ) as process:
        assert process.stderr is not None
        with handled_by(lambda number, _: process.send_signal(number)):
            for line in process.stderr:
                print(line, end="", file=sys.stderr)
            code = process.wait()
    return code if code >= 0 else 128 - code


def write_page(out: Path) -> str:
    """Write report.html on all runs of a directory, and return its path."""
    page = out / PAGE
    with contextlib.redirect_stdout(io.StringIO()):
        report.run(ReportConfig(runs=[out], out=page))
    return str(page)
