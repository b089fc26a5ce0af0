"""TRL's trainers with the guarantees of our own loop, by the very same functions.

`class ReliableSFT(Reliable, SFTTrainer)` trains as SFTTrainer does, and saves, resumes, checks its
numbers, hears signals and writes metrics as `llmctl pretrain` does. What Trainer does of all that
is off: its checkpoints are neither atomic nor verified, its resume is exact for some data only, and
it reports NaN as 0.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer

from llmctl import hardware
from llmctl.checkpoint import Content
from llmctl.config.sections import Resumable
from llmctl.console import Progress
from llmctl.errors import DataError, ModelError, UserError
from llmctl.rundir import Run
from llmctl.training.arguments import continue_schedule, identity_of, take_over
from llmctl.training.guard import accept, agree, find_checkpoint, finish_step, is_over
from llmctl.training.job import Job, Rhythm
from llmctl.training.meter import Meter
from llmctl.training.order import Order, Stream, token_lengths
from llmctl.training.signals import StopFlag, stop_flag
from llmctl.training.state import (
    capture,
    checkpoint_bytes,
    generators_kept,
    restore,
    set_generators,
)


@dataclass(frozen=True)
class Terms:
    """What a trainer must be told to give the guarantees."""

    run: Run
    rhythm: Rhythm
    identity: dict[str, Any]
    """What decides the weights beside optimizer and shape: data, the base's weights, packing."""
    group_by_length: bool = False
    sample: Callable[[int], None] = lambda step: None
    """As of a job."""


class Reliable(Trainer):  # type: ignore[misc]
    """Mixin before one of TRL's trainers: `class ReliableSFT(Reliable, SFTTrainer)`."""

    def __init__(self, *args: Any, terms: Terms, **kwargs: Any) -> None:
        """Build the trainer, then take over what it does badly.

        Args:
            args: the trainer's own.
            terms: of the run.
            kwargs: the trainer's own; `args.max_steps` is the rhythm's.

        Raises:
            UserError: what cannot be resumed exactly, or be judged by one loss.
        """
        arguments = kwargs["args"]
        take_over(arguments, terms.rhythm.max_steps)
        super().__init__(*args, **kwargs)
        if isinstance(self.eval_dataset, dict):
            raise UserError("several validation sets have no one val_loss; give one data set")
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self._terms = terms
        self._content: Content | None = None
        self._flag = StopFlag()
        self._loss: Tensor | None = None
        self._tokens = 0
        self._lr = 0.0
        self.job = Job(
            title=terms.run.stage,
            run=terms.run,
            accelerator=self.accelerator,
            device=arguments.device.type,
            identity={
                **identity_of(self),
                "group_by_length": terms.group_by_length,
                **terms.identity,
            },
            rhythm=terms.rhythm,
            flops_per_token=None,
            capture=self._capture,
            evaluate=None if self.eval_dataset is None else self._measure,
            lr=lambda: self._lr,
            sample=terms.sample,
            extras=self._extras,
        )

    def fit(self, config: Resumable) -> dict[str, Any]:
        """Train, from a checkpoint where the call asks for one; return the final metrics.

        Raises:
            DataError: a step without a single label.
            DivergedError: the loss or a gradient is NaN or infinite; nothing was updated with it.
            ModelError: the checkpoint is invalid, or of a run that differs.
            ResourceError: memory or disk do not suffice.
            Interrupted, Terminated: a signal came; the run is saved.
        """
        self._content = find_checkpoint(self.job, config, checkpoint_bytes(self.model))
        self.job.run.keep_recipe(config)
        self._meter = Meter(self.job)
        batch, passes = self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
        with (
            stop_flag() as self._flag,
            hardware.memory_errors(batch, passes),
            Progress(self.job.title, self.job.rhythm.max_steps) as self._progress,
        ):
            self._progress.start_at(self.job.progressed.step)
            self._meter.sample_before()
            if not is_over(self.job):
                self.train()
            elif self._content is not None:
                restore(self.model, [], self._content)
            self._content = None
        return self._meter.final()

    # --- data

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches in an order that is a function of the seed and the step alone."""
        args, dataset, collate = self.args, self.train_dataset, self.data_collator
        grouped = self._terms.group_by_length
        common: dict[str, Any] = {
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory and args.device.type == "cuda",
            "generator": torch.Generator(),  # leaves the global one alone
        }
        if isinstance(dataset, datasets.IterableDataset):
            if args.dataloader_num_workers:
                raise DataError("streamed data is read in one process only")
            if grouped:
                raise UserError("--group-by-length needs all lengths at once; a stream has none")
            collate = self._get_collator_with_removed_columns(collate, description="training")
            stream = Stream(dataset, args.train_batch_size, self.job.rank, self.job.world)
            return DataLoader(
                stream, batch_size=args.train_batch_size, collate_fn=collate, **common
            )
        dataset = self._remove_unused_columns(dataset, description="training")
        self._order = Order(
            len(dataset),
            batch_size=args.train_batch_size,
            grad_accum=args.gradient_accumulation_steps,
            rank=self.job.rank,
            world=self.job.world,
            steps=self.job.rhythm.max_steps,
            seed=args.seed,
            lengths=token_lengths(dataset) if grouped else None,
        )
        return DataLoader(dataset, batch_sampler=self._order, collate_fn=collate, **common)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of a step, whose tokens are counted.

        Raises:
            DataError: every label of the step is masked, on every rank.
        """
        batches, labels = super().get_batch_samples(epoch_iterator, num_batches, device)
        if labels is not None and not labels > 0:
            raise DataError(
                f"step {self.state.global_step + 1:,}: every label is masked ({self._named()})",
                hint="there is nothing to learn from; check the data's shape and --max-length",
            )
        self._tokens = sum(_tokens(batch) for batch in batches)
        return batches, labels

    def _named(self) -> str:
        """Which examples the step at hand is computed from: the first few, and how many more."""
        step = self.job.progressed.step
        if isinstance(self.train_dataset, datasets.IterableDataset):
            size = self.args.gradient_accumulation_steps * self.job.world
            first = step * size * self.args.train_batch_size
            return f"examples {first:,} to {first + size * self.args.train_batch_size - 1:,}"
        examples = self._order.step(step)
        rest = f" and {len(examples) - NAMED:,} more" if len(examples) > NAMED else ""
        return "examples " + ", ".join(map(str, examples[:NAMED])) + rest

    # --- steps

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of a micro-batch, whose loss is kept for the check."""
        loss: Tensor = super().training_step(*args, **kwargs)
        self._loss = loss if self._loss is None else self._loss + loss
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """After the last backward pass of a step and before its update: the check of all ranks."""
        norm = torch.as_tensor(super()._get_grad_norm(model, grad_norm=grad_norm))
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        assert self._loss is not None
        self._verdict = agree(self.job, self._loss, norm, self._tokens, self._flag)
        self._loss = None
        if not accept(self.job, self._verdict, self._named):
            model.zero_grad(set_to_none=True)  # an update without gradients changes nothing
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """After a step, and once more after the last: what is due then."""
        if self.state.global_step == self.job.progressed.step:
            return
        self._lr = kwargs["learning_rate"]
        finish_step(self.job, self._meter, self._verdict)
        self._progress.update(self.job.progressed.step, self._meter.text)
        self.control.should_training_stop = is_over(self.job)

    def _measure(self) -> dict[str, float]:
        with generators_kept():
            found = self.evaluate()
        kept = {name: value for name, value in found.items() if not name.endswith(DROPPED)}
        return {"val_" + name.removeprefix("eval_"): value for name, value in kept.items()}

    def _extras(self) -> dict[str, Any]:
        """What TRL measured since the last call."""
        logs: dict[str, Any] = {}
        self.log(logs)
        return {name: value for name, value in logs.items() if not name.endswith(DROPPED)}

    # --- checkpoints

    def _capture(self) -> Content:
        state = {"scheduler": self.lr_scheduler.state_dict()}
        optimizers = [self.optimizer.optimizer]
        return capture(self.model, optimizers, self.job.progressed, state, rank=self.job.rank)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's loop, resumed where there is a checkpoint: the hooks below put it in place."""
        kwargs["resume_from_checkpoint"] = None if self._content is None else RESUMED
        return super()._inner_training_loop(*args, **kwargs)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Epochs (ours has no seams: none) and micro-batches that are done."""
        super()._init_training_state(*args, **kwargs)
        self.state.global_step = self.job.progressed.step
        return 0, self.job.progressed.step * self.args.gradient_accumulation_steps

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: under FSDP Trainer would read weights here, which `restore` puts in place."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._content is None:
            return
        scheduler = self._content.state.get("scheduler")
        if scheduler is None:
            raise ModelError("the checkpoint holds no state of a learning-rate schedule")
        restore(self.model, [self.optimizer.optimizer], self._content)
        continue_schedule(self.lr_scheduler, scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._content is not None:
            set_generators(self._content.rng)
        self._content = None  # the last of it is in place; it is as large as a checkpoint


RESUMED = "a checkpoint of llmctl's"
"""What Trainer is told to resume from: no path, since it never reads one."""
NAMED = 8
"""Examples that a message names."""
DROPPED = ("_runtime", "_per_second", "num_tokens", "epoch", "_model_preparation_time")
"""Trainer's figures that `meter.py` gives, or that mean nothing here."""


def _tokens(batch: dict[str, Tensor]) -> int:
    if "tokens" in batch:
        return int(batch["tokens"])
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].numel() if mask is None else mask.sum())
