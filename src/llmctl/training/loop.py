"""The training loop: batches, steps, the finite check, evaluation, checkpoints, signals.

In: a model, a plan, tokens. Out: the weights of the best checkpoint and the final metrics.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from llmctl import checkpoint
from llmctl.console import Progress
from llmctl.errors import DivergedError
from llmctl.training.batches import IGNORED, validation_batches
from llmctl.training.meter import Meter
from llmctl.training.optimizers import set_lr
from llmctl.training.signals import StopFlag, stop_flag
from llmctl.training.state import capture, restore
from llmctl.training.trainer import Progressed, Trainer

if TYPE_CHECKING:
    from llmctl.data.shards import TokenSplit


def fit(trainer: Trainer) -> dict[str, Any]:
    """Train until the plan's last step and return the final metrics.

    Raises:
        DivergedError: the loss or a gradient is NaN or infinite; nothing was updated with it.
        Interrupted, Terminated: a signal came; the run is saved.
    """
    plan, done = trainer.plan, trainer.progressed
    meter = Meter(trainer)
    with stop_flag() as flag, Progress("pretrain", plan.max_steps) as progress:
        progress.start_at(done.step)
        batch = to_device(trainer, done.step)
        while done.step < plan.max_steps and not is_stopped_early(trainer):
            set_lr(trainer.optimizers, plan.lr_at(done.step))
            loss = accumulate_gradients(trainer, batch)
            batch = to_device(trainer, done.step + 1)  # while a GPU still computes
            grad_norm = clip(trainer)
            loss, signal_number = agree(trainer, loss, grad_norm, flag)
            for optimizer in trainer.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            done.step += 1
            done.tokens += plan.tokens_per_step
            meter.count()
            if done.step % trainer.log_every == 0 or done.step == plan.max_steps:
                meter.log(loss, grad_norm)
            progress.update(done.step, meter.text)
            finish_step(trainer, meter, stopping=bool(signal_number))
            if signal_number:
                raise StopFlag.error(signal_number, done.step)
    return meter.final()


def to_device(trainer: Trainer, step: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's micro-batches of a step: `grad_accum` pairs of (B, T) inputs and targets."""
    plan = trainer.plan
    first = step * plan.sequences_per_step + trainer.rank * plan.batch_size
    stride = plan.batch_size * trainer.world
    pairs = [
        trainer.train.batch(first + i * stride, plan.batch_size) for i in range(plan.grad_accum)
    ]
    return [move(pair, trainer.device) for pair in pairs]


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
    for number, (inputs, targets) in enumerate(batch):
        last = number == len(batch) - 1
        sync = nullcontext() if last else trainer.accelerator.no_sync(trainer.model)
        with sync:
            with autocast(trainer):
                loss = trainer.model(
                    input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False
                ).loss
            (loss / len(batch)).backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return total / len(batch)


def autocast(trainer: Trainer) -> AbstractContextManager[Any]:
    """bfloat16 products where the plan says so; sums and weights stay in float32."""
    if trainer.plan.precision != "bf16":
        return nullcontext()
    return torch.autocast(trainer.device, dtype=torch.bfloat16)


def clip(trainer: Trainer) -> Tensor:
    """Clip the gradients to the plan's norm and return the norm they had."""
    limit = trainer.plan.max_grad_norm or math.inf
    norm = nn.utils.clip_grad_norm_(trainer.model.parameters(), limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def agree(trainer: Trainer, loss: Tensor, grad_norm: Tensor, flag: StopFlag) -> tuple[Tensor, int]:
    """The mean loss of all ranks and the signal that any of them received.

    One transfer from a GPU per step pays for the promise that no step uses a number that is not
    finite.

    Raises:
        DivergedError: on every rank, if the loss or the gradient norm of any is not finite.
    """
    facts = torch.stack([loss.float(), torch.isfinite(loss) & torch.isfinite(grad_norm)])
    if trainer.world > 1:
        signals = torch.tensor(float(flag.received), device=facts.device)
        facts = torch.cat([facts, signals[None]])
        losses, checks, numbers = trainer.accelerator.gather(facts[None]).T.tolist()
        loss = facts.new_tensor(sum(losses) / len(losses))
        finite, signal_number = min(checks) > 0, int(max(numbers))
    else:
        finite, signal_number = bool(facts[1] > 0), flag.received
    if not finite:
        step = trainer.progressed.step
        first = step * trainer.plan.sequences_per_step
        raise DivergedError(
            f"step {step + 1:,}: loss {float(loss):g}, gradient norm {float(grad_norm):g} "
            f"(sequences {first:,} to {first + trainer.plan.sequences_per_step - 1:,})",
            hint="the weights were not touched by this step; try a lower --lr or longer --warmup",
        )
    return loss, signal_number


def is_stopped_early(trainer: Trainer) -> bool:
    """Whether the plan's patience is over."""
    patience = trainer.plan.early_stop
    return patience is not None and trainer.progressed.evals_since_best >= patience


def finish_step(trainer: Trainer, meter: Meter, *, stopping: bool) -> None:
    """Evaluate and save where due."""
    plan, done = trainer.plan, trainer.progressed
    last = done.step == plan.max_steps
    improved = False
    if trainer.val is not None and (done.step % plan.eval_every == 0 or last):
        with meter.paused():
            improved = meter.log_evaluation(evaluate(trainer, trainer.val))
    if improved or stopping or last or done.step % plan.save_every == 0:
        with meter.paused():
            save(trainer)


@torch.no_grad()
def evaluate(trainer: Trainer, split: "TokenSplit") -> dict[str, float]:
    """Validation loss in nats per token, its perplexity, and bits per byte of text."""
    plan = trainer.plan
    sharded = trainer.accelerator.distributed_type.name == "FSDP"
    model = trainer.model if sharded else trainer.accelerator.unwrap_model(trainer.model)
    model.eval()
    nats = torch.zeros(
        (), dtype=torch.float64, device="cpu" if trainer.device == "mps" else trainer.device
    )
    count = torch.zeros_like(nats)
    size = max(1, 16_384 // plan.context)
    pairs = validation_batches(
        split, plan.context, size, plan.eval_tokens, trainer.rank, trainer.world
    )
    for inputs, targets in (move(pair, trainer.device) for pair in pairs):
        with autocast(trainer):
            logits = model(input_ids=inputs, use_cache=False).logits
        nats += cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        ).to(nats)
        count += (targets != IGNORED).sum().to(count)
    model.train()
    nats, count = trainer.accelerator.reduce(torch.stack([nats, count])).tolist()
    loss = nats / count
    tokens_per_byte = split.tokens / split.bytes
    return {
        "val_loss": loss,
        "val_perplexity": math.exp(min(loss, 700)),
        "val_bits_per_byte": loss / math.log(2) * tokens_per_byte,
    }


def save(trainer: Trainer) -> None:
    """Write a checkpoint of this step, then drop those no longer kept."""
    done = trainer.progressed
    checkpoint.save(
        trainer.run.checkpoints,
        capture(trainer.model, trainer.optimizers, done.step, vars(done)),
        trainer.identity,
        rank=trainer.rank,
        barrier=trainer.accelerator.wait_for_everyone,
    )
    if trainer.rank == 0:
        checkpoint.rotate(trainer.run.checkpoints, trainer.keep, done.best_step)
        trainer.run.set_status("running", step=done.step, resumable=True)


def resume(trainer: Trainer, content: checkpoint.Content) -> None:
    """Put the trainer in the state that a checkpoint holds."""
    restore(trainer.model, trainer.optimizers, content)
    trainer.progressed = Progressed(**content.state["progressed"])
