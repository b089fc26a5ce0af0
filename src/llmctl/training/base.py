"""The language model that a run trains further: loaded, fitted to its tokenizer, adapted.

In: a reference to a model and what its data needs. Out: the model, and the tokens that end what it
writes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from llmctl import hardware
from llmctl.adapters import weights_sha256
from llmctl.config.stages import DpoConfig, PpoConfig, SftConfig
from llmctl.config.supervised import Quantized
from llmctl.config.tuning import Tuning
from llmctl.data.hub import model_input
from llmctl.embeddings import grow_embeddings
from llmctl.errors import ModelError, UserError
from llmctl.models import load_causal_lm, load_config, local_folder
from llmctl.quantized import LoadIn, require_full
from llmctl.resume import earlier_manifest
from llmctl.rundir import resolve_model
from llmctl.training.adapters import adapt
from llmctl.training.placement import autocast, is_sharded
from llmctl.training.probe import agreed_batch, fitting_batch
from llmctl.training.tuning import TuningPlan


@dataclass(frozen=True)
class Base:
    """The model that a run starts from."""

    reference: str
    """As it was given."""
    sha256: str
    """Of its weights."""

    def as_input(self) -> dict[str, Any]:
        """For the manifest."""
        return model_input("model", self.reference, self.sha256)


class Spoken(Protocol):
    """Data that is encoded for the model."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, its chat template set."""

    @property
    def embedding_rows(self) -> int:
        """Rows of the model's embedding, before tokens were added."""

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """Special tokens that the chat template needs and the tokenizer lacked."""


def base_of(reference: str) -> Base:
    """What a manifest and a checkpoint say of the model."""
    return Base(reference, weights_sha256(local_folder(resolve_model(reference))))


def load_to_train(
    config: SftConfig | DpoConfig, data: Spoken, end_of_turn: int | None, device: str
) -> tuple[Any, list[int]]:
    """The model, with a row for every token and an adapter where one is to be trained.

    Args:
        config: the command's fields.
        data: encoded for it.
        end_of_turn: the token that ends a turn, where there are conversations.
        device: type of device.

    Returns:
        The model, and the tokens that end what it writes.

    Raises:
        ModelError: the model does not load, or is an adapter.
        UserError: targets of an adapter that do not go.
    """
    set_seed(config.seed)
    model = load_base(config, device)
    grow_embeddings(model, data.tokenizer)
    stops = set_stops(model, data.tokenizer, end_of_turn)
    if config.has_adapter:
        added = set(data.tokenizer.convert_tokens_to_ids(list(data.added_tokens)))
        grown = range(data.embedding_rows, model.get_input_embeddings().weight.shape[0])
        model = adapt(model, config, added_tokens=sorted({*added, *grown}))
    return model, stops


def load_in(config: Quantized) -> LoadIn:
    """How the weights are to be held."""
    return "4bit" if config.load_in_4bit else "8bit" if config.load_in_8bit else "full"


def set_stops(model: Any, tokenizer: PreTrainedTokenizerBase, end_of_turn: int | None) -> list[int]:
    """Tell the model's generation config every token that ends a turn; return them, sorted."""
    known = model.generation_config.eos_token_id if model.generation_config else None
    ends = [*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id]
    stops = sorted({int(token) for token in (*ends, end_of_turn) if token is not None})
    # all else of it may be what transformers loads and refuses to save
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stops or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    return stops


def require_whole(accelerator: Accelerator, stage: str) -> None:
    """Refuse to train a model whose weights are spread over several devices.

    Raises:
        UserError: FSDP is in force.
    """
    if is_sharded(accelerator):
        raise UserError(
            f"FSDP is in force, and {stage} has not been made to work under it",
            hint="use DDP (recipes/accelerate/ddp.yaml); --load-in-4bit and "
            "--activation-checkpointing save memory",
        )


def fit_batch(
    config: Tuning,
    plan: TuningPlan,
    model: Any,
    lengths: Sequence[int],
    loss: Callable[[Any, list[int]], Tensor],
    accelerator: Accelerator,
    device: str,
) -> TuningPlan:
    """The plan, with the largest batch that fits where that was asked for. Collective.

    Args:
        config: the command's fields.
        plan: so far.
        model: as it will train.
        lengths: of its rows.
        loss: of rows with these numbers, by a copy of the model.
        accelerator: processes.
        device: type of device.
    """
    if not config.find_batch_size:
        return plan

    def loss_of(copied: Any, numbers: list[int]) -> Tensor:
        with autocast(plan, device):
            return loss(copied, numbers)

    size, passes = agreed_batch(
        lambda total: fitting_batch(model.to(device), loss_of, lengths, total, config),
        plan.batch_size,
        plan.grad_accum,
        known=earlier_manifest(config).get("plan"),
        accelerator=accelerator,
        device=device,
    )
    return replace(plan, batch_size=size, grad_accum=passes)


def load_base(config: SftConfig | DpoConfig | PpoConfig, device: str) -> Any:
    """The model as it is: in float32 on the CPU, or quantized where it is to run.

    Raises:
        ModelError: it does not load, is an adapter, or is quantized.
    """
    how = load_in(config)
    require_full(load_config(config.model), config.model, "be trained")
    if how == "full":
        model = load_causal_lm(config.model, dtype=torch.float32)
    else:
        halves = device == "cuda" and hardware.has_bf16(device) and config.precision != "fp32"
        dtype = torch.bfloat16 if halves else torch.float32
        model = load_causal_lm(config.model, dtype=dtype, device=device, load_in=how)
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
