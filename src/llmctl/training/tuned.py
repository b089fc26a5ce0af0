"""What the trainers of fine-tuning share: Trainer's arguments, our learning rate, our means."""

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from llmctl.checkpoint import Content
from llmctl.config.tuning import Tuning
from llmctl.console import log, short
from llmctl.training.adapters import trainable_parameters
from llmctl.training.schedule import lr_at
from llmctl.training.trl import Reliable
from llmctl.training.tuning import EPOCHS, TuningPlan, make_tuning_plan

OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw-8bit": "adamw_bnb_8bit",
    "paged-adamw-8bit": "paged_adamw_8bit",
}
"""Ours by Trainer's names."""


class Tuned(Reliable):
    """Mixin before one of the trainers, whose `compute_loss` calls `count`."""

    plan: TuningPlan
    measured: tuple[str, ...] = ("accuracy",)
    """What the means are called whose sums `count` is given."""
    _counts: Tensor | None = None

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LambdaLR:
        """The learning rate as every command of llmctl's has it."""
        plan = self.plan
        self.lr_scheduler = LambdaLR(
            optimizer or self.optimizer, lambda step: lr_at(plan, step) / plan.lr
        )
        return self.lr_scheduler

    def floating_point_ops(self, inputs: dict[str, Tensor]) -> int:
        """Nothing: Trainer would count the model's parameters at every step."""
        return 0

    def share(self, loss: Tensor, num_items_in_batch: Any) -> Tensor:
        """A summed loss as its share of the step's mean.

        num_items_in_batch counts over all ranks, and DDP takes the mean of their gradients.
        """
        shared: Tensor = loss * (self.accelerator.num_processes / num_items_in_batch)
        return shared

    def balanced(self, loss: Tensor, balance: Tensor | None) -> Tensor:
        """A loss with the balancing loss of a mixture of experts, where its model has one."""
        if balance is None:
            return loss
        weight = self.model.config.get_text_config().router_aux_loss_coef
        # a mean over the micro-batch, of which a step has several
        whole: Tensor = loss + weight * balance / self.current_gradient_accumulation_steps
        return whole

    def count(self, *sums_and_total: Tensor) -> None:
        """Remember what was measured for the next line of metrics; no wait for a GPU.

        Args:
            sums_and_total: a sum of each of `measured`, then of how many.
        """
        counts = torch.stack(sums_and_total)
        self._counts = counts if self._counts is None else self._counts + counts

    def _extras(self) -> dict[str, Any]:
        """Means since the last line. Collective."""
        counts, self._counts = self._counts, None
        if counts is None:
            return {}
        *sums, total = self.accelerator.reduce(counts.double(), "sum").tolist()
        means = (found / max(1, total) for found in sums)
        return dict(zip(self.measured, means, strict=True))

    def _capture(self) -> Content:
        """A checkpoint with what was measured since the last line, which the next line counts."""
        content = super()._capture()
        if self._counts is None:
            return content
        counts = self.accelerator.reduce(self._counts.double(), "sum").tolist()
        return replace(content, state={**content.state, "counts": counts})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._content is not None and "counts" in self._content.state:
            counts = torch.tensor(self._content.state["counts"], dtype=torch.float64)
            self._counts = counts.to(self.args.device) * (self.job.rank == 0)


def common_arguments(config: Tuning, plan: TuningPlan, device: str) -> dict[str, Any]:
    """What any trainer is told; the rest it leaves to us."""
    return {
        "output_dir": str(config.out),
        "per_device_train_batch_size": plan.batch_size,
        "gradient_accumulation_steps": plan.grad_accum,
        "learning_rate": plan.lr,
        "optim": OPTIMIZERS[plan.optimizer],
        "weight_decay": config.weight_decay,
        "adam_beta1": config.beta1,
        "adam_beta2": config.beta2,
        "max_grad_norm": config.max_grad_norm,
        "max_steps": plan.max_steps,
        "seed": config.seed,
        "bf16": plan.precision == "bf16",
        "use_cpu": device == "cpu",
        "activation_checkpointing": config.activation_checkpointing,
        "remove_unused_columns": False,
        "dataloader_pin_memory": device == "cuda",
    }


def make_plan(
    config: Tuning,
    model: Any,
    rows: int,
    accelerator: Accelerator,
    device: str,
    *,
    epochs: int = EPOCHS,
    lr_share: float = 1.0,
) -> tuple[TuningPlan, int, int]:
    """The plan for a model that is adapted, whose weights become bf16 where that was asked for.

    `epochs` are those of a run that is told neither epochs nor steps, `lr_share` is of
    fine-tuning's learning rate where a run is told none.

    Returns:
        The plan, the parameters that train, and all of them.
    """
    trained, parameters = trainable_parameters(model)
    plan = make_tuning_plan(
        config,
        parameters=parameters,
        rows=rows,
        world=accelerator.num_processes,
        device=device,
        epochs=epochs,
        lr_share=lr_share,
    )
    if plan.precision == "pure-bf16":
        _to_bf16(model, plan.lr)
    return plan, trained, parameters


def announce(plan: TuningPlan, trained: int, parameters: int, unit: str) -> None:
    """Say what trains, for how long and how; `unit` is what a batch is made of."""
    log.info(
        "%s parameters, %s of them trained (%.3g %%); %s steps of %d x %d %s, %s, peak learning "
        "rate %g, %s, %s",
        short(parameters),
        short(trained),
        100 * trained / parameters,
        f"{plan.max_steps:,}",
        plan.batch_size,
        plan.grad_accum,
        unit,
        plan.optimizer,
        plan.lr,
        plan.schedule,
        plan.precision,
    )


def _to_bf16(model: Any, lr: float) -> None:
    """Give the model weights in bf16, and say what that means."""
    log.warning(
        "pure bf16 weights: updates smaller than 1/256 of a weight vanish, and at a learning rate "
        "of %g most of them are",
        lr,
    )
    for weight in model.parameters():  # buffers such as rotary frequencies stay exact
        weight.data = weight.data.to(torch.bfloat16)
