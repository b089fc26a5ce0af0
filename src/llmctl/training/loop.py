"""The training loop: batches, steps, the finite check, evaluation, checkpoints, signals.

In: a model, a plan, tokens. Out: trained weights, checkpoints and the final metrics.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from llmctl.config.sections import Checkpoints
from llmctl.console import Progress
from llmctl.training.batches import IGNORED, validation_batches
from llmctl.training.guard import (
    accept,
    agree,
    find_checkpoint,
    finish_step,
    is_over,
)
from llmctl.training.meter import Meter
from llmctl.training.optimizers import set_lr
from llmctl.training.placement import autocast
from llmctl.training.plan import Plan
from llmctl.training.signals import stop_flag
from llmctl.training.state import (
    checkpoint_bytes,
    generators_kept,
    restore,
    set_generators,
)
from llmctl.training.trainer import Trainer


def fit(trainer: Trainer) -> dict[str, Any]:
    """Train until the plan's last step and return the final metrics.

    Raises:
        DivergedError: the loss or a gradient is NaN or infinite; nothing was updated with it.
        Interrupted, Terminated: a signal came; the run is saved.
    """
    plan, job = trainer.plan, trainer.job
    done, meter = job.progressed, Meter(job)
    tokens = plan.tokens_per_step // job.world
    with stop_flag() as flag, Progress(job.title, plan.max_steps) as progress:
        progress.start_at(done.step)
        meter.sample_before()
        batch = to_device(trainer, done.step)
        if job.world > 1:
            lay_out_buckets(trainer, batch)
        while not is_over(job):
            set_lr(trainer.optimizers, plan.lr_at(done.step))
            loss = accumulate_gradients(trainer, batch)
            batch = to_device(trainer, done.step + 1)  # while a GPU still computes
            verdict = agree(job, loss, clip(trainer), tokens, flag)
            accepted = accept(job, verdict, lambda: _sequences(trainer))
            for optimizer in trainer.optimizers:
                if accepted:
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            progress.update(done.step + 1, meter.text)
            finish_step(job, meter, verdict)
    return meter.final()


def resume(trainer: Trainer, config: Checkpoints) -> None:
    """Put the trainer in the state of the checkpoint that the call asks for, if it asks for one."""
    job = trainer.job
    content = find_checkpoint(job, config, checkpoint_bytes(trainer.model, trainer.optimizers))
    if content is not None:
        restore(trainer.model, trainer.optimizers, content)
        set_generators(content.rng)


def lay_out_buckets(trainer: Trainer, batch: list[tuple[Tensor, Tensor]]) -> None:
    """Have DDP's first backward pass behind us, after which it lays its buckets out anew.

    A resumed run would otherwise add three ranks' gradients in another order in its first step.
    """
    with generators_kept():
        accumulate_gradients(trainer, batch[:1])
    trainer.model.zero_grad(set_to_none=True)


def to_device(trainer: Trainer, step: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's micro-batches of a step: `grad_accum` pairs of (B, T) inputs and targets."""
    plan = trainer.plan
    first = step * plan.sequences_per_step + trainer.job.rank * plan.batch_size
    stride = plan.batch_size * trainer.job.world
    pairs = [
        trainer.train.batch(first + i * stride, plan.batch_size) for i in range(plan.grad_accum)
    ]
    return [move(pair, trainer.job.device) for pair in pairs]


def move(pair: tuple[Tensor, Tensor], device: str) -> tuple[Tensor, Tensor]:
    """A pair on the device; to a GPU from pinned memory, without waiting."""
    inputs, targets = pair
    if device == "cuda":
        return (
            inputs.pin_memory().to(device, non_blocking=True),
            targets.pin_memory().to(device, non_blocking=True),
        )
    return inputs.to(device), targets.to(device)


def accumulate_gradients(trainer: Trainer, batch: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Backpropagate a step's micro-batches; return their mean loss in nats per token.

    All have as many tokens, so the mean of means is the mean over tokens. Gradients are reduced
    between processes with the last one only.
    """
    total: Tensor | None = None
    for number, pair in enumerate(batch):
        last = number == len(batch) - 1
        sync = nullcontext() if last else trainer.job.accelerator.no_sync(trainer.model)
        with sync:
            loss = loss_of(trainer.model, pair, trainer.plan, trainer.job.device)
            (loss / len(batch)).backward()  # type: ignore[no-untyped-call]
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return total / len(batch)


def loss_of(model: nn.Module, pair: tuple[Tensor, Tensor], plan: Plan, device: str) -> Tensor:
    """Mean loss of a micro-batch in nats per token."""
    inputs, targets = pair
    with autocast(plan, device):
        found = model(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False)
    return found.loss  # type: ignore[no-any-return]


def clip(trainer: Trainer) -> Tensor:
    """Clip the gradients to the plan's norm and return the norm they had."""
    limit = trainer.plan.max_grad_norm or math.inf
    norm = nn.utils.clip_grad_norm_(trainer.model.parameters(), limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def evaluate(trainer: Trainer) -> dict[str, float]:
    """Validation loss in nats per token, its perplexity, and bits per byte of text."""
    plan, job, split = trainer.plan, trainer.job, trainer.val
    assert split is not None
    sharded = job.accelerator.distributed_type.name == "FSDP"
    model = trainer.model if sharded else job.accelerator.unwrap_model(trainer.model)
    model.eval()
    nats = torch.zeros((), dtype=torch.float64, device="cpu" if job.device == "mps" else job.device)
    count = torch.zeros_like(nats)
    size = max(1, min(16_384 // plan.context, 2 * plan.batch_size))  # within what training takes
    pairs = validation_batches(split, plan.context, size, plan.eval_tokens, job.rank, job.world)
    for inputs, targets in (move(pair, job.device) for pair in pairs):
        with autocast(plan, job.device):
            logits = model(input_ids=inputs, use_cache=False).logits
        nats += cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        ).to(nats)
        count += (targets != IGNORED).sum().to(count)
    model.train()
    nats, count = job.accelerator.reduce(torch.stack([nats, count])).tolist()
    loss = nats / count
    tokens_per_byte = split.tokens / split.bytes
    return {
        "val_loss": loss,
        "val_perplexity": math.exp(min(loss, 700)),
        "val_bits_per_byte": loss / math.log(2) * tokens_per_byte,
    }


def _sequences(trainer: Trainer) -> str:
    """Which sequences of the run the step at hand is computed from."""
    first = trainer.job.progressed.step * trainer.plan.sequences_per_step
    return f"sequences {first:,} to {first + trainer.plan.sequences_per_step - 1:,}"
