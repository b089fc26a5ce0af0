"""From a config and encoded examples to a trainer that is ready to fit."""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig

from llmctl import hardware
from llmctl.adapters import weights_sha256
from llmctl.config.stages import PpoConfig, SftConfig
from llmctl.config.supervised import Quantized
from llmctl.console import log
from llmctl.data.audit import Audit, audit, log_summary, require_sound
from llmctl.data.supervised import SupervisedData
from llmctl.embeddings import grow_embeddings
from llmctl.errors import ModelError, UserError
from llmctl.models import load_causal_lm, local_folder
from llmctl.quantized import LoadIn
from llmctl.resume import earlier_manifest
from llmctl.rundir import Run, resolve_model
from llmctl.training.adapters import adapt
from llmctl.training.head import counted_loss, output_layer
from llmctl.training.placement import autocast, is_sharded
from llmctl.training.probe import agreed_batch, fitting_batch
from llmctl.training.samples import Sampler
from llmctl.training.selftest import require_causal, require_isolated
from llmctl.training.sequences import Rows, on_device
from llmctl.training.sft import Material, SupervisedTrainer, make_arguments
from llmctl.training.trl import Terms
from llmctl.training.tuned import announce, make_plan
from llmctl.training.tuning import TuningPlan, rhythm_of


@dataclass(frozen=True)
class Base:
    """The model that a run starts from."""

    reference: str
    """As it was given."""
    sha256: str
    """Of its weights."""

    def as_input(self) -> dict[str, Any]:
        """For the manifest."""
        return {"role": "model", "path": self.reference, "sha256": self.sha256}


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
    _require_supported(config, data, accelerator)
    set_seed(config.seed)
    model = load_base(config, device)
    grow_embeddings(model, data.tokenizer)
    stops = set_stops(model, data)
    if config.has_adapter:
        added = set(data.tokenizer.convert_tokens_to_ids(list(data.added_tokens)))
        grown = range(data.embedding_rows, model.get_input_embeddings().weight.shape[0])
        model = adapt(model, config, added_tokens=sorted({*added, *grown}))
    pad = data.tokenizer.pad_token_id or 0
    train = Rows(data.train, pad, data.max_length if config.packing else None)
    val = None if data.val is None else Rows(data.val, pad)
    plan, trained, parameters = make_plan(config, model, len(train), accelerator, device)
    with autocast(plan, device):
        require_causal(model.to(device), data.embedding_rows)
        if config.packing:
            require_isolated(model, train, data.embedding_rows)
    if config.find_batch_size:
        loss_of = partial(_loss_of, plan, train, chunked=config.chunked_loss)
        size, passes = agreed_batch(
            lambda total: fitting_batch(model.to(device), loss_of, train.lengths, total, config),
            plan.batch_size,
            plan.grad_accum,
            known=earlier_manifest(config).get("plan"),
            accelerator=accelerator,
            device=device,
        )
        plan = replace(plan, batch_size=size, grad_accum=passes)
    base = Base(config.model, weights_sha256(local_folder(resolve_model(config.model))))
    tuning = Tuning(model, plan, train, val, stops, parameters, trained, base)
    if accelerator.is_main_process:
        announce(plan, trained, parameters, "rows")
        if config.packing:
            log.info("%s sequences in %s rows", f"{len(data.train):,}", f"{len(train):,}")
    return tuning


def _require_supported(config: SftConfig, data: SupervisedData, accelerator: Accelerator) -> None:
    if is_sharded(accelerator):
        raise UserError(
            "FSDP is in force, and sft has not been made to work under it",
            hint="use DDP (recipes/accelerate/ddp.yaml); --load-in-4bit and "
            "--activation-checkpointing save memory",
        )
    if config.sample_prompt and data.val is None:
        raise UserError(
            "--sample-prompt is answered at every evaluation, and there is no validation data",
            hint="drop it, or hold some examples out: --val-size",
        )


def _loss_of(
    plan: TuningPlan, rows: Rows, copied: Any, numbers: list[int], *, chunked: bool
) -> Tensor:
    batch = on_device(rows.batch(numbers), copied.device)
    with autocast(plan, copied.device.type):
        return counted_loss(copied, output_layer(copied), batch, chunked=chunked).loss


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
        "load_in": _load_in(config),
    }
    terms = Terms(run, rhythm_of(config, tuning.plan), identity, config.group_by_length)
    sampler = Sampler(config, data, tuning.model, tuning.stops, run)
    return SupervisedTrainer(
        Material(tuning.model, data.tokenizer, tuning.train, tuning.val, sampler.write),
        tuning.plan,
        make_arguments(config, tuning.plan, hardware.pick_device(config.device)),
        terms,
        chunked=config.chunked_loss,
    )


def set_stops(model: Any, data: SupervisedData) -> list[int]:
    """Tell the model's generation config every token that ends a turn; return them, sorted."""
    known = model.generation_config.eos_token_id if model.generation_config else None
    ends = [*(known if isinstance(known, list) else [known]), data.tokenizer.eos_token_id]
    if data.has_conversations:
        ends.append(data.format.end_of_turn)
    stops = sorted({int(token) for token in ends if token is not None})
    # all else of it may be what transformers loads and refuses to save
    model.generation_config = GenerationConfig(
        bos_token_id=data.tokenizer.bos_token_id,
        eos_token_id=stops or None,
        pad_token_id=data.tokenizer.pad_token_id,
    )
    return stops


def load_base(config: SftConfig | PpoConfig, device: str) -> Any:
    """The model that a run starts from: in float32 on the CPU, or quantized where it is to run.

    Raises:
        ModelError: it does not load, or is an adapter.
    """
    load_in = _load_in(config)
    if load_in == "full":
        model = load_causal_lm(config.model, dtype=torch.float32)
    else:
        halves = device == "cuda" and hardware.has_bf16(device) and config.precision != "fp32"
        dtype = torch.bfloat16 if halves else torch.float32
        model = load_causal_lm(config.model, dtype=dtype, device=device, load_in=load_in)
    if isinstance(model, PeftModel):
        is_prompt = model.active_peft_config.is_prompt_learning
        raise ModelError(
            "this model is an adapter, and a second one on it could not be loaded again",
            file=Path(config.model),
            hint="its virtual tokens cannot be merged: fine-tune its base"
            if is_prompt
            else f"merge it first: llmctl merge --model {config.model} -o runs/merged",
        )
    return model


def _load_in(config: Quantized) -> LoadIn:
    return "4bit" if config.load_in_4bit else "8bit" if config.load_in_8bit else "full"
