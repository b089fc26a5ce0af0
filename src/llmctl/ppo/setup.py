"""Set up a PPO run: a config in, a trainer that is ready to fit and its win rate out."""

from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedTokenizerBase

from llmctl.config.commands.ppo import PpoConfig
from llmctl.console import log
from llmctl.data.audit.rules import RowRules
from llmctl.data.bad_rows import BadRows
from llmctl.data.prompts import read_prompts
from llmctl.errors import DataError, ResourceError, UserError
from llmctl.models.loading import load_config, load_tokenizer, stop_tokens, trainable_parameters
from llmctl.numbers import counted, short_number
from llmctl.ppo.encoded_prompts import EncodedPrompts, PromptFormat, encode_prompts
from llmctl.ppo.hyperparameters import for_ppo, ppo_identity
from llmctl.ppo.models import ActorCritic, Models, load_models
from llmctl.ppo.rewards import RewardSum
from llmctl.ppo.rollout import RolloutSampler
from llmctl.ppo.trainer import PpoTrainer
from llmctl.ppo.win_rate import WinRate
from llmctl.runs.directory import Run
from llmctl.training.base_model import Loaded, base_of, to_pure_bf16
from llmctl.training.batches import Order
from llmctl.training.consistency import require_same
from llmctl.training.distributed import autocast, is_sharded
from llmctl.training.evaluation_share import TRAINED, Work, announce_evaluation, plan_rows
from llmctl.training.hyperparameters import Hyperparameters
from llmctl.training.optimizers import decay_groups
from llmctl.training.run_state import RunState
from llmctl.training.state import architecture, capture


@dataclass(frozen=True)
class PreparedPpo(Loaded):
    """A run with its models and prompts; the parameters are the policy's."""

    tokenizer: PreTrainedTokenizerBase
    prompts: EncodedPrompts
    held_out: EncodedPrompts
    data_inputs: list[dict[str, Any]]
    """Sources of the prompts, for the manifest."""
    eos: set[int]
    """Tokens that end a response."""
    models: Models

    def manifest_entries(self, device: str) -> dict[str, Any]:
        """Entries of the run's manifest."""
        reward_models = [model.as_input() for model in self.models.reward_models]
        return self.facts(
            [*reward_models, *self.data_inputs],
            device,
            prompts=len(self.prompts),
            held_out=[row.name for row in self.held_out.rows],
        )


def prepare_ppo(
    config: PpoConfig, accelerator: Accelerator, device: str, clock: str | None = None
) -> PreparedPpo:
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
    bad = BadRows(config.skip_bad_rows)
    rows = read_prompts(config.data, config.val_data, config.val_size, bad)
    model_config, tokenizer = load_config(config.model), load_tokenizer(config.model)
    prompt_format = PromptFormat(tokenizer, config, clock)
    rules = RowRules(tokenizer, noun="prompt")
    prompts = encode_prompts(rows.train, prompt_format, model_config, config, bad, rules)
    held_out = encode_prompts(rows.val, prompt_format, model_config, config, bad, rules)
    bad.report()
    rules.enforce()
    if 0 < len(held_out) < accelerator.num_processes:
        raise UserError(
            f"held out: {counted(len(held_out), 'prompt')}, fewer than one a process",
            hint="hold out more, or none: --val-size 0",
        )
    if not len(prompts):
        raise DataError("no prompt is left to train on", file=config.data[0])
    set_seed(config.seed)
    base = base_of(config.model)
    models = load_models(config, tokenizer, base.sha256, device)
    policy = models.actor_critic.policy
    trained, parameters = trainable_parameters(policy)
    values = for_ppo(
        config,
        parameters=parameters,
        prompts=len(prompts),
        world_size=accelerator.num_processes,
        device=device,
    )
    values = _with_evaluation(config, values, prompts, held_out)
    _set_precision(config, models, values, device)
    eos = stop_tokens(policy, tokenizer, prompt_format.end_of_turn)
    prepared = PreparedPpo(
        *(values, base, parameters, trained, tokenizer, prompts, held_out, rows.inputs),
        *(set() if config.ignore_eos else set(eos), models),
    )
    if accelerator.is_main_process:
        _announce(config, prepared)
    return prepared


def _with_evaluation(
    config: PpoConfig, values: Hyperparameters, prompts: EncodedPrompts, held_out: EncodedPrompts
) -> Hyperparameters:
    """Plan the evaluations on held-out prompts.

    Each episode is sampled, and read by the policy, the reference and the reward models.
    """
    assert values.ppo is not None
    passes = 3 + len(config.reward_model)
    lengths = [
        [len(t) + config.max_new_tokens for t in part.tokens] for part in (prompts, held_out)
    ]
    episodes = values.batch_size * values.world_size
    step = episodes * sum(lengths[0]) / len(lengths[0]) * (passes + TRAINED * values.ppo.ppo_epochs)
    pieces = [passes * length for length in lengths[1]]
    once = sum(lengths[1]) * (1 + len(config.reward_model))  # at most: the reference's responses
    is_open = not (config.val_data or config.val_size)
    work = Work(step=step, pieces=pieces, once=once)
    return plan_rows(values, config, work, is_open=is_open)


def _set_precision(config: PpoConfig, models: Models, values: Hyperparameters, device: str) -> None:
    """Have all models compute in the precision of the run."""
    models.compute_in(lambda: autocast(values.precision, device))
    if values.precision == "pure-bf16":
        for model in (models.actor_critic, models.actor_critic.reference):
            to_pure_bf16(model, values.lr)
    elif values.precision == "bf16" and config.has_adapter:
        hold_in_bf16(models.actor_critic.reference)


def build_ppo(
    config: PpoConfig,
    prepared: PreparedPpo,
    run: Run,
    accelerator: Accelerator,
    device: str,
    threads: int,
) -> tuple[PpoTrainer, WinRate]:
    """Put the trainer together, and the win rate that evaluates it."""
    values, models = prepared.hyperparameters, prepared.models
    actor_critic = models.actor_critic
    optimizers = make_optimizers(actor_critic, config, values, device)
    rank, world = accelerator.process_index, accelerator.num_processes
    identity = _identity(config, prepared, world)
    require_same(accelerator, identity, prepared.tokenizer)
    state = RunState(
        run=run,
        accelerator=accelerator,
        device=device,
        config=config,
        values=values,
        identity=identity,
        flops_per_token=None,
        capture=lambda: capture(
            actor_critic, optimizers, state.progress, {"ppo": trainer.extra_state()}, rank=rank
        ),
        evaluate=(lambda: win_rate.evaluate()) if len(prepared.held_out) else None,
        metrics=lambda: trainer.metrics,
    )
    trainer = PpoTrainer(
        config=config,
        actor_critic=actor_critic,
        optimizers=optimizers,
        rewards=RewardSum(
            models.sources,
            config.score_normalization,
            config.clip_score,
            config.missing_eos_penalty or 0.0,
        ),
        sampler=_sampler(config, prepared),
        prompts=prepared.prompts,
        held_out=prepared.held_out,
        order=Order(
            len(prepared.prompts),
            batch_size=values.batch_size // config.num_samples,
            rank=rank,
            world=world,
            seed=config.seed,
        ),
        state=state,
        threads=threads,
        kl_coef=config.kl_coef,
        value_source=models.value_source,
    )
    if models.value_source is not None and config.score_normalization == "none":
        actor_critic.value_scale = (models.value_source.weight, 0.0)
    win_rate = WinRate(trainer)
    return trainer, win_rate


def _sampler(config: PpoConfig, prepared: PreparedPpo) -> RolloutSampler:
    return RolloutSampler(
        prepared.tokenizer,
        config.max_new_tokens,
        config.temperature,
        prepared.eos,
        config.seed,
        config.rollout_batch_size,
    )


def make_optimizers(
    actor_critic: ActorCritic, config: PpoConfig, values: Hyperparameters, device: str
) -> list[Optimizer]:
    """AdamW over the policy, and another over the value model."""
    assert values.ppo is not None
    policy = actor_critic.policy.parameters()
    value = [*actor_critic.value.parameters(), *actor_critic.value_head.parameters()]
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
    """Keep frozen linear layers in the precision that autocast multiplies in: the same products.

    Embeddings, norms and the output layer stay in float32.
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        if type(module) is torch.nn.Linear and module is not head:
            module.weight.data = module.weight.data.to(torch.bfloat16)


def _identity(config: PpoConfig, prepared: PreparedPpo, world: int) -> dict[str, Any]:
    """Everything that decides the weights: a run that resumes must have the same."""
    rows = (*prepared.prompts.rows, *prepared.held_out.rows)
    digests = [(row.digest(), row.answer) for row in rows]
    models = prepared.models
    return {
        **ppo_identity(config, prepared.hyperparameters),
        "data": sha256(repr((digests, len(prepared.held_out))).encode()).hexdigest(),
        "model": prepared.base.sha256,
        "reward_model": [
            [reward_model.sha256, source.weight, *reward_model.unusual_reading]
            for reward_model, source in zip(models.reward_models, models.sources, strict=False)
        ],
        "architecture": architecture(models.actor_critic.policy.config),
        "world_size": world,
    }


def _announce(config: PpoConfig, prepared: PreparedPpo) -> None:
    values = prepared.hyperparameters
    assert values.ppo is not None
    log.info(
        "%s parameters, %s of them trained; %s, %s held out; rewards: %s",
        short_number(prepared.parameters),
        short_number(prepared.trained_parameters),
        counted(len(prepared.prompts), "prompt"),
        f"{len(prepared.held_out):,}",
        ", ".join(f"{s.name} x {s.weight:g}" for s in prepared.models.sources),
    )
    origin = prepared.models.value_source
    log.info(
        "%s of %s, %s in %s; peak learning rate %g, %s, %s; the value model starts from %s",
        counted(values.max_steps, "step"),
        counted(values.batch_size, "episode"),
        counted(values.ppo.ppo_epochs, "pass", "passes"),
        counted(values.ppo.minibatches, "minibatch", "minibatches"),
        values.lr,
        values.schedule,
        values.precision,
        "the policy" if origin is None else f"the reward model {origin.name}",
    )
    held_out = len(prepared.held_out)
    announce_evaluation(values, read=values.eval_rows or held_out, total=held_out, unit="prompt")
    if config.reward_rule and not config.reward_model:
        log.info("rules are not normalised: --kl-coef is in their units")
