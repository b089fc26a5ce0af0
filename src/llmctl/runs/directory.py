"""Write a run directory: inputs, progress, results.

recipe.yaml     the resolved config
manifest.json   stage, command, versions, git, seed, inputs and outputs with hashes, timings
status.json     running | completed | preempted | diverged | failed; step; resumable; exit code
metrics.jsonl   one JSON object a line; samples.jsonl likewise, and rows.jsonl of an evaluation
checkpoints/    for --resume
model/ …        the result, only there when the run completed
"""

import json
import os
import socket
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl import launch
from llmctl.config.base import read_recipe
from llmctl.config.sections import StageConfig
from llmctl.console import log, rank
from llmctl.errors import DivergedError, ModelError, OutputError, UserError
from llmctl.files import finite, replace_file, write_json, writing
from llmctl.redact import redact, redacted
from llmctl.runs import lock, trackers
from llmctl.runs.cards import write_cards
from llmctl.runs.energy import EnergyMeter
from llmctl.runs.ownership import (
    LOGS,
    METRICS,
    Claim,
    claim,
    drop_aside,
    is_resumable,
    made_directory,
    parse_object,
    read_json,
)
from llmctl.runs.provenance import origin
from llmctl.signals import signal_error


@dataclass
class Run:
    """One run and its directory. Only the main process writes."""

    path: Path
    stage: str
    is_main: bool = True
    manifest: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    meter: EnergyMeter = field(default_factory=EnergyMeter)
    under_way: bool = False
    """Whether training began: if this call fails before, a resumed run stays as it was."""
    tracking: trackers.Tracking | None = None

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def log(self, metrics: Mapping[str, Any], name: str = METRICS) -> None:
        """Append one line to metrics.jsonl or another log; NaN and infinity become null."""
        if self.is_main:
            self.meter.tick()
            row = finite(redacted(metrics))
            with (self.path / name).open("a") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
            if self.tracking is not None and name == METRICS:
                self.tracking.log(row)

    def drop_metrics_after(self, step: int) -> None:
        """Begin training: drop log lines of steps that will be done again, and broken lines."""
        self.under_way = True
        for path in (self.path / name for name in LOGS if self.is_main):
            if not path.exists():
                continue
            lines = path.read_bytes().split(b"\n")
            steps = (parse_object(line).get("step") for line in lines)
            kept = [
                line + b"\n"
                for line, logged in zip(lines, steps, strict=True)
                if isinstance(logged, int) and logged <= step
            ]
            replace_file(path, b"".join(kept))
        if self.tracking is not None:
            metrics = self.path / METRICS
            lines = metrics.read_bytes().splitlines() if metrics.exists() else []
            rows = [parse_object(line) for line in lines]
            known = self.manifest.get("trackers", {})
            self.record(trackers=self.tracking.start(self.manifest["run_id"], known, rows))

    def end_tracking(self, code: int) -> None:
        """Close the trackers, last of all: one may wait long for its server."""
        if self.tracking is not None:
            self.tracking.finish(redacted(self.manifest.get("result", {})), code)

    def keep_recipe(self, config: StageConfig) -> None:
        """Write recipe.yaml: the config that the run is resumed with, once that is checked."""
        if self.is_main:
            replace_file(self.path / "recipe.yaml", config.to_yaml(self.stage).encode())

    def record(self, **fields: Any) -> None:
        """Add fields to the manifest, at once on disk."""
        self.manifest.update(fields)
        if self.is_main:
            write_json(self.path / "manifest.json", self.manifest)

    def set_status(self, state: str, **fields: Any) -> None:
        """Write status.json."""
        self.status.update(state=state, updated=now(), **fields)
        if self.is_main:
            write_json(self.path / "status.json", self.status)


@contextmanager
def open_run(stage: str, config: StageConfig) -> Iterator[Run]:
    """Create or reopen the run directory of `config.out`, locked while the body runs.

    On an error nothing half-made is left: a run without a checkpoint is removed again.

    Raises:
        OutputError: the directory is in use, finished, foreign, or cannot be written.
        ResourceError: no space is left on the disk.
    """
    if config.out is None:
        raise UserError("--out is required", hint="pass -o DIRECTORY")
    run = Run(config.out, stage, is_main=rank() == 0)
    if not run.is_main:
        with writing(run.path):
            yield run
        return
    with writing(run.path), made_directory(run.path), lock.locked(run.path):
        owned = claim(run.path, overwrite=config.overwrite, resuming=is_resuming(config))
        try:
            with writing(run.path), lock.still_there(run.path):
                _begin(run, config)
                run.tracking = trackers.requested_trackers(config, stage, run.path)
                yield run
            with writing(run.path), lock.still_there(run.path):
                run.record(finished=now(), energy=run.meter.add(run.manifest))
                write_cards(run.path, run.manifest)
                run.record(outputs=owned.outputs())
                owned.flush()
                run.set_status("completed", resumable=False, exit_code=0)
        except BaseException as error:
            with suppress(OSError):  # a full disk must not hide why the run failed
                _fail(run, error, owned)
            run.end_tracking(error.code if isinstance(error, UserError) else 1)
            raise
        drop_aside(run.path)
        run.end_tracking(0)


def finished_already(stage: str, config: StageConfig) -> dict[str, Any] | None:
    """Return the result of the finished run that this call would resume, None if there is none.

    Runs before anything heavy is imported; `open_run` takes the lock.

    Raises:
        OutputError: another run is at work in the directory, or a run of another command finished.
        ResourceError: a requested tracker is not installed.
    """
    trackers.requested_trackers(config, stage, config.out)
    if config.out is None:
        return None
    if rank() == 0 and not config.dry_run and lock.is_held(config.out):
        raise lock.in_use(config.out)
    if not is_resuming(config) or not is_complete(config.out):
        return None
    manifest = read_manifest(config.out)
    if manifest.get("stage") != stage or not isinstance(manifest.get("result"), dict):
        raise OutputError(f"holds a completed run, not one of `{stage}`", file=config.out)
    if rank() == 0:
        log.info("%s is already complete%s", config.out, _how_to_extend(config.out, config))
        if changed := _changed_fields(stage, config, config.out):
            log.warning("not as it was made, and not run again: %s", "; ".join(changed))
    return dict(manifest["result"])


def is_complete(out: Path | None) -> bool:
    """Whether the directory holds a finished run."""
    return out is not None and read_json(out / "status.json").get("state") == "completed"


def read_manifest(run: Path) -> dict[str, Any]:
    """Read the manifest of a run, empty where there is none."""
    return read_json(run / "manifest.json")


def is_of_run(reference: str) -> bool:
    """Whether a model is the result of a run, given as the run or as a folder in it."""
    path = Path(reference).expanduser()
    return any((folder / "manifest.json").is_file() for folder in (path, path.absolute().parent))


def resolve_model(reference: str) -> str:
    """Resolve what `from_pretrained` opens: a run's model/ or adapter/, a folder, or a Hub id.

    Raises:
        ModelError: the path is a run that holds no model, or a file.
    """
    path = Path(reference).expanduser()
    if not path.exists():
        return reference
    if not path.is_dir():
        raise ModelError("not a model folder", file=path, hint="pass a run, a folder or a Hub id")
    for name in ("model", "adapter"):
        if (path / name).is_dir():
            return str(path / name)
    if (path / "manifest.json").is_file() and (path / "status.json").is_file():
        state = read_json(path / "status.json").get("state")
        raise ModelError(f"this run holds no model (it is {state})", file=path)
    return str(path)


def resolve_tokenizer(reference: str) -> str:
    """Resolve what AutoTokenizer opens: a tokenize run's tokenizer/, else as `resolve_model`."""
    folder = Path(reference).expanduser() / "tokenizer"
    return str(folder) if folder.is_dir() else resolve_model(reference)


def tokenizer_in_parts(folder: Path) -> ModelError | None:
    """Build the error for a tokenizer of vocab.json and merges.txt alone; None for others."""
    there = [name for name in ("vocab.json", "merges.txt") if (folder / name).is_file()]
    if len(there) < 2 or (folder / "tokenizer.json").is_file():
        return None
    return ModelError(
        "vocab.json and merges.txt without a tokenizer.json: how text is split is not said",
        file=folder,
        hint="write one with the class that they are of, such as transformers' "
        "GPT2TokenizerFast.from_pretrained(FOLDER).save_pretrained(FOLDER)",
    )


def now() -> str:
    """Format the local time with its zone."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def is_resuming(config: StageConfig) -> bool:
    """Whether this call continues an earlier run; only training commands can."""
    control = {name: value for name, value in config if name in ("resume", "resume_from")}
    return any(control.values())


def _begin(run: Run, config: StageConfig) -> None:
    """Write the records, the manifest first: it marks the directory as ours (see ownership.py)."""
    manifest, status = read_manifest(run.path), read_json(run.path / "status.json")
    known = manifest if manifest.get("stage") == run.stage else {}
    run.manifest = {
        "run_id": uuid.uuid4().hex,
        "stage": run.stage,
        "threads": None,
        "inputs": [],
        **{k: v for k, v in known.items() if k not in ("finished", "result")},
        **origin(),
        "seed": config.seed,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "machines": launch.machines(),
        "outputs": [],
        "started": now(),
    }
    run.record()
    if not (run.path / "recipe.yaml").exists():
        run.keep_recipe(config)
    resumable = is_resumable(run.path)
    if resumable and "step" in status:
        run.status["step"] = status["step"]
    run.set_status("running", pid=os.getpid(), host=socket.gethostname(), resumable=resumable)


def _fail(run: Run, error: BaseException, owned: Claim) -> None:
    """Record in status.json how the run ended; leave nothing where nothing can be resumed.

    A run that failed to resume stays as it was.
    """
    if not (run.path / lock.LOCK).exists():
        return  # deleted while running: not to be made again
    signalled = signal_error(error)
    known = signalled or (error if isinstance(error, UserError) else None)
    resumable = is_resumable(run.path)
    stays = owned.earlier and not run.under_way and (resumable or owned.has_ended())
    if not resumable and not stays and known and not isinstance(error, DivergedError):
        owned.undo()
        return
    owned.remove_staged()
    if known is None:
        text = "".join(traceback.format_exception(error))
        (run.path / "error.log").write_text(redact(text))
    if stays:
        owned.restore()
        return
    diverged = "diverged" if isinstance(error, DivergedError) else "failed"
    run.record(outputs=owned.outputs(), energy=run.meter.add(run.manifest))
    run.set_status(
        "preempted" if signalled else diverged,
        resumable=resumable,
        exit_code=known.code if known else 1,
        error=str(known or error),
    )


def _changed_fields(stage: str, config: StageConfig, out: Path) -> list[str]:
    """Name the fields that a finished run was made with other values of, with both."""
    file = out / "recipe.yaml"
    then = read_recipe(file)[0] if file.is_file() else {}
    now = config.recipe(stage)
    return [
        f"{config.flag(name)} {then[name]} -> {value}"
        for name, value in now.items()
        if name in then and then[name] != value and name not in ("stage", "out", "threads")
    ]


def _how_to_extend(out: Path, config: StageConfig) -> str:
    allow = dict(config).get("resume_allow")
    names = (path.name.removeprefix("checkpoint-") for path in out.glob("checkpoints/checkpoint-*"))
    steps = [int(name) for name in names if name.isdigit()]
    if not allow or not steps:
        return ""
    newest = out / "checkpoints" / f"checkpoint-{max(steps)}"
    return f"; to go on from there: --resume-from {newest} -o NEW --resume-allow {','.join(allow)}"
