"""Compare what the processes of a run hold, before its first step.

Each process reads recipe, data and model by itself, on several machines from disks of their own.
Gradients of others are then added without an error, and train a model that nobody asked for.
"""

import hashlib
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from llmctl.config.sections import Resumable
from llmctl.data.tokenizer.train import fingerprint
from llmctl.errors import DataError, ModelError, OutputError, UserError
from llmctl.runs.directory import Run, is_resuming, read_manifest
from llmctl.runs.provenance import versions
from llmctl.training.meeting import shared, speaks

KINDS: dict[str, type[UserError]] = {
    **dict.fromkeys(("tokenizer", "chat_template", "model", "reward_model"), ModelError),
    **dict.fromkeys(("architecture", "adapter"), ModelError),
    **dict.fromkeys(("data", "validation", "tokens"), DataError),
}
"""What a difference is that is no setting; what explains others comes first."""
HINTS = {
    UserError: "start every process with the same recipe, flags and versions",
    ModelError: "every machine needs the same model and tokenizer",
    DataError: "every machine needs the same data",
}
OWN = {"device", "threads", "processes", "peer_timeout"}
"""Settings that each process may have its own of."""
COMPARED_VERSIONS = ("llmctl", "torch", "transformers", "tokenizers")
SEEN_WITHIN = 45.0
"""Seconds in which a file of one machine shows on the others: NFS remembers for 30 s that there
was none."""
SHA256 = re.compile("[0-9a-f]{64}")
SHOWN_DIGITS = 12
"""Digits to show of a hash."""


def require_same(accelerator: Accelerator, facts: Mapping[str, Any], tokenizer: Any = None) -> None:
    """Refuse a run whose processes hold different facts (JSON, by name). Collective.

    A tokenizer is compared with its chat template, before all else.

    The error is raised on all of them, and the first on each machine tells it.

    Raises:
        ModelError, DataError: a difference in what `KINDS` names.
        UserError: one in a setting or a version.
    """
    if accelerator.num_processes == 1:
        return
    if tokenizer is not None:
        facts = {**_tokenizer_digests(tokenizer), **facts}
    names = [name for name in KINDS if name in facts]
    ordered = {name: facts[name] for name in [*names, *facts]}
    told = gather_object([(socket.gethostname(), ordered)])
    (host, wanted), *others = told
    for name in {**wanted, **{key: None for _, held in others for key in held}}:
        for rank, (other, held) in enumerate(others, start=1):
            if held.get(name) != wanted.get(name):
                key, ours, theirs = _narrowed(name, wanted.get(name), held.get(name))
                kind = KINDS.get(name, UserError)
                error = kind(
                    f"`{key}` differs between processes: {ours} on rank 0 ({host}), "
                    f"{theirs} on rank {rank} ({other})",
                    hint=HINTS[kind],
                )
                hosts = [host for host, _ in told]
                raise shared(error, is_told=speaks(hosts, accelerator.process_index))


def settings_of(stage: str, config: Resumable) -> dict[str, Any]:
    """Return what a command was told, without paths and what concerns one process, and versions."""
    paths = set(config.inputs()) - {"reward_rule"}  # most rules are no file
    recipe = config.recipe(stage)
    installed = versions()
    return {
        **{name: value for name, value in recipe.items() if name not in paths | OWN},
        "resume": is_resuming(config),
        "resume_allow": config.resume_allow,
        "dry_run": config.dry_run,
        **{f"version of {name}": installed.get(name) for name in COMPARED_VERSIONS},
    }


def require_shared(accelerator: Accelerator, run: Run) -> None:
    """Refuse a run directory that a process does not see as rank 0 wrote it. Collective.

    Call it in `fault_tolerance.together`.

    Raises:
        OutputError: on the process that does not.
    """
    mark = [run.manifest.get("run_id"), run.manifest.get("started")]
    if accelerator.num_processes == 1:
        return
    mark = broadcast_object_list(mark)
    limit = time.monotonic() + SEEN_WITHIN
    while not run.is_main and _mark(run.path) != mark:
        if time.monotonic() > limit:
            raise OutputError(
                f"rank {accelerator.process_index} ({socket.gethostname()}) does not see the run "
                "that rank 0 began here",
                file=run.path,
                hint="put the run directory on a file system that all machines share",
            )
        time.sleep(0.2)


def _tokenizer_digests(tokenizer: Any) -> dict[str, str]:
    template = hashlib.sha256(repr(tokenizer.chat_template).encode()).hexdigest()
    return {"tokenizer": fingerprint(tokenizer.backend_tokenizer), "chat_template": template}


def _mark(path: Path) -> list[Any]:
    manifest = read_manifest(path)
    return [manifest.get("run_id"), manifest.get("started")]


def _narrowed(name: str, ours: Any, theirs: Any) -> tuple[str, Any, Any]:
    """Return the inner key at which two mappings differ, and both values, hashes cut short."""
    while isinstance(ours, dict) and isinstance(theirs, dict):
        key = next(key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key))
        name, ours, theirs = f"{name}.{key}", ours.get(key), theirs.get(key)
    return name, _shown(ours), _shown(theirs)


def _shown(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return f"{text[:SHOWN_DIGITS]}…" if SHA256.fullmatch(text) else text
