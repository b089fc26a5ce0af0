"""From a config and encoded examples to a trainer that is ready to fit."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from llmctl import hardware
from llmctl.config.stages import SftConfig
from llmctl.console import log
from llmctl.data.audit import Audit, audit, log_summary, require_sound
from llmctl.data.supervised import SupervisedData
from llmctl.errors import UserError
from llmctl.rundir import Run
from llmctl.training.base import (
    Base,
    base_of,
    fit_batch,
    load_in,
    load_to_train,
    require_whole,
)
from llmctl.training.head import counted_loss, output_layer
from llmctl.training.placement import autocast
from llmctl.training.samples import Sampler, asks_of
from llmctl.training.selftest import require_causal, require_isolated
from llmctl.training.sequences import Rows, on_device
from llmctl.training.sft import Material, SupervisedTrainer, make_arguments
from llmctl.training.trl import Terms
from llmctl.training.tuned import announce, make_plan
from llmctl.training.tuning import TuningPlan, rhythm_of


@dataclass(frozen=True)
class Tuning:
    """What is known once the model is loaded."""

    model: Any
    plan: TuningPlan
    train: Rows
    val: Rows | None
    stops: list[int]
    """Tokens that end a response, for the generation config."""
    parameters: int
    trained_parameters: int
    base: Base

    def facts(self, data: SupervisedData, report: Audit, device: str) -> dict[str, Any]:
        """What a manifest should say."""
        return {
            "inputs": [self.base.as_input(), *data.inputs],
            "device": hardware.device_name(device),
            "parameters": self.parameters,
            "plan": asdict(self.plan),
            "rows": len(self.train),
            "audit": report.as_json(),
            "held_out": [example.name for example in data.val_examples],
        }


def audited(
    config: SftConfig, data: SupervisedData, *, is_main: bool
) -> tuple[SupervisedData, Audit]:
    """The examples that have something to learn from, and what was found of all of them.

    Raises:
        DataError: they would train a broken model.
    """
    report = audit(data, config, packing=config.packing)
    if is_main:
        log_summary(report)
    require_sound(report)
    return replace(data, train=data.train.select(data.train.trained_counts > 0)), report


def prepare(
    config: SftConfig, data: SupervisedData, accelerator: Accelerator, device: str
) -> Tuning:
    """Load the model, fit it to the tokens, adapt it, arrange the rows, make the plan.

    Raises:
        ModelError: the model does not load, is an adapter, or lets packed sequences see each other.
        UserError: sizes or targets that do not go together.
        ResourceError: an optimizer or a precision that does not run here.
    """

    def loss(model: Any, numbers: list[int]) -> Tensor:
        batch = on_device(train.batch(numbers), model.device)
        return counted_loss(model, output_layer(model), batch, chunked=config.chunked_loss).loss

    require_whole(accelerator, "sft")
    if config.sample_prompt and data.val is None:
        raise UserError(
            "--sample-prompt is answered at every evaluation, and there is no validation data",
            hint="drop it, or hold some examples out: --val-size",
        )
    model, stops = load_to_train(config, data, data.end_of_turn, device)
    pad = data.tokenizer.pad_token_id or 0
    train = Rows(data.train, pad, data.max_length if config.packing else None)
    val = None if data.val is None else Rows(data.val, pad)
    plan, trained, parameters = make_plan(config, model, len(train), accelerator, device)
    with autocast(plan, device):
        require_causal(model.to(device), data.embedding_rows)
        if config.packing:
            require_isolated(model, train, data.embedding_rows)
    plan = fit_batch(config, plan, model, train.lengths, loss, accelerator, device)
    tuning = Tuning(model, plan, train, val, stops, parameters, trained, base_of(config.model))
    if accelerator.is_main_process:
        announce(plan, trained, parameters, "rows")
        if config.packing:
            log.info("%s sequences in %s rows", f"{len(data.train):,}", f"{len(train):,}")
    return tuning


def build(config: SftConfig, data: SupervisedData, tuning: Tuning, run: Run) -> SupervisedTrainer:
    """The trainer, ready to fit."""
    identity = {
        **tuning.plan.identity(),
        "data": data.train.digest(),
        "validation": None if data.val is None else data.val.digest(),
        "model": tuning.base.sha256,
        "max_length": data.max_length,
        "packing": config.packing,
        "chunked_loss": config.chunked_loss,
        "load_in": load_in(config),
    }
    asks = asks_of(config, data.format, data.train_examples, data.val_examples)
    sampler = Sampler(config, asks, data.tokenizer, tuning.model, tuning.stops, run)
    rhythm = rhythm_of(config, tuning.plan)
    terms = Terms(run, rhythm, identity, config.group_by_length, sampler.write)
    return SupervisedTrainer(
        Material(tuning.model, data.tokenizer, tuning.train, tuning.val),
        tuning.plan,
        make_arguments(config, tuning.plan, hardware.pick_device(config.device)),
        terms,
        chunked=config.chunked_loss,
    )
