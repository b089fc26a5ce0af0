"""Supervised fine-tuning: examples and a language model in, a trainer out."""

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from llmctl.config.commands.sft import SftConfig
from llmctl.console import log
from llmctl.data.audit.audit import Audit, audit, log_summary, require_sound
from llmctl.data.sft import SftData
from llmctl.numbers import counted
from llmctl.runs.directory import Run
from llmctl.training.base_model import (
    Prepared,
    load_in,
    load_language_model,
    prepare,
    require_prompts,
)
from llmctl.training.batches import Batch, SequenceRows, on_device
from llmctl.training.distributed import autocast
from llmctl.training.loop import Trainer
from llmctl.training.model_checks import require_causal, require_isolated
from llmctl.training.objective import Loss, Validation
from llmctl.training.samples import TextSampler, prompts_of
from llmctl.training.token_loss import TokenLoss, require_chunkable, token_loss_of


class SupervisedTokens:
    """Cross-entropy of the tokens that are trained on, a mean over tokens."""

    figures = ("token_accuracy",)

    def __init__(self, token_loss: TokenLoss, val: Validation | None) -> None:
        """Take the loss of the model's tokens and the validation data."""
        self.token_loss, self.val = token_loss, val

    def loss(self, model: Any, batch: Batch) -> Loss:
        """Sum over the trained tokens of a batch."""
        tokens = self.token_loss(model, batch)
        sums = torch.stack([tokens.correct, tokens.correct.new_tensor(batch["weight"])])
        return Loss(tokens.losses.sum(), batch["weight"], sums, tokens.balance)

    def validate(self, model: Any) -> dict[str, float]:
        """Mean loss and accuracy over every trained token of the validation data."""
        assert self.val is not None
        loss, correct, tokens = self.val.sums(model, self._measure).tolist()
        return {"val_loss": loss / tokens, "val_token_accuracy": correct / tokens}

    def _measure(self, model: Any, batch: Batch) -> Tensor:
        """Return (3,): summed loss, right guesses and trained tokens of a batch."""
        tokens = self.token_loss(model, batch)
        losses = tokens.losses.double()
        return torch.stack([losses.sum(), tokens.correct, losses.new_tensor(batch["weight"])])


def audited(config: SftConfig, data: SftData, *, is_main: bool) -> tuple[SftData, Audit]:
    """Keep the examples that teach something, and the report; raise a DataError if it is bad."""
    report = audit(data, config, packing=config.packing)
    if is_main:
        log_summary(report)
    require_sound(report)
    return replace(data, train=data.train.select(data.train.trained_counts > 0)), report


def prepare_sft(
    config: SftConfig, data: SftData, accelerator: Accelerator, device: str
) -> Prepared:
    """Load the model, fit it to the tokens, adapt it, arrange the rows.

    Raises:
        ModelError: the model does not load, is an adapter, or lets packed sequences see each other.
        UserError: sizes or targets that do not go together.
        ResourceError: an optimizer or a precision that does not run here.
    """
    require_prompts(config, data.val, "examples")
    model, stops = load_language_model(config, data, device)
    pad = data.tokenizer.pad_token_id or 0
    train = SequenceRows(data.train, pad, data.max_length if config.packing else None)
    val = None if data.val is None else SequenceRows(data.val, pad)

    def check() -> None:
        require_causal(model, data.embedding_rows)
        if config.packing:
            require_isolated(model, train, data.embedding_rows)

    def loss(copied: Any, batch: Batch) -> Loss:
        token_loss = token_loss_of(copied, chunked=config.chunked_loss)
        return SupervisedTokens(token_loss, None).loss(copied, batch)

    prepared = prepare(
        config, "rows", model, train, val, accelerator, device, loss=loss, check=check, stops=stops
    )
    if accelerator.is_main_process and config.packing:
        log.info("%s in %s", counted(len(data.train), "sequence"), counted(len(train), "row"))
    return prepared


def build_sft(
    config: SftConfig,
    data: SftData,
    prepared: Prepared,
    run: Run,
    accelerator: Accelerator,
    device: str,
) -> Trainer:
    """Put the trainer together.

    Raises:
        UserError: a loss that cannot be chunked.
        ModelError: the model has no output layer.
    """
    model, values = prepared.model, prepared.hyperparameters
    token_loss = token_loss_of(model, chunked=config.chunked_loss)
    if config.chunked_loss:
        with autocast(values.precision, device):
            require_chunkable(model, token_loss, on_device(prepared.train.batch([0]), device))
    objective = SupervisedTokens(token_loss, prepared.validation(accelerator, device))
    prompts = prompts_of(config, data.format, data.train_examples, data.val_examples)
    sampler = TextSampler(config, prompts, data.tokenizer, model, prepared.stops, run, accelerator)
    settings = {
        "packing": config.packing,
        "chunked_loss": config.chunked_loss,
        "load_in": load_in(config),
    }
    return prepared.assemble(
        config, data, run, accelerator, device, objective, settings=settings, sample=sampler.write
    )
