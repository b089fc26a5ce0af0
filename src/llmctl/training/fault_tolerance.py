"""The guarantees, for our loop and for TRL's trainers alike: finite numbers, signals, checkpoints.

Every step: `agree` on what all ranks saw, `accept` the step or refuse it, then `finish_step`.
"""

import math
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from llmctl.config.commands.ppo import PpoConfig
from llmctl.config.commands.pretrain import PretrainConfig
from llmctl.config.finetuning import Tuning
from llmctl.config.sections import Checkpoints
from llmctl.console import log
from llmctl.errors import DivergedError, ModelError, UserError
from llmctl.files import writing
from llmctl.runs import checkpoint
from llmctl.runs.checkpoint import CheckpointContent, manifest_of
from llmctl.runs.directory import Run, open_run
from llmctl.runs.resume import (
    defect,
    load,
    lost_best,
    named_checkpoint,
    newest_valid,
    require_same,
)
from llmctl.signals import StopFlag
from llmctl.training.consistency import require_shared
from llmctl.training.distributed import lost_peers_named
from llmctl.training.meeting import first_error
from llmctl.training.meter import Meter
from llmctl.training.run_state import Progress, RunState
from llmctl.training.state import surroundings

EARLIER_ARGUMENT = "adam_epsilon"
"""In the identity of runs that were trained by transformers' Trainer."""


@dataclass(frozen=True)
class StepOutcome:
    """Loss, norm and signal of a step over all ranks, before any of them updates a weight."""

    loss: Tensor
    grad_norm: Tensor
    tokens: int
    finite: bool
    signal: int


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Raise a rank's error on all ranks at the end of the body; one tells it. Collective.

    Else the others would wait for the rank that failed, and end with an error of the network's.
    What all ranks raise together, in a body that is collective too, stays as it is.

    Raises:
        UserError: any rank's.
    """
    mine: UserError | None = None
    try:
        yield
    except UserError as error:
        if error.is_shared or accelerator.num_processes == 1:
            raise
        mine = error
    if accelerator.num_processes > 1:
        rank, host = accelerator.process_index, socket.gethostname()
        told = gather_object([(host, mine)])
        told[rank] = host, mine  # with its traceback
        if first := first_error(told, rank):
            raise first


@contextmanager
def open_together(
    accelerator: Accelerator, stage: str, config: PretrainConfig | Tuning | PpoConfig
) -> Iterator[Run]:
    """Open the run (`runs.directory.open_run`) on rank 0; its refusals end all ranks.

    Raises:
        OutputError: as `open_run`, or a rank does not see the directory as rank 0 made it.
        ResourceError: another process ended or does not answer.
    """
    with ExitStack() as stack:
        with together(accelerator):
            run = stack.enter_context(open_run(stage, config))
        stack.enter_context(lost_peers_named(config.peer_timeout))  # before the run hears of it
        with together(accelerator):
            require_shared(accelerator, run)
        yield run


def agree(
    state: RunState, loss: Tensor, grad_norm: Tensor, tokens: int, flag: StopFlag
) -> StepOutcome:
    """The mean loss and the tokens of all ranks, and the signal that any of them received.

    One transfer from a GPU per step pays for the promise that no step uses a number that is not
    finite; all ranks stop at the same step, whichever of them a signal reached.
    """
    finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
    if state.world == 1:
        return StepOutcome(loss, grad_norm, tokens, bool(finite), flag.received)
    counted = torch.tensor([tokens, flag.received], dtype=torch.float64)
    facts = torch.cat([torch.stack([loss, finite]).double(), counted.to(loss.device)])
    losses, checks, counts, signals = state.accelerator.gather(facts[None]).T.tolist()
    mean = loss.new_tensor(sum(losses) / len(losses))
    return StepOutcome(mean, grad_norm, round(sum(counts)), min(checks) > 0, int(max(signals)))


def accept(state: RunState, outcome: StepOutcome, batch: Callable[[], str]) -> bool:
    """Whether the optimizer may take the step; the same on every rank.

    A refused step is counted; `batch` says which examples it was computed from.

    Raises:
        DivergedError: loss or gradients are not finite, and the run is to stop at that, or was so
            too often.
    """
    if outcome.finite:
        return True
    done, config = state.progress, state.config
    done.skipped_steps += 1
    loss, grad_norm = float(outcome.loss), float(outcome.grad_norm)
    what = f"step {done.step + 1:,}: loss {loss:g}, gradient norm {grad_norm:g} ({batch()})"
    if config.on_nan == "skip" and done.skipped_steps <= config.max_nan_skips:
        log.warning("skipped %s; %d so far", what, done.skipped_steps)
        return False
    if config.on_nan == "skip":
        what += f"; {done.skipped_steps} skipped, more than --max-nan-skips {config.max_nan_skips}"
    error = DivergedError(
        what,
        hint="the weights were not touched by this step; try a lower --lr, a longer --warmup, or "
        "--on-nan skip",
    )
    error.is_reported = state.rank > 0
    raise error


def finish_step(state: RunState, meter: Meter, outcome: StepOutcome) -> None:
    """Log, evaluate and save where due; then end the run if a signal came.

    Raises:
        DivergedError: the validation loss, or a weight after the update, is not finite.
        Interrupted, Terminated: a signal came, and the run is saved.
    """
    done, values = state.progress, state.values
    done.step += 1
    done.tokens += outcome.tokens
    last = done.step == values.max_steps
    if done.step % values.log_every == 0 or last:
        meter.log(outcome.loss, outcome.grad_norm)
    improved = False
    due = done.step % values.eval_every == 0 or last
    if due and state.evaluate is not None:
        with meter.paused():
            metrics = state.evaluate()
            improved = meter.log_evaluation(metrics)
        if not math.isfinite(metrics["val_loss"]):
            error = DivergedError(f"step {done.step:,}: val_loss {metrics['val_loss']:g}")
            error.is_reported = state.rank > 0
            raise error
    if due:
        with meter.paused():
            state.sample(done.step)
    if improved or last or outcome.signal or done.step % values.save_every == 0:
        with meter.paused():
            save(state, meter)
    if outcome.signal:
        raise StopFlag.error(outcome.signal, done.step)


def is_over(state: RunState) -> bool:
    """Whether the last step is done, or the patience with the validation loss."""
    done, values = state.progress, state.values
    patient = values.early_stop is None or done.evals_since_best < values.early_stop
    return done.step >= values.max_steps or not patient


def save(state: RunState, meter: Meter) -> None:
    """Write a checkpoint of this step, then drop those no longer kept."""
    meter.keep_time()
    done, run = state.progress, state.run
    content = state.capture()
    with together(state.accelerator):
        _require_finite(content)
    checkpoint.save(
        run.checkpoints,
        content,
        state.owner,
        rank=state.rank,
        together=lambda: together(state.accelerator),
    )
    state.saved = done.step
    if state.rank == 0:
        checkpoint.rotate(
            run.checkpoints,
            state.config.keep,
            step=done.step,
            run_id=state.owner.run_id,
            damaged=state.damaged - {done.step},
        )
        state.damaged.discard(done.step)
        run.set_status("running", step=done.step, resumable=True)


def _require_finite(content: CheckpointContent) -> None:
    """Raise a DivergedError for weights or moments that are not finite: no loss shows it yet."""
    for name, tensor in (*content.model.items(), *content.optimizer.items()):
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum()):
            raise DivergedError(
                f"step {content.step:,}: {name} is not finite after the update",
                hint="the last checkpoint is good; try a lower --lr or a longer --warmup",
            )


def find_checkpoint(state: RunState, config: Checkpoints, needed: int) -> CheckpointContent | None:
    """Load the checkpoint to resume from, if this call resumes, and set the state to it.

    Rank 0 chooses and verifies, all ranks load.

    There must be room for checkpoints of `needed` bytes.

    Raises:
        ModelError: none is valid, or it is of a run that differs.
        ResourceError: the disk cannot hold the run.
        UserError: it is beyond this run's last step.
    """
    chosen: list[Any] = [None, False]
    with together(state.accelerator):
        if state.rank == 0:
            chosen = [*_choose(state, config)]
            _require_room(state, needed)
    path, has_best = broadcast_object_list(chosen)
    if path is None:
        state.run.drop_metrics_after(-1)  # samples of step 0, too
        return None
    with together(state.accelerator), writing(path):
        content = load(path, state.rank)
    state.progress = Progress(**content.state["progressed"])
    if path.resolve().parent == state.run.checkpoints.resolve():
        state.saved = content.step
    if not has_best:
        state.progress.forget_best()
    state.run.drop_metrics_after(content.step)
    if state.rank == 0:
        log.info("resuming from %s", path)
        now = surroundings(state.device)
        for name, then in content.state["made_with"].items():
            if then != now[name]:
                log.warning("%s: %s -> %s: not the same to the last bit", name, then, now[name])
    return content


def _require_room(state: RunState, needed: int) -> None:
    """Refuse to begin what the disk cannot hold: the kept checkpoints, the next, and the result.

    What earlier checkpoints of the run take is counted as free.
    """
    root = state.run.checkpoints
    held = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    kept = max(checkpoint.LEAST, state.config.keep) + (state.evaluate is not None)
    copies = min(kept, state.values.max_steps // state.values.save_every) + 1
    checkpoint.require_space(state.run.path, max(0, needed * copies - held))


def _choose(state: RunState, config: Checkpoints) -> tuple[Path | None, bool]:
    """The checkpoint, and whether the best one that it refers to is in this run."""
    root = state.run.checkpoints
    if root.is_dir():
        checkpoint.clean(root)
    path, has_best = None, True
    if config.resume:
        path, damaged = newest_valid(root, state.owner.run_id)
        state.damaged |= damaged
    if path is None:
        if config.resume_from is None:
            return None, False
        path = named_checkpoint(config.resume_from)
        if reason := defect(path):
            raise ModelError(f"not a valid checkpoint: {reason}", file=path)
        has_best = path.resolve().parent == root.resolve() and lost_best(path) is None
    if EARLIER_ARGUMENT in manifest_of(path)["identity"]:
        raise ModelError(
            "this run was made by an earlier version of llmctl, and cannot be continued",
            file=path,
            hint="start anew: --overwrite, or another -o",
        )
    changed = require_same(path, state.owner, config.resume_allow)
    step = checkpoint.step_of(path)
    if step > state.values.max_steps:
        raise UserError(f"--max-steps {state.values.max_steps}: {path.name} is beyond it")
    if _effective(manifest_of(path)["identity"]) != _effective(state.identity):
        log.warning("another effective batch: some examples come twice or not at all")
    for name, (then, now) in changed.items():
        log.warning("%s: %s -> %s from step %d on, as --resume-allow says", name, then, now, step)
    state.run.record(resumed={"from": str(path), "step": step, "changed": changed})
    return path, has_best


def _effective(identity: dict[str, Any]) -> int:
    """Sequences of a step, over all processes."""
    return int(identity["batch_size"] * identity["grad_accum"] * identity["world_size"])
