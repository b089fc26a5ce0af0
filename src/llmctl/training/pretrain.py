"""Pretraining: a config and token shards in; a trainer that predicts every next token out."""

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedTokenizerBase

from llmctl import hardware
from llmctl.config.commands.pretrain import PretrainConfig
from llmctl.console import log
from llmctl.data.shards import TokenIndex, TokenSplit, open_tokens
from llmctl.data.tokenizer.train import fingerprint
from llmctl.errors import DataError, ModelError, UserError
from llmctl.models import presets
from llmctl.models.loading import context_size, load_causal_lm, load_config, load_tokenizer
from llmctl.models.patched_attention import CAUSAL, attend
from llmctl.models.quantized import require_full
from llmctl.numbers import counted, short_number
from llmctl.runs.directory import Run
from llmctl.training.base_model import flops_of, to_pure_bf16
from llmctl.training.batches import (
    Batch,
    WindowBatches,
    Windows,
    validation_sizes,
    validation_windows,
)
from llmctl.training.distributed import autocast, is_sharded
from llmctl.training.evaluation_share import TRAINED, Work, announce_evaluation, plan_evaluation
from llmctl.training.hyperparameters import Hyperparameters, for_pretraining, preset_for
from llmctl.training.loop import Trainer, assemble
from llmctl.training.model_checks import CAUSAL_TOKENS, require_causal
from llmctl.training.objective import Loss, Validation
from llmctl.training.optimizers import make_optimizers
from llmctl.training.probe import agreed_batch, largest_batch
from llmctl.training.samples import BEGINNING, TextSampler, beginnings, sampled_tokens
from llmctl.training.state import architecture
from llmctl.training.token_loss import router_loss

EVAL_TOKENS = 131_072
"""Validation tokens that an evaluation reads by default, at most."""
LONGEST_CONTEXT = 4096
"""Training sequences of a model with more positions than this are cut to it by default."""


@dataclass(frozen=True)
class PreparedPretraining:
    """A pretraining run before anything is allocated."""

    index: TokenIndex
    tokenizer: PreTrainedTokenizerBase
    architecture: PreTrainedConfig
    parameters: int
    hyperparameters: Hyperparameters
    accelerator: Accelerator
    device: str

    def facts(self) -> dict[str, Any]:
        """Return the manifest's entries."""
        return {
            "world_size": self.accelerator.num_processes,
            "device": hardware.device_name(self.device),
            "parameters": self.parameters,
            "plan": self.hyperparameters.as_json(),
        }


def prepare_pretraining(
    config: PretrainConfig, tokens: Path, accelerator: Accelerator, device: str
) -> PreparedPretraining:
    """Open the tokens, choose the architecture, count its parameters, and fill in the rest.

    `tokens` is a folder that holds tokenizer/ and tokens/.

    Raises:
        DataError: tokens that are damaged, too few, or not of the model's tokenizer.
        UserError: sizes that do not go together.
    """
    index = open_tokens(tokens / "tokens")
    tokenizer = load_tokenizer(config.model or str(tokens))
    _require_match(tokenizer, index, tokens)
    architecture = _architecture(config, index, tokenizer, device)
    if index.vocab_size > architecture.vocab_size:
        raise DataError(
            f"tokens of a vocabulary of {index.vocab_size:,} do not fit a model of "
            f"{architecture.vocab_size:,}",
            file=tokens,
        )
    parameters = presets.count_parameters(architecture)
    longest = context_size(architecture)
    if longest is None:
        raise ModelError("this architecture has no fixed number of positions: not supported yet")
    context = config.context or min(longest, LONGEST_CONTEXT)
    if context > longest:
        raise UserError(f"--context {context}: the model has {longest} positions")
    hyperparameters = for_pretraining(
        config,
        parameters=parameters,
        train_tokens=index.train.tokens,
        context=context,
        world_size=accelerator.num_processes,
        device=device,
        sharded=is_sharded(accelerator),
    )
    hyperparameters = _with_evaluation(config, hyperparameters, index.val)
    prepared = PreparedPretraining(
        index, tokenizer, architecture, parameters, hyperparameters, accelerator, device
    )
    if accelerator.is_main_process:
        _announce(prepared)
    return prepared


class LanguageModelling:
    """Cross-entropy of every next token (Bengio et al., 2003)."""

    figures = ()

    def __init__(self, config: PreTrainedConfig, split: TokenSplit | None, val: Validation | None):
        """Take the model's configuration, and the validation data of a split."""
        self.config, self.split, self.val = config, split, val

    def loss(self, model: Any, batch: Batch) -> Loss:
        """Sum over all targets, by the model's own loss function."""
        targets = batch["targets"]
        output = model(
            input_ids=batch["input_ids"],
            labels=targets,
            shift_labels=targets,
            num_items_in_batch=1,
            use_cache=False,
        )
        balance = router_loss(self.config, output)
        total = output.loss if balance is None else output.loss - balance  # the model added it
        return Loss(total, batch["weight"], mean=balance)

    def validate(self, model: Any) -> dict[str, float]:
        """Validation loss in nats per token, its perplexity, and bits per byte of text."""
        assert self.val is not None
        assert self.split is not None
        nats, count = self.val.sums(model, _nats).tolist()
        loss = nats / count
        tokens_per_byte = self.split.tokens / self.split.bytes
        return {
            "val_loss": loss,
            "val_perplexity": math.exp(min(loss, 700)),
            "val_bits_per_byte": loss / math.log(2) * tokens_per_byte,
        }


def _nats(model: Any, batch: Batch) -> Tensor:
    """(2,) summed loss of a batch in nats, and its targets."""
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    targets = batch["targets"]
    nats = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
    return torch.stack([nats, nats.new_tensor(targets.numel())])


def build_pretraining(config: PretrainConfig, prepared: PreparedPretraining, run: Run) -> Trainer:
    """Allocate the model and its optimizers, place them, and put the trainer together.

    Raises:
        ModelError: a model that was given does not load, or sees what it is to predict.
    """
    values, device, accelerator = prepared.hyperparameters, prepared.device, prepared.accelerator
    index, tokenizer = prepared.index, prepared.tokenizer
    assert values.context is not None
    set_seed(config.seed)
    windows = Windows(index.train, values.context, config.seed)
    model = _new_model(config, prepared)
    if config.model or config.config_from:
        require_causal(model, index.vocab_size, min(CAUSAL_TOKENS, values.context))
    model.train()
    prompts = beginnings(config, tokenizer, index.val or index.train)
    stops = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    rank, world = accelerator.process_index, accelerator.num_processes
    return assemble(
        config,
        run,
        accelerator,
        device,
        model,
        values,
        LanguageModelling(model.config, index.val, _validation(prepared)),
        WindowBatches(windows, values.batch_size, values.grad_accum, rank, world),
        identity={
            "architecture": architecture(prepared.architecture),
            "tokens": _content_hash(index),
            "tokenizer": index.tokenizer_sha256,
        },
        tokenizer=tokenizer,
        validates=index.val is not None,
        flops_per_token=flops_of(model, values.context, device),
        sample=TextSampler(config, prompts, tokenizer, model, stops, run, accelerator).write,
        compiles_whole=True,
        may_skip_weights=False,
    )


def _validation(prepared: PreparedPretraining) -> Validation | None:
    """Validation over windows, as many at a time as a step takes."""
    values, split = prepared.hyperparameters, prepared.index.val
    if split is None:
        return None
    context, limit = values.context, values.eval_tokens
    assert context is not None
    assert limit is not None
    size = max(1, min(16_384 // context, 2 * values.batch_size))  # within what training takes
    accelerator = prepared.accelerator
    rank, world = accelerator.process_index, accelerator.num_processes
    return Validation(
        lambda: validation_windows(split, context, size, limit, rank, world),
        accelerator,
        prepared.device,
        values.precision,
    )


def with_largest_batch(
    config: PretrainConfig, prepared: PreparedPretraining, known: dict[str, Any] | None
) -> PreparedPretraining:
    """The same with the largest batch that fits, tried on a copy; a step keeps its size.

    `known` are the hyperparameters of the run that is resumed, if one is.
    """
    values = agreed_batch(
        lambda total: _try_batches(config, prepared, total),
        prepared.hyperparameters,
        known,
        prepared.accelerator,
        prepared.device,
    )
    return replace(prepared, hyperparameters=values)


def _try_batches(config: PretrainConfig, prepared: PreparedPretraining, total: int) -> int:
    values, device = prepared.hyperparameters, prepared.device
    assert values.context is not None
    model = _new_model(config, prepared).to(device).train()
    context, vocabulary = values.context, prepared.architecture.vocab_size
    objective = LanguageModelling(model.config, None, None)

    def loss_of(size: int) -> Tensor:
        tokens = torch.randint(vocabulary, (size, context), device=device)
        batch = {"input_ids": tokens, "targets": tokens, "weight": tokens.numel()}
        with autocast(values.precision, device):
            return objective.loss(model, batch).total / tokens.numel()

    return largest_batch(make_optimizers(model, values, device), loss_of, total, device)


def _new_model(config: PretrainConfig, prepared: PreparedPretraining) -> Any:
    """The model with its first weights, on the CPU."""
    model: Any = (
        load_causal_lm(config.model, dtype=torch.float32)
        if config.model
        else presets.new_model(prepared.architecture)
    )
    if prepared.hyperparameters.precision == "pure-bf16":
        to_pure_bf16(model, prepared.hyperparameters.lr)
    if prepared.device == "cuda" and prepared.hyperparameters.precision != "fp32":
        torch.set_float32_matmul_precision("high")
    _attend_causally(model)
    return model


def _content_hash(index: TokenIndex) -> str:
    """Hex digest over all shards, from the digests in the index."""
    splits = [split for split in (index.train, index.val) if split is not None]
    digests = [shard.sha256 for split in splits for shard in split.shards]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _attend_causally(model: Any) -> None:
    """Let SDPA know that attention is causal, with no mask, which is what flash attention takes.

    Transformers builds a mask for what it cannot prove to be unpacked, at the price of a wait for
    the GPU each forward pass, or of the flash kernel where the model is compiled. Training windows
    have no padding. An attention function without a mask function gets no mask.
    """
    shape = model.config.to_dict()
    windowed = shape.get("sliding_window") is not None and shape.get("use_sliding_window", True)
    if model.config._attn_implementation == "sdpa" and not windowed:
        AttentionInterface.register(CAUSAL, attend)
        model.set_attn_implementation(CAUSAL)


def _architecture(
    config: PretrainConfig, index: TokenIndex, tokenizer: PreTrainedTokenizerBase, device: str
) -> PreTrainedConfig:
    if config.model:
        shape = load_config(config.model)
        require_full(shape, config.model, "be trained")
        return shape
    preset = preset_for(index.train.tokens, device)
    return presets.new_config(config, preset, index.vocab_size, tokenizer)


def _require_match(tokenizer: Any, index: TokenIndex, tokens: Path) -> None:
    """Refuse tokens that another tokenizer made: they would be read as other text."""
    if fingerprint(tokenizer.backend_tokenizer) != index.tokenizer_sha256:
        raise DataError(
            "these tokens are of another tokenizer than the model's",
            file=tokens,
            hint="tokenize again: llmctl tokenize --tokenizer MODEL --data … -o …",
        )


def _with_evaluation(
    config: PretrainConfig, values: Hyperparameters, split: TokenSplit | None
) -> Hyperparameters:
    """Plan the evaluations on validation windows, and the texts that are written at them."""
    context = values.context
    assert context is not None
    limit = EVAL_TOKENS if config.eval_tokens is None else config.eval_tokens
    sizes = [] if split is None else validation_sizes(split, context, limit)
    planned, read = plan_evaluation(
        values,
        config,
        Work(
            step=TRAINED * values.tokens_per_step,
            pieces=sizes,
            samples=sampled_tokens(config, BEGINNING),
        ),
        pieces=None if config.eval_tokens is None else len(sizes),
    )
    return replace(planned, eval_tokens=limit if read == len(sizes) else read * context)


def _announce(prepared: PreparedPretraining) -> None:
    values, shape = prepared.hyperparameters, prepared.architecture
    log.info(
        "%s, %s parameters (%s, width %s), %s on %s",
        shape.model_type,
        f"{prepared.parameters:,}",
        counted(shape.num_hidden_layers, "layer"),
        shape.hidden_size,
        values.precision,
        hardware.device_name(prepared.device),
    )
    if values.warmup_steps > values.max_steps:
        log.warning("warm-up is longer than the run: the learning rate stays low")
    tokens = values.max_steps * values.tokens_per_step
    log.info(
        "%s of %s tokens (context %d): %s tokens, %.1f epochs; %s, lr %g",
        counted(values.max_steps, "step"),
        f"{values.tokens_per_step:,}",
        values.context,
        short_number(tokens),
        tokens / prepared.index.train.tokens,
        values.optimizer,
        values.lr,
    )
    if prepared.index.val is not None and values.eval_tokens is not None:
        total = prepared.index.val.tokens - 1
        announce_evaluation(values, read=values.eval_tokens or total, total=total, unit="token")
