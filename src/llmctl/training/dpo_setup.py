"""From a config and encoded pairs to a trainer that is ready to fit."""

from dataclasses import asdict, dataclass
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from llmctl import hardware
from llmctl.config.stages import DpoConfig
from llmctl.data.dpo import asked, end_of_turn
from llmctl.data.preferred import PreferenceData
from llmctl.errors import UserError
from llmctl.rundir import Run
from llmctl.training.base import Base, base_of, fit_batch, load_in, load_to_train, require_whole
from llmctl.training.dpo import Material, PreferenceTrainer, make_arguments
from llmctl.training.dpo_loss import Objective, PairRows, log_probabilities
from llmctl.training.head import output_layer
from llmctl.training.placement import autocast
from llmctl.training.samples import Sampler, asks_of
from llmctl.training.selftest import require_causal
from llmctl.training.sequences import on_device
from llmctl.training.trl import Terms
from llmctl.training.tuned import announce, make_plan
from llmctl.training.tuning import TuningPlan, rhythm_of

EPOCHS = 1
LR_SHARE = 0.1
"""Of the rate of fine-tuning: a few steps at that rate leave the reference far behind."""


@dataclass(frozen=True)
class Prepared:
    """What is known once the model is loaded."""

    model: Any
    plan: TuningPlan
    train: PairRows
    val: PairRows | None
    stops: list[int]
    """Tokens that end a response, for the generation config."""
    parameters: int
    trained_parameters: int
    base: Base

    def facts(self, data: PreferenceData, device: str) -> dict[str, Any]:
        """What a manifest should say."""
        return {
            "inputs": [self.base.as_input(), *data.inputs],
            "device": hardware.device_name(device),
            "parameters": self.parameters,
            "plan": asdict(self.plan),
            "audit": data.facts(),
            "held_out": data.held_out,
        }


def prepare(
    config: DpoConfig, data: PreferenceData, accelerator: Accelerator, device: str
) -> Prepared:
    """Load the model, fit it to the tokens, adapt it, make the plan.

    Raises:
        ModelError: the model does not load, is an adapter, or no causal language model.
        UserError: sizes or targets that do not go together.
        ResourceError: an optimizer or a precision that does not run here.
    """
    require_whole(accelerator, "dpo")
    if config.sample_prompt and data.val is None:
        raise UserError(
            "--sample-prompt is answered at every evaluation, and there is no validation data",
            hint="drop it, or hold some pairs out: --val-size",
        )
    model, stops = load_to_train(config, data, end_of_turn(data), device)
    pad = data.tokenizer.pad_token_id or 0
    train = PairRows(data.train, pad)
    val = None if data.val is None else PairRows(data.val, pad)
    plan, trained, parameters = make_plan(
        config, model, len(train), accelerator, device, epochs=EPOCHS, lr_share=LR_SHARE
    )
    with autocast(plan, device):
        require_causal(model.to(device), data.embedding_rows)

    def loss(copied: Any, numbers: list[int]) -> Tensor:
        batch = on_device(train.batch(numbers), copied.device)
        head = output_layer(copied)
        return log_probabilities(copied, head, batch, chunked=config.chunked_loss)[0].sum()

    plan = fit_batch(config, plan, model, train.lengths, loss, accelerator, device)
    if accelerator.is_main_process:
        announce(plan, trained, parameters, "pairs")
    base = base_of(config.model)
    return Prepared(model, plan, train, val, stops, parameters, trained, base)


def build(config: DpoConfig, data: PreferenceData, found: Prepared, run: Run) -> PreferenceTrainer:
    """The trainer, ready to fit. Collective."""
    identity = {
        **found.plan.identity(),
        "data": data.train.digest(),
        "validation": None if data.val is None else data.val.digest(),
        "model": found.base.sha256,
        "max_length": data.max_length,
        "chunked_loss": config.chunked_loss,
        "load_in": load_in(config),
    }
    trained = [pair.chosen for pair in data.preferences.train]
    asks = asks_of(config, data.written.chat, trained, asked(data))
    sampler = Sampler(config, asks, data.tokenizer, found.model, found.stops, run)
    rhythm = rhythm_of(config, found.plan)
    terms = Terms(run, rhythm, identity, config.group_by_length, sampler.write)
    return PreferenceTrainer(
        Material(found.model, data.tokenizer, found.train, found.val),
        found.plan,
        make_arguments(config, found.plan, hardware.pick_device(config.device)),
        terms,
        Objective(config.loss, config.beta, config.label_smoothing),
        chunked=config.chunked_loss,
    )
