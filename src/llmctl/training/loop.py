"""The training loop: batches, steps, the finite check, evaluation, checkpoints, signals.

In: a model, an objective, hyperparameters, batches. Out: trained weights, checkpoints and the final
metrics. pretrain, sft, classify, reward and dpo are objectives of this one loop; ppo, whose steps
are several updates, uses its parts.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from llmctl import hardware
from llmctl.config.commands.pretrain import PretrainConfig
from llmctl.config.finetuning import Tuning
from llmctl.config.sections import Resumable
from llmctl.console import ProgressBar
from llmctl.errors import DataError, UserError
from llmctl.runs.checkpoint import CheckpointContent
from llmctl.runs.directory import Run
from llmctl.signals import StopFlag, stop_flag
from llmctl.training.batches import Batch, Batches, on_device
from llmctl.training.consistency import require_same
from llmctl.training.distributed import autocast, is_sharded, place, wait_for_peers
from llmctl.training.fault_tolerance import (
    StepOutcome,
    accept,
    agree,
    find_checkpoint,
    finish_step,
    is_over,
)
from llmctl.training.hyperparameters import Hyperparameters
from llmctl.training.meter import Meter
from llmctl.training.objective import Objective, scaled
from llmctl.training.optimizers import make_optimizers, set_lr
from llmctl.training.run_state import RunState
from llmctl.training.state import (
    capture,
    checkpoint_bytes,
    generators_kept,
    restore,
    set_generators,
)


@dataclass
class Trainer:
    """A model and its data, and the run that they are for."""

    model: nn.Module
    """Placed as it trains."""
    optimizers: list[Optimizer]
    objective: Objective
    batches: Batches
    state: RunState
    watch: Callable[[dict[str, float]], None] = lambda figures: None
    """Told the figures of every line of metrics."""
    sums: Tensor | None = None
    """Sums of the objective's figures since the last line of metrics, on this process."""

    def figures(self) -> dict[str, float]:
        """Means of the objective's figures since the last call. Collective."""
        if self.sums is None:
            return {}
        *totals, count = self.state.accelerator.reduce(self.sums.double(), "sum").tolist()
        self.sums = None
        means = (total / max(1, count) for total in totals)
        figures = dict(zip(self.objective.figures, means, strict=True))
        self.watch(figures)
        return figures

    def capture(self) -> CheckpointContent:
        """All that decides how the run goes on, and what the next line counts. Collective."""
        extra = None
        if self.sums is not None:  # of each process, so that a resumed run adds in the same order
            extra = {"counts": self.state.accelerator.gather(self.sums.double()[None]).tolist()}
        progress = self.state.progress
        return capture(self.model, self.optimizers, progress, extra, rank=self.state.rank)

    @property
    def bare_model(self) -> Any:
        """The model to look at: without DDP around it, but sharded where FSDP is in force."""
        accelerator = self.state.accelerator
        return self.model if is_sharded(accelerator) else accelerator.unwrap_model(self.model)

    def count(self, sums: Tensor | None) -> None:
        """Add a micro-batch's figures, without waiting for the device."""
        if sums is not None:
            self.sums = sums if self.sums is None else self.sums + sums


def assemble(
    config: PretrainConfig | Tuning,
    run: Run,
    accelerator: Accelerator,
    device: str,
    model: Any,
    hyperparameters: Hyperparameters,
    objective: Objective,
    batches: Batches,
    *,
    identity: dict[str, Any],
    tokenizer: Any,
    validates: bool,
    flops_per_token: float | None,
    sample: Callable[[int], None] = lambda step: None,
    watch: Callable[[dict[str, float]], None] = lambda figures: None,
    compiles_whole: bool = False,
    may_skip_weights: bool = True,
) -> Trainer:
    """Place a model and make its optimizers; put the trainer together.

    The model is adapted already, if it is to be, and in training mode; the objective is on this
    very model. `identity` is what decides the weights beside hyperparameters: a run that resumes
    must have the same, and so must every process, which has the same tokenizer, too. `--compile`
    compiles the model as one with `compiles_whole`, for inputs of one shape.

    Raises:
        DataError, ModelError, UserError: processes hold different data, models or settings.
    """
    identity = {**hyperparameters.identity(), **identity}
    require_same(accelerator, identity, tokenizer)
    if config.compile:
        compile_model(model, accelerator, whole=compiles_whole)
    optimizers = make_optimizers(model, hyperparameters, device)
    placed, optimizers = place(accelerator, model, optimizers, may_skip_weights=may_skip_weights)
    state = RunState(
        run=run,
        accelerator=accelerator,
        device=device,
        config=config,
        values=hyperparameters,
        identity=identity,
        flops_per_token=flops_per_token,
        capture=lambda: trainer.capture(),
        evaluate=(lambda: objective.validate(trainer.bare_model)) if validates else None,
        sample=sample,
        metrics=lambda: trainer.figures(),
    )
    trainer = Trainer(placed, optimizers, objective, batches, state, watch)
    return trainer


def compile_model(model: nn.Module, accelerator: Accelerator, *, whole: bool) -> None:
    """Compile a model in place with torch.compile.

    As a `whole`, or its blocks, one by one and for inputs of any length: what stands between them,
    such as the hook that hands the output layer the tokens that count, stays as it is.

    Raises:
        UserError: FSDP is in force.
    """
    if is_sharded(accelerator):
        raise UserError("--compile has not been made to work under FSDP", hint="drop --compile")
    if whole:
        model.compile()
        return
    blocks = next(
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
    )
    for block in blocks:
        block.compile(dynamic=True)


def train(trainer: Trainer, config: Resumable) -> dict[str, Any]:
    """Train, from a checkpoint where the call asks for one; return the final metrics.

    Raises:
        DataError: a step without anything to learn from.
        DivergedError: the loss or a gradient is NaN or infinite; nothing was updated with it.
        ModelError: the checkpoint is invalid, or of a run that differs.
        ResourceError: memory or disk do not suffice.
        Interrupted, Terminated: a signal came; the run is saved.
    """
    resume(trainer, config)
    trainer.state.run.keep_recipe(config)
    wait_for_peers(trainer.state.accelerator, trainer.state.config.peer_timeout)
    values = trainer.state.values
    with hardware.memory_errors(values.batch_size, values.grad_accum):
        return fit(trainer)


def resume(trainer: Trainer, config: Resumable) -> None:
    """Put the trainer in the state of the checkpoint that the call asks for, if it asks for one."""
    needed = checkpoint_bytes(trainer.model, trainer.optimizers)
    content = find_checkpoint(trainer.state, config, needed)
    if content is None:
        return
    restore(trainer.model, trainer.optimizers, content)
    if "counts" in content.state:
        counts = torch.tensor(content.state["counts"], dtype=torch.float64)
        trainer.sums = counts[trainer.state.rank].to(trainer.state.device)
    set_generators(content.rng)


def fit(trainer: Trainer) -> dict[str, Any]:
    """Train until the last step and return the final metrics; raises what `train` does."""
    state, values = trainer.state, trainer.state.values
    done, meter = state.progress, Meter(state)
    with stop_flag() as flag, ProgressBar(state.run.stage, values.max_steps) as progress_bar:
        progress_bar.start_at(done.step)
        if done.step == 0:  # what the model says before it learns
            with meter.paused():
                state.sample(0)
        if not is_over(state):
            batches = micro_batches(trainer, done.step)
            if state.world > 1:
                lay_out_buckets(trainer, batches)
        while not is_over(state):
            set_lr(trainer.optimizers, values.lr_at(done.step))
            loss = accumulate(trainer, batches)
            tokens = sum(batch["tokens"] for batch in batches)
            batches = micro_batches(trainer, done.step + 1)  # while a GPU still computes
            outcome = update(
                state,
                trainer.optimizers,
                trainer.model.parameters(),
                loss,
                tokens,
                flag,
                lambda: trainer.batches.name(done.step),
            )
            progress_bar.update(done.step + 1, meter.text)
            finish_step(state, meter, outcome)
    return meter.final()


def micro_batches(trainer: Trainer, step: int) -> list[Batch]:
    """This rank's micro-batches of a step, on the device."""
    return [on_device(batch, trainer.state.device) for batch in trainer.batches.step(step)]


def lay_out_buckets(trainer: Trainer, batches: list[Batch]) -> None:
    """Run DDP's first backward pass, after which it lays its buckets out anew.

    A resumed run would otherwise add three ranks' gradients in another order in its first step.
    """
    kept = trainer.sums
    with generators_kept():
        accumulate(trainer, batches[:1])
    trainer.sums = kept
    trainer.model.zero_grad(set_to_none=True)


def accumulate(trainer: Trainer, batches: list[Batch]) -> Tensor:
    """Backpropagate a step's micro-batches; return this rank's share of their mean loss.

    The mean of the ranks' shares is the mean over the whole step's weight. Gradients are reduced
    between processes with the last micro-batch only.

    Raises:
        DataError: nothing in the step counts, on any rank.
    """
    state, step = trainer.state, trainer.state.progress.step
    weight = trainer.batches.step_weight(step)
    if not weight > 0:
        raise DataError(
            f"step {step + 1:,}: every label is masked ({trainer.batches.name(step)})",
            hint="there is nothing to learn from; check the data's shape and --max-length",
        )
    total: Tensor | None = None
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        sync = nullcontext() if last else state.accelerator.no_sync(trainer.model)
        with sync:
            with autocast(state.values.precision, state.device):
                loss = trainer.objective.loss(trainer.model, batch)
            share = scaled(loss, weight, len(batches), state.world)
            share.backward()  # type: ignore[no-untyped-call]
        trainer.count(loss.sums)
        total = share.detach() if total is None else total + share.detach()
    assert total is not None
    return total


def update(
    state: RunState,
    optimizers: list[Optimizer],
    weights: Iterable[Tensor],
    loss: Tensor,
    tokens: int,
    flag: StopFlag,
    name: Callable[[], str],
) -> StepOutcome:
    """Clip the gradients, update where all numbers are finite; say what ranks saw. Collective.

    `weights` have their gradients, reduced over processes; `loss` is this rank's share. `name` says
    which examples the step was computed from.

    Raises:
        DivergedError: loss or gradients are not finite, and the run is to stop at that.
    """
    norm = nn.utils.clip_grad_norm_(weights, state.values.max_grad_norm or math.inf)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    outcome = agree(state, loss, norm, tokens, flag)
    accepted = accept(state, outcome, name)
    for optimizer in optimizers:
        if accepted:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return outcome
