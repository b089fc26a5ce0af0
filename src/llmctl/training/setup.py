"""From a config and token shards to a trainer: choose, count, plan; then allocate and place."""

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedTokenizerBase

from llmctl import hardware, shapes
from llmctl.attention import CAUSAL, attend
from llmctl.config.stages import PretrainConfig
from llmctl.console import log, short
from llmctl.data.shards import TokenIndex, open_tokens
from llmctl.data.vocabulary import fingerprint
from llmctl.decode.loop import context_size
from llmctl.errors import DataError, ModelError, UserError
from llmctl.models import load_causal_lm, load_config, load_tokenizer
from llmctl.quantized import require_full
from llmctl.rundir import Run
from llmctl.training.batches import Batches
from llmctl.training.job import Job, Rhythm
from llmctl.training.loop import evaluate, loss_of
from llmctl.training.optimizers import make_optimizers
from llmctl.training.placement import is_sharded
from llmctl.training.plan import Plan, make_plan, preset_for
from llmctl.training.probe import agreed_batch, largest_batch
from llmctl.training.samples import Sampler, beginnings
from llmctl.training.state import architecture, capture
from llmctl.training.trainer import Trainer


@dataclass(frozen=True)
class Setup:
    """What is known before anything is allocated."""

    index: TokenIndex
    tokenizer: PreTrainedTokenizerBase
    architecture: PreTrainedConfig
    parameters: int
    plan: Plan
    accelerator: Accelerator
    device: str

    def facts(self) -> dict[str, Any]:
        """What a manifest should say of it."""
        return {
            "world_size": self.accelerator.num_processes,
            "device": hardware.device_name(self.device),
            "parameters": self.parameters,
            "plan": asdict(self.plan),
        }


def prepare(config: PretrainConfig, tokens: Path, accelerator: Accelerator, device: str) -> Setup:
    """Open the tokens, choose the architecture, count its parameters, and make the plan.

    Args:
        config: the command's fields.
        tokens: folder that holds tokenizer/ and tokens/.
        accelerator: processes.
        device: type of device.

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
    parameters = shapes.count_parameters(architecture)
    longest = context_size(architecture)
    if longest is None:
        raise ModelError("this architecture has no fixed number of positions: not supported yet")
    context = config.context or min(longest, LONGEST_CONTEXT)
    if context > longest:
        raise UserError(f"--context {context}: the model has {longest} positions")
    plan = make_plan(
        config,
        parameters=parameters,
        train_tokens=index.train.tokens,
        context=context,
        world_size=accelerator.num_processes,
        device=device,
        sharded=is_sharded(accelerator),
    )
    setup = Setup(index, tokenizer, architecture, parameters, plan, accelerator, device)
    if accelerator.is_main_process:
        _announce(setup)
    return setup


def build(config: PretrainConfig, setup: Setup, run: Run) -> Trainer:
    """Allocate the model and its optimizers, place them, and put the trainer together."""
    plan, device, accelerator = setup.plan, setup.device, setup.accelerator
    set_seed(config.seed)
    train = Batches(setup.index.train, plan.context, config.seed)
    model = _new_model(config, setup)
    model.train()
    flops = shapes.flops_per_token(
        shapes.active_parameters(model), setup.architecture, plan.context
    )
    if config.compile:
        if is_sharded(accelerator):
            raise UserError("--compile has not been made to work under FSDP", hint="drop --compile")
        model.compile()
    placed, *wrapped = accelerator.prepare(model, *make_optimizers(model, plan, device))
    optimizers = [optimizer.optimizer for optimizer in wrapped]
    split = setup.index.val or setup.index.train
    asks = [] if is_sharded(accelerator) else beginnings(config, setup.tokenizer, split)
    stops = [] if setup.tokenizer.eos_token_id is None else [int(setup.tokenizer.eos_token_id)]
    sampler = Sampler(config, asks, setup.tokenizer, model, stops, run)
    job = Job(
        title="pretrain",
        run=run,
        accelerator=accelerator,
        device=device,
        identity=_identity(setup),
        rhythm=_rhythm(config, plan),
        flops_per_token=flops,
        capture=lambda: capture(placed, optimizers, job.progressed, rank=job.rank),
        evaluate=None if setup.index.val is None else lambda: evaluate(trainer),
        lr=lambda: plan.lr_at(job.progressed.step - 1),
        sample=sampler.write,
    )
    trainer = Trainer(placed, optimizers, plan, train, setup.index.val, job)
    return trainer


def with_largest_batch(config: PretrainConfig, setup: Setup, known: dict[str, Any] | None) -> Setup:
    """The setup with the largest batch that fits, tried on a copy; a step keeps its size.

    Args:
        config: the command's fields.
        setup: its plan says how many sequences make a step.
        known: the plan of the run that is resumed, if one is.
    """
    size, passes = agreed_batch(
        lambda total: _try_batches(config, setup, total),
        setup.plan.batch_size,
        setup.plan.grad_accum,
        known=known,
        accelerator=setup.accelerator,
        device=setup.device,
    )
    return replace(setup, plan=replace(setup.plan, batch_size=size, grad_accum=passes))


def _try_batches(config: PretrainConfig, setup: Setup, total: int) -> int:
    plan, device = setup.plan, setup.device
    model = _new_model(config, setup).to(device).train()
    optimizers = make_optimizers(model, plan, device)

    def step(size: int) -> None:
        tokens = torch.randint(setup.architecture.vocab_size, (size, plan.context), device=device)
        loss = loss_of(model, (tokens, tokens), plan, device)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return largest_batch(step, total, device)


LONGEST_CONTEXT = 4096
"""Training sequences of a model with more positions than this are cut to it by default."""


def _new_model(config: PretrainConfig, setup: Setup) -> Any:
    """The model with its first weights, on the CPU."""
    model: Any = (
        load_causal_lm(config.model, dtype=torch.float32)
        if config.model
        else shapes.new_model(setup.architecture)
    )
    if setup.plan.precision == "pure-bf16":
        log.warning("pure bf16 weights: updates smaller than 1/256 of a weight vanish")
        for weight in model.parameters():  # buffers such as rotary frequencies stay exact
            weight.data = weight.data.to(torch.bfloat16)
    if setup.device == "cuda" and setup.plan.precision != "fp32":
        torch.set_float32_matmul_precision("high")
    _attend_causally(model)
    return model


def _identity(setup: Setup) -> dict[str, Any]:
    """What a run must share with this one to resume from it."""
    return {
        **setup.plan.identity(),
        "architecture": architecture(setup.architecture),
        "tokens": _content_hash(setup.index),
        "tokenizer": setup.index.tokenizer_sha256,
    }


def _rhythm(config: PretrainConfig, plan: Plan) -> Rhythm:
    return Rhythm(
        max_steps=plan.max_steps,
        log_every=config.log_every or min(100, max(1, plan.max_steps // 100)),
        eval_every=plan.eval_every,
        save_every=plan.save_every,
        keep=config.keep,
        early_stop=plan.early_stop,
        on_nan=config.on_nan,
        max_nan_skips=config.max_nan_skips,
    )


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
    return shapes.new_config(config, preset, index.vocab_size, tokenizer)


def _require_match(tokenizer: Any, index: TokenIndex, tokens: Path) -> None:
    """Refuse tokens that another tokenizer made: they would be read as other text."""
    if fingerprint(tokenizer.backend_tokenizer) != index.tokenizer_sha256:
        raise DataError(
            "these tokens are of another tokenizer than the model's",
            file=tokens,
            hint="tokenize again: llmctl tokenize --tokenizer MODEL --data … -o …",
        )


def _announce(setup: Setup) -> None:
    plan, shape = setup.plan, setup.architecture
    log.info(
        "%s, %s parameters (%s layers, width %s), %s on %s",
        shape.model_type,
        f"{setup.parameters:,}",
        shape.num_hidden_layers,
        shape.hidden_size,
        plan.precision,
        hardware.device_name(setup.device),
    )
    if plan.warmup_steps > plan.max_steps:
        log.warning("warm-up is longer than the run: the learning rate stays low")
    tokens = plan.max_steps * plan.tokens_per_step
    log.info(
        "%s steps of %s tokens (context %d): %s tokens, %.1f epochs; %s, lr %g",
        f"{plan.max_steps:,}",
        f"{plan.tokens_per_step:,}",
        plan.context,
        short(tokens),
        tokens / setup.index.train.tokens,
        plan.optimizer,
        plan.lr,
    )
