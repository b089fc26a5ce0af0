"""Direct preference optimisation on TRL's DPOTrainer, with our batches, loss and guarantees.

DPOTrainer sets the model up and Trainer runs the steps. The reference is the model as the run found
it: the base below the adapter where there is one, else log-probabilities that are computed before
anything is trained or restored. Either way there is no second model.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from llmctl.config.stages import DpoConfig as Config
from llmctl.console import log
from llmctl.errors import ModelError
from llmctl.training.dpo_loss import (
    Objective,
    PairRows,
    is_displaced,
    log_probabilities,
    without_dropout,
)
from llmctl.training.guard import together
from llmctl.training.head import output_layer, require_chunkable
from llmctl.training.placement import autocast
from llmctl.training.sequences import numbered, on_device, shares
from llmctl.training.state import generators_kept
from llmctl.training.trl import Terms
from llmctl.training.tuned import Tuned, common_arguments
from llmctl.training.tuning import TuningPlan

TRAIN, VAL = "train", "eval"
"""What DPOTrainer calls the two sets of pairs."""
COPY = "ref"
"""What it calls its copy of the adapter."""
ROUNDING = {"fp32": 1e-5}
COARSE_ROUNDING = 2e-2
"""Change of a log-probability, relative to the largest, that is rounding."""


@dataclass(frozen=True)
class Material:
    """What a trainer is made of."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    train: PairRows
    val: PairRows | None


class Compared(NamedTuple):
    """What a batch of B pairs says of the model."""

    losses: Tensor
    """(B,) with gradients."""
    sums: tuple[Tensor, ...]
    """Of each of `measured`, then how many pairs."""
    balance: Tensor | None


class PreferenceTrainer(Tuned, DPOTrainer):
    """DPOTrainer on pairs that are encoded already."""

    measured = (
        *("reward_accuracy", "reward_margin", "chosen_logprob", "rejected_logprob"),
        "chosen_gain",
    )
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        material: Material,
        plan: TuningPlan,
        arguments: DPOConfig,
        terms: Terms,
        objective: Objective,
        *,
        chunked: bool,
    ) -> None:
        """Build the trainer on a model that is adapted already, if it is to be. Collective.

        Raises:
            UserError: what cannot be resumed exactly, or a loss that cannot be chunked.
            ModelError: the model has no output layer, or differs from itself as reference.
        """
        self.plan, self._material, self._objective = plan, material, objective
        self._chunked, self._head = chunked, output_layer(material.model)
        self._known: dict[str, Tensor] = {}
        self._gains: list[float] = [0.0]
        self._has_warned = False
        without_dropout(material.model)
        super().__init__(
            model=material.model,
            args=arguments,
            data_collator=material.train.collate,
            train_dataset=numbered(material.train.lengths),
            eval_dataset=None if material.val is None else numbered(material.val.lengths),
            processing_class=material.tokenizer,
            terms=terms,
        )
        # compute_loss divides by the weights of the step
        self.model_accepts_loss_kwargs: bool = True
        if isinstance(self.model, PeftModel):
            for weight in self.model.parameters():
                if weight.requires_grad:
                    weight.data = weight.data.float()  # bf16 would lose small updates
            if material.val is not None:
                self._known[VAL] = self._log_probabilities_of(material.val)
        with together(self.accelerator):
            self._require_sound()

    # --- what DPOTrainer asks for while it is built

    def _prepare_dataset(self, dataset: datasets.Dataset, *_: Any) -> datasets.Dataset:
        """The data as it is, encoded already; DPOTrainer's copy of the adapter goes unused."""
        model = self._material.model
        if isinstance(model, PeftModel) and COPY in model.peft_config:
            model.delete_adapter(COPY)
        return dataset

    def _precompute_ref_logps(self, dataset: datasets.Dataset, name: str, _: int) -> Any:
        """The reference of all pairs, by the model that nothing has trained or restored yet."""
        pairs = self._material.train if name == TRAIN else self._material.val
        assert pairs is not None
        self._known[name] = self._log_probabilities_of(pairs)
        return dataset

    # --- the loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """The loss of a micro-batch as its share of the step's mean over weighted pairs."""
        found = self._compare(model, inputs, self._reference(inputs, TRAIN))
        self.count(*found.sums)
        loss = self.share((found.losses * inputs["weights"]).sum().float(), num_items_in_batch)
        return self.balanced(loss, found.balance)

    def _get_num_items_in_batch(self, batches: list[Any], device: torch.device) -> Tensor:
        """What the pairs of a step weigh together, over all ranks."""
        total = sum((batch["weights"].sum() for batch in batches), torch.zeros(()))
        weight: Tensor = self.accelerator.gather(total.to(device)[None]).sum()
        return weight

    def _compare(self, model: Any, batch: dict[str, Tensor], reference: Tensor) -> Compared:
        own, balance = log_probabilities(model, self._head, batch, chunked=self._chunked)
        gains, counts = own - reference, batch["counts"]
        chosen, rejected = self._objective.rewards(gains, counts).chunk(2)
        margin, said = (chosen - rejected).detach(), own.detach()
        pairs = len(margin)
        sums = (
            (margin > 0).sum(),
            margin.sum(),
            said[:pairs].sum(),
            said[pairs:].sum(),
            (gains.detach() / counts.clamp_min(1))[:pairs].sum(),
            margin.new_tensor(pairs),
        )
        losses = self._objective.losses(chosen, rejected)
        return Compared(losses, tuple(found.double() for found in sums), balance)

    # --- the reference

    def _reference(self, batch: dict[str, Tensor], name: str) -> Tensor:
        """Log-probabilities (2B,) by the reference: known, or those of the base below the adapter.

        Before the model's own pass: switching the adapter also switches its gradients.
        """
        if name in self._known:
            return self._known[name][batch["numbers"]].T.flatten()
        with torch.no_grad(), self._base_alone():
            return log_probabilities(self.model, self._head, batch, chunked=self._chunked)[0]

    def _base_alone(self) -> AbstractContextManager[Any]:
        """The base without its adapter; the model itself where there is none."""
        if not isinstance(self.model, PeftModel):
            return nullcontext()
        alone: AbstractContextManager[Any] = self.model.disable_adapter()
        return alone

    @torch.no_grad()
    def _log_probabilities_of(self, pairs: PairRows) -> Tensor:
        """(N, 2) log-probabilities of the chosen and rejected responses. Collective."""
        device = self.args.device
        found = torch.zeros(len(pairs), 2, dtype=torch.float64, device=device)
        with generators_kept(), self._base_alone(), autocast(self.plan, device.type):
            for numbers in self._shares(pairs):
                batch = on_device(pairs.batch(numbers), device)
                own, _ = log_probabilities(self.model, self._head, batch, chunked=self._chunked)
                found[numbers] = own.view(2, -1).T
        summed: Tensor = self.accelerator.reduce(found, "sum")
        return summed

    def _shares(self, pairs: PairRows) -> list[list[int]]:
        """This rank's pairs in batches of like length."""
        accelerator, size = self.accelerator, self.args.train_batch_size
        return shares(pairs.lengths, size, accelerator.process_index, accelerator.num_processes)

    @torch.no_grad()
    def _require_sound(self) -> None:
        """Before any step the model is its own reference: every implicit reward is 0.

        Raises:
            ModelError: it is not.
            UserError: the loss cannot be chunked.
        """
        numbers = next(reversed(self._shares(self._material.train)), None)
        if numbers is None:
            return
        batch = on_device(self._material.train.batch(numbers), self.args.device)
        was_training = self.model.training
        self.model.train()
        with generators_kept(), autocast(self.plan, self.args.device.type):
            if self._chunked:
                rows = {name: batch[name] for name in ("input_ids", "labels", "places")}
                require_chunkable(self.model, self._head, rows)
            reference = self._reference(batch, TRAIN)
            own, _ = log_probabilities(self.model, self._head, batch, chunked=self._chunked)
        self.model.train(was_training)
        change = float((own - reference).abs().max() / reference.abs().max().clamp_min(1e-6))
        if not change <= ROUNDING.get(self.plan.precision, COARSE_ROUNDING):
            raise ModelError(
                f"before any step the model differs from itself as reference by {change:.2%} of a "
                "log-probability: it computes with noise",
                hint="set what is random in its config.json to 0, such as dropout or router jitter",
            )

    # --- what is measured

    @torch.no_grad()
    def _measure(self) -> dict[str, float]:
        """Mean loss over the weighted validation pairs, and means over all of them."""
        val = self._material.val
        assert val is not None
        model, was_training = self.model, self.model.training
        model.eval()
        sums = torch.zeros(len(self.measured) + 3, dtype=torch.float64, device=self.args.device)
        with generators_kept():
            for numbers in self._shares(val):
                batch = on_device(val.batch(numbers), self.args.device)
                with self.compute_loss_context_manager():
                    found = self._compare(model, batch, self._reference(batch, VAL))
                weights = batch["weights"].double()
                sums += torch.stack([(found.losses * weights).sum(), weights.sum(), *found.sums])
            loss, weight, *means, pairs = self.accelerator.reduce(sums, "sum").tolist()
        model.train(was_training)
        named = zip(self.measured, means, strict=True)
        result = {"val_loss": loss / weight, **{f"val_{k}": v / pairs for k, v in named}}
        self._watch(result["val_chosen_gain"])
        return result

    def _extras(self) -> dict[str, Any]:
        found = super()._extras()
        if self._material.val is None and found:
            self._watch(found["chosen_gain"])
        return found

    def _watch(self, gain: float) -> None:
        """Say once where the chosen responses grow less likely, too."""
        self._gains.append(gain)
        if is_displaced(self._gains) and not self._has_warned:
            self._has_warned = True
            log.warning(
                "the chosen responses grow less likely too, by %.2g nats a token so far: lower "
                "--lr, raise --beta, or fine-tune on them first (llmctl sft)",
                -gain,
            )


def make_arguments(config: Config, plan: TuningPlan, device: str) -> DPOConfig:
    """What DPOTrainer is told."""
    return DPOConfig(
        **common_arguments(config, plan, device),
        max_length=None,
        beta=config.beta,
        loss_type=[config.loss],
        label_smoothing=config.label_smoothing,
        precompute_ref_log_probs=not config.has_adapter,
    )
