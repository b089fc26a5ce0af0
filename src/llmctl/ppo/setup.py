"""From a config to a trainer that is ready to fit, and to a judge of what it becomes."""

from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedTokenizerBase

from llmctl import hardware
from llmctl.config.commands import PpoConfig
from llmctl.console import log, short
from llmctl.data.prompts import PromptSet, read_prompts
from llmctl.decode.loop import eos_tokens
from llmctl.errors import DataError, ResourceError, UserError
from llmctl.models.loading import load_config, load_tokenizer
from llmctl.ppo.hyperparameters import for_ppo, ppo_identity
from llmctl.ppo.models import Actors, Models, load_models
from llmctl.ppo.prompts import PromptFormat, encode_prompts
from llmctl.ppo.rewards import Rewards
from llmctl.ppo.rollout import Sampler
from llmctl.ppo.trainer import Asked, PpoTrainer
from llmctl.ppo.win_rate import Judge
from llmctl.runs.directory import Run
from llmctl.training.adapters import trainable_parameters
from llmctl.training.base_model import Base, base_of, to_pure_bf16
from llmctl.training.batches import Order
from llmctl.training.distributed import autocast, is_sharded
from llmctl.training.hyperparameters import Hyperparameters
from llmctl.training.optimizers import decay_groups
from llmctl.training.run_state import RunState, intervals_of
from llmctl.training.state import architecture, capture


@dataclass(frozen=True)
class Setup:
    """What is known once the models are loaded."""

    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSet
    asked: Asked
    held_out: Asked
    stops: set[int]
    """Tokens that end a response."""
    models: Models
    hyperparameters: Hyperparameters
    base: Base
    parameters: int
    trained_parameters: int

    def facts(self, device: str) -> dict[str, Any]:
        """What a manifest should say."""
        judges = [judge.as_input() for judge in self.models.judges]
        return {
            "inputs": [self.base.as_input(), *judges, *self.prompts.inputs],
            "device": hardware.device_name(device),
            "parameters": self.parameters,
            "plan": self.hyperparameters.as_json(),
            "prompts": len(self.asked),
            "held_out": [row.name for row in self.held_out.rows],
        }


def prepare(
    config: PpoConfig, accelerator: Accelerator, device: str, clock: str | None = None
) -> Setup:
    """Read the prompts, load the models, fill in the hyperparameters.

    Raises:
        DataError: prompts that are missing, empty or too long.
        ModelError: a model that does not load, or no reward model.
        UserError: settings that do not go together.
    """
    if is_sharded(accelerator):
        raise UserError(
            "FSDP is in force, and ppo has not been made to work under it",
            hint="use DDP (recipes/accelerate/ddp.yaml)",
        )
    if device == "mps":
        raise ResourceError("ppo has not been made to work on mps", hint="use --device cpu")
    prompts = read_prompts(config.data, config.val_data, config.val_size, config.skip_bad_rows)
    shape, tokenizer = load_config(config.model), load_tokenizer(config.model)
    written = PromptFormat(tokenizer, config, clock)
    asked = encode_prompts(prompts.train, written, shape, config)
    held_out = encode_prompts(prompts.val, written, shape, config)
    if 0 < len(held_out) < accelerator.num_processes:
        raise UserError(
            f"{len(held_out)} prompts are held out, fewer than one a process",
            hint="hold out more, or none: --val-size 0",
        )
    if not len(asked):
        raise DataError("no prompt is left to train on", file=config.data[0])
    set_seed(config.seed)
    base = base_of(config.model)
    models = load_models(config, tokenizer, base.sha256, device)
    trained, parameters = trainable_parameters(models.actors.policy)
    values = for_ppo(
        config,
        parameters=parameters,
        prompts=len(asked),
        world_size=accelerator.num_processes,
        device=device,
    )
    models.compute_in(lambda: autocast(values.precision, device))
    if values.precision == "pure-bf16":
        for model in (models.actors, models.actors.reference):
            to_pure_bf16(model, values.lr)
    elif values.precision == "bf16" and config.has_adapter:
        hold_in_bf16(models.actors.reference)
    stops = set() if config.ignore_eos else set(eos_tokens(models.actors.policy, tokenizer))
    stops |= set() if config.ignore_eos else written.stops
    found = Setup(
        *(tokenizer, prompts, asked, held_out, stops, models, values),
        *(base, parameters, trained),
    )
    if accelerator.is_main_process:
        _announce(config, found)
    return found


def build(
    config: PpoConfig, setup: Setup, run: Run, accelerator: Accelerator, device: str, threads: int
) -> tuple[PpoTrainer, Judge]:
    """Put the trainer together, and what compares it with the reference."""
    values, actors = setup.hyperparameters, setup.models.actors
    optimizers = make_optimizers(actors, config, values, device)
    rank, world = accelerator.process_index, accelerator.num_processes
    order = Order(
        len(setup.asked),
        batch_size=values.batch_size // config.num_samples,
        rank=rank,
        world=world,
        seed=config.seed,
    )
    state = RunState(
        title="ppo",
        run=run,
        accelerator=accelerator,
        device=device,
        identity=_identity(config, setup, world),
        intervals=intervals_of(config, values),
        flops_per_token=None,
        capture=lambda: capture(
            actors, optimizers, state.progress, {"ppo": trainer.extra_state()}, rank=rank
        ),
        evaluate=(lambda: judge.evaluate()) if len(setup.held_out) else None,
        lr=lambda: values.lr_at(state.progress.step - 1),
        metrics=lambda: trainer.latest,
    )
    trainer = PpoTrainer(
        config=config,
        hyperparameters=values,
        actors=actors,
        optimizers=optimizers,
        rewards=_rewards(config, setup),
        sampler=_sampler(config, setup),
        asked=setup.asked,
        held_out=setup.held_out,
        order=order,
        state=state,
        threads=threads,
        kl_coef=config.kl_coef,
        value_source=setup.models.value_source,
    )
    if setup.models.value_source is not None and config.score_normalization == "none":
        actors.scale = (setup.models.value_source.weight, 0.0)
    judge = Judge(trainer)
    return trainer, judge


def _rewards(config: PpoConfig, setup: Setup) -> Rewards:
    return Rewards(
        setup.models.sources,
        config.score_normalization,
        config.clip_score,
        config.missing_eos_penalty or 0.0,
    )


def _sampler(config: PpoConfig, setup: Setup) -> Sampler:
    return Sampler(
        setup.tokenizer,
        config.max_new_tokens,
        config.temperature,
        setup.stops,
        config.seed,
        config.rollout_batch_size,
    )


def make_optimizers(
    actors: Actors, config: PpoConfig, values: Hyperparameters, device: str
) -> list[Optimizer]:
    """AdamW over the policy, and another over the value model."""
    assert values.ppo is not None
    policy = [weight for weight in actors.policy.parameters() if weight.requires_grad]
    value = [*actors.value.parameters(), *actors.value_head.parameters()]
    return [
        AdamW(
            decay_groups((w for w in weights if w.requires_grad), config.weight_decay),
            lr=lr,
            betas=(config.beta1, config.beta2),
            fused=device in ("cpu", "cuda"),
        )
        for weights, lr in ((policy, values.lr), (value, values.ppo.value_lr))
    ]


def hold_in_bf16(model: Any) -> None:
    """Keep the frozen layers in the numbers that autocast multiplies in: the same products.

    What else there is, embeddings and norms, and the output layer, stays in float32.
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        if type(module) is torch.nn.Linear and module is not head:
            module.weight.data = module.weight.data.to(torch.bfloat16)


def _identity(config: PpoConfig, setup: Setup, world: int) -> dict[str, Any]:
    """What a run must share with this one to resume from it."""
    numbers = [(row.digest(), row.answer) for row in (*setup.asked.rows, *setup.held_out.rows)]
    return {
        **ppo_identity(config, setup.hyperparameters),
        "data": sha256(repr((numbers, len(setup.held_out))).encode()).hexdigest(),
        "model": setup.base.sha256,
        "reward_model": [
            [judge.sha256, source.weight]
            for judge, source in zip(setup.models.judges, setup.models.sources, strict=False)
        ],
        "architecture": architecture(setup.models.actors.policy.config),
        "world_size": world,
    }


def _announce(config: PpoConfig, setup: Setup) -> None:
    values = setup.hyperparameters
    assert values.ppo is not None
    log.info(
        "%s parameters, %s of them trained; %s prompts, %s held out; rewards: %s",
        short(setup.parameters),
        short(setup.trained_parameters),
        f"{len(setup.asked):,}",
        f"{len(setup.held_out):,}",
        ", ".join(f"{s.name} x {s.weight:g}" for s in setup.models.sources),
    )
    origin = setup.models.value_source
    log.info(
        "%s steps of %s episodes, %d passes in %d minibatches; peak learning rate %g, %s, %s; "
        "the value model starts from %s",
        f"{values.max_steps:,}",
        f"{values.batch_size:,}",
        values.ppo.ppo_epochs,
        values.ppo.minibatches,
        values.lr,
        values.schedule,
        values.precision,
        "the policy" if origin is None else f"the reward model {origin.name}",
    )
    if config.reward_rule and not config.reward_model:
        log.info("rules are not normalised: --kl-coef is in their units")
