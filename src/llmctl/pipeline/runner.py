"""Stages in order: what is unchanged is skipped, what broke goes on, what changed runs anew."""

import contextlib
import io
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from llmctl.config.sections import Stages
from llmctl.console import log
from llmctl.errors import GateError, OutputError, UserError
from llmctl.files import sha256_file, writing
from llmctl.pipeline.content_hash import address_of
from llmctl.pipeline.gates import GateResult, check_gates
from llmctl.pipeline.launching import launch
from llmctl.pipeline.references import Stage
from llmctl.pipeline.report import require_page, write_page
from llmctl.pipeline.status import (
    Journal,
    Todo,
    is_complete,
    open_journal,
    read_journal,
    result_of,
    todo,
)
from llmctl.pipeline.view import View, show_gates
from llmctl.runs import lock
from llmctl.runs.directory import read_manifest
from llmctl.runs.ownership import made_directory
from llmctl.signals import reason

HOW: dict[Todo, str] = {
    "begin": "starts",
    "resume": "goes on where it was",
    "replace": "runs anew",
    "skip": "unchanged, skipped",
}


class Cycle:
    """The stages of a recipe in a directory, and which of them are wanted."""

    def __init__(
        self, stages: tuple[Stage, ...], out: Path, recipe: Path, config: Stages, command: str
    ) -> None:
        """Nothing is read or written yet."""
        self.stages, self.out, self.recipe, self.config = stages, out, recipe, config
        self.command = command
        self.addresses: dict[str, str] = {}

    def todos(self, journal: Journal) -> Iterator[tuple[Stage, Todo | None]]:
        """What is to be done about each stage, None for one to be left as it is.

        The addresses of the stages before it must be known by the time it is asked for.

        Raises:
            OutputError: a stage that is to be left as it is, and is read, is not complete.
        """
        names = [stage.name for stage in self.stages]
        only, first = self.config.only, self.config.from_stage
        begin = names.index(first) if first else 0
        anew: set[str] = set()
        for place, stage in enumerate(self.stages):
            known = journal.record(stage)
            if place < begin or (only and stage.name != only):
                self._take(stage, known)
                yield stage, None
                continue
            self._require_inputs(stage, journal)
            address = self.addresses[stage.name] = address_of(stage, self.addresses)
            forced = self.config.overwrite or stage.name == first or bool(anew & {*stage.inputs})
            if forced and (first or self.config.overwrite):
                anew.add(stage.name)
            yield stage, todo(stage, address, known, anew=forced)

    def has_work(self) -> bool:
        """Whether any stage is to run: what is complete needs no check.

        Raises:
            OutputError: as `todos`.
        """
        return any(what not in (None, "skip") for _, what in self.todos(read_journal(self.out)))

    def to_check(self) -> tuple[Stage, ...]:
        """The stages that may run."""
        if self.config.only:
            return tuple(stage for stage in self.stages if stage.name == self.config.only)
        names = [stage.name for stage in self.stages]
        begin = names.index(self.config.from_stage) if self.config.from_stage else 0
        return self.stages[begin:]

    def run(self) -> dict[str, Any]:
        """Run them; the result of the whole.

        Raises:
            UserError: as the first stage that failed raised it.
        """
        read_journal(self.out)  # refuses a directory that is one run
        require_page(self.out)
        with writing(self.out), made_directory(self.out), lock.locked(self.out):
            journal = open_journal(self.out, self.recipe, self.stages)
            view = View(self.stages)
            try:
                with view.shown():
                    self._run_all(journal, view)
            except BaseException as error:
                self._note_end(journal, error)
                show_gates(view.rows)
                if isinstance(error, GateError):
                    log.info("report: %s", write_page(self.out))
                if isinstance(error, UserError):
                    error.report = self._result(journal, view)
                raise
            journal.write(state="completed", exit_code=0)
            show_gates(view.rows)
            page = write_page(self.out)
        return {**self._result(journal, view), "report": page}

    def _run_all(self, journal: Journal, view: View) -> None:
        beginning = None
        for stage, what in self.todos(journal):
            if what is None:
                view.end(stage.name, "left", {})
            elif what == "skip":
                self._skip(stage, journal, view)
            else:
                from llmctl.pipeline.isolation import Beginning  # torch, for stages that run

                beginning = beginning or Beginning()
                with beginning.again():
                    self._run_one(stage, what, journal, view)

    def _skip(self, stage: Stage, journal: Journal, view: View) -> None:
        known = journal.record(stage)
        result = result_of(stage, known)
        journal.note(stage, address=self.addresses[stage.name], state="completed", result=result)
        gate_results = self._judged(stage, result, journal)
        view.end(stage.name, "unchanged", result, gate_results)
        _require(stage, gate_results)

    def _run_one(self, stage: Stage, what: Todo, journal: Journal, view: View) -> None:
        """Run a stage; the journal knows before and after."""
        view.begin(stage.name, HOW[what])
        began = time.monotonic()
        replaces = {} if what == "resume" else {"replaces": _run_id(stage)}
        address = self.addresses[stage.name]
        journal.note(stage, address=address, state="running", error=None, **replaces)
        try:
            result = _carry_out(stage, what)
        except BaseException as error:
            signalled = reason(error)
            state = "preempted" if signalled else "failed"
            journal.note(stage, state=state, error=str(signalled or error))
            view.end(stage.name, state, {}, (), time.monotonic() - began)
            if isinstance(error, UserError):
                raise stage.wrong(error) from None
            raise
        seconds = time.monotonic() - began
        digest = {"sha256": sha256_file(stage.out)} if stage.is_file else {}
        journal.note(stage, state="completed", result=result, seconds=round(seconds, 1), **digest)
        gate_results = self._judged(stage, result, journal)
        view.end(stage.name, "completed", result, gate_results, seconds)
        _require(stage, gate_results)

    def _judged(
        self, stage: Stage, result: Mapping[str, Any], journal: Journal
    ) -> tuple[GateResult, ...]:
        try:
            gate_results = check_gates(stage.gates, result)
        except GateError as error:
            raise stage.wrong(error) from None
        journal.note(stage, gates=[gate_result.as_json() for gate_result in gate_results])
        return gate_results

    def _take(self, stage: Stage, known: Mapping[str, Any]) -> None:
        """Let a stage stand as it is, whatever it was made from."""
        if known and is_complete(stage, known):
            self.addresses[stage.name] = str(known.get("address"))

    def _require_inputs(self, stage: Stage, journal: Journal) -> None:
        for name in stage.inputs:
            if name not in self.addresses:
                raise OutputError(
                    f"stage `{stage.name}` reads `{name}`, which is not complete",
                    file=self.out / name,
                    hint=f"run it first: --only {name}, or leave --only and --from out",
                )

    def _note_end(self, journal: Journal, error: BaseException) -> None:
        signalled = reason(error)
        known = signalled or (error if isinstance(error, UserError) else None)
        journal.write(
            state="preempted" if signalled else "failed",
            exit_code=known.code if known else 1,
            error=str(known or error),
        )

    def _result(self, journal: Journal, view: View) -> dict[str, Any]:
        """What `--json` prints: each stage with its figures."""
        stages = []
        for stage in self.stages:
            known = journal.record(stage)
            told = {key: known.get(key) for key in ("address", "seconds", "gates", "error")}
            row = view.rows[stage.name]
            entry = {"name": stage.name, "stage": stage.stage, "state": row.state}
            figures = known.get("result") or {}
            stages.append({**entry, "out": str(stage.out), **told, "result": figures})
        state = journal.facts.get("state")
        return {"stage": self.command, "out": str(self.out), "status": state, "stages": stages}


def _carry_out(stage: Stage, what: Todo) -> dict[str, Any]:
    """Run a stage, in this process or, where it takes several, in others."""
    controls = _controls(stage, what)
    if stage.processes > 1:
        return launch(stage, controls)
    config = stage.config.model_copy(update=controls)
    module = import_module(f"llmctl.commands.{stage.stage}")
    with contextlib.redirect_stdout(io.StringIO()):
        result = module.run(config)
    return dict(result or {})


def _controls(stage: Stage, what: Todo) -> dict[str, bool]:
    """The flags of one call; answers of people are appended to, never replaced."""
    if stage.stage == "rank":
        return {}
    return {"resume": True} if what == "resume" else {"overwrite": what == "replace"}


def _run_id(stage: Stage) -> str | None:
    """The run that stands there now."""
    found = None if stage.is_file else read_manifest(stage.out).get("run_id")
    return None if found is None else str(found)


def _require(stage: Stage, gate_results: tuple[GateResult, ...]) -> None:
    """Refuse figures that are not what the recipe demands."""
    if broken := [gate_result for gate_result in gate_results if not gate_result.holds]:
        first = broken[0]
        raise GateError(
            f"stage `{stage.name}`: gate {first.gate} does not hold: it is {first.value:.4g}",
            file=stage.file,
            line=stage.line,
            hint="the stage is complete and stays; those after it were not begun",
        )
