"""The models of a run: policy, reference, value model and reward models.

In: the command's fields. Out: `Models`. In full, each model has weights of its own. With LoRA one
set of base weights serves policy, reference, value model and those reward models that are LoRA of
the same base: each has modules of its own to put adapters on. `ActorCritic` is what is trained,
with the reference, as functions of a pass over episodes.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
)

from llmctl.config.commands.ppo import PpoConfig
from llmctl.console import log
from llmctl.errors import ModelError, UserError
from llmctl.models.adapters import is_adapted, is_adapter, read_adapter, weights_sha256
from llmctl.models.hub import model_input
from llmctl.models.loading import find_base, local_folder
from llmctl.models.patched_lora import fuse_lora
from llmctl.ppo.episodes import Pass
from llmctl.ppo.rewards import RewardSource, parse_weight, rule_reward, unique_names
from llmctl.ppo.rules import Sample, find_rule
from llmctl.reward.model import PromptResponse, RewardModel, load_reward_model
from llmctl.runs.directory import resolve_model
from llmctl.training.adapters import adapt
from llmctl.training.base_model import load_base
from llmctl.training.token_loss import handed, output_layer

HEAD = "score"
"""Name of the head of every classifier that transformers makes of a decoder."""
SCORE_BATCH = 64
"""Responses that a reward model scores at a time."""
PROBE = "The quick brown fox, 12345 jumps;\n  naïve café."


class ActorCritic(nn.Module):
    """Policy and value model as one module, whose parameter names are those of checkpoints."""

    def __init__(
        self, policy: Any, value: Any, value_head: nn.Linear, reference: Any, *, temperature: float
    ) -> None:
        """Join the models.

        `value` is the body of the value model, which gives hidden states, and `value_head` makes
        one value of each. The reference's parameters are not the module's.
        """
        super().__init__()
        self.policy, self.value, self.value_head = policy, value, value_head
        self.temperature = temperature
        self.value_scale = 1.0, 0.0
        """(scale, shift) applied to the value head's output: a reward model's head gives scores,
        and values are of normalized ones."""
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._reference = [reference]

    @property
    def device(self) -> torch.device:
        """Device of the models."""
        return self.value_head.weight.device

    @property
    def reference(self) -> Any:
        """The policy before training."""
        return self._reference[0]

    @property
    def vocabulary(self) -> int:
        """V, logits of a token."""
        return int(self.policy.config.get_text_config().vocab_size)

    def log_probs(self, batch: Pass) -> tuple[Tensor, Tensor]:
        """Log-probabilities (n,) of the targets under the policy, and its logits (n, V)."""
        logits = self._logits(self.policy, batch)
        return selected_log_probs(logits, batch.targets), logits

    @torch.no_grad()
    def reference_log_probs(self, batch: Pass) -> Tensor:
        """Log-probabilities (n,) of the targets under the reference."""
        return selected_log_probs(self._logits(self.reference, batch), batch.targets)

    def values(self, batch: Pass) -> Tensor:
        """Values (n,) of the states before each target."""
        with self.autocast():
            states = self.value(input_ids=batch.tokens, use_cache=False).last_hidden_state
            selected = states[:, :-1].flatten(0, 1)[batch.positions]
            values: Tensor = self.value_head(selected.to(self.value_head.weight.dtype))[:, 0]
        scale, shift = self.value_scale
        return values.float() * scale + shift

    def _logits(self, model: Any, batch: Pass) -> Tensor:
        """Logits (n, V) of the targets, divided by the temperature."""
        head = output_layer(model)
        with self.autocast(), handed(head, batch.tokens.shape[1], batch.positions):
            logits: Tensor = model(input_ids=batch.tokens, use_cache=False).logits[0]
        return logits.float() / self.temperature if self.temperature != 1 else logits.float()


@dataclass
class RewardModelSource:
    """A reward model as a scorer."""

    model: RewardModel
    is_shared: bool
    """Whether it stands on the policy's weights."""
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def score(self, samples: Sequence[Sample], ended: Sequence[bool]) -> Tensor:
        """Scores (N,) of responses, given which of them ended by themselves."""
        texts = [
            PromptResponse(self._prompt(sample.prompt), sample.response, ended=has_ended)
            for sample, has_ended in zip(samples, ended, strict=True)
        ]
        with self.autocast():
            return self.model.score(texts, batch_size=SCORE_BATCH)

    def _prompt(self, prompt: Any) -> Any:
        """A prompt in the form that the reward model was trained on."""
        if isinstance(prompt, str) and self.model.has_turns:
            return [{"role": "user", "content": prompt}]
        return prompt

    @cached_property
    def sha256(self) -> str:
        """Hash of its weights."""
        return weights_sha256(self.model.folder)

    def as_input(self) -> dict[str, Any]:
        """Entry of the manifest's inputs."""
        entry = model_input("reward_model", self.model.reference, self.sha256)
        return {**entry, "score_at": self.model.score_at}

    @property
    def unusual_reading(self) -> list[str]:
        """Where its score stands, if not where it stood in every run before there was a choice."""
        return [] if self.model.score_at == "end-of-turn" else [self.model.score_at]


@dataclass(frozen=True)
class Models:
    """All models of a run."""

    actor_critic: ActorCritic
    sources: list[RewardSource]
    value_source: RewardSource | None
    """The reward model that the value model started from."""
    value_model: Any
    """The value model as a classifier, perhaps with an adapter."""
    reward_models: list[RewardModelSource]

    def compute_in(self, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        """Have all models compute in a precision."""
        self.actor_critic.autocast = autocast
        for reward_model in self.reward_models:
            reward_model.autocast = autocast


def load_models(
    config: PpoConfig, tokenizer: PreTrainedTokenizerBase, base_sha256: str, device: str
) -> Models:
    """Load every model, and share weights where possible. Random: seed before.

    Raises:
        ModelError: a model that does not load, or no reward model.
        UserError: invalid rewards or weights.
    """
    base = load_base(config, device).to(device)
    named = [parse_weight("--reward-model", text) for text in config.reward_model]
    rules = [parse_weight("--reward-rule", text) for text in config.reward_rule]
    names = unique_names([name for name, _ in (*named, *rules)])
    reward_models = [
        _load_reward_model(name, base, base_sha256, config, device) for name, _ in named
    ]
    sources = [
        RewardSource(name, weight, reward_model.score, is_model=True)
        for name, (_, weight), reward_model in zip(names, named, reward_models, strict=False)
    ]
    sources += [
        rule_reward(name, weight, find_rule(rule))
        for name, (rule, weight) in zip(names[len(named) :], rules, strict=True)
    ]
    origin = _value_origin(config, sources, reward_models, tokenizer)
    value_model = _value_model(
        config, base, None if origin is None else reward_models[origin].model
    )
    if config.has_adapter:
        reference = language_model_on(base)
        policy = adapt(base, config)
    else:
        reference = deepcopy(base).requires_grad_(False)
        policy = base.requires_grad_(True)
    body = value_model.get_base_model() if config.has_adapter else value_model
    actor_critic = ActorCritic(
        policy, body.base_model, value_head_of(body), reference, temperature=config.temperature
    )
    return Models(
        actor_critic.to(device).eval(),
        sources,
        None if origin is None else sources[origin],
        value_model,
        reward_models,
    )


def _load_reward_model(
    reference: str, base: Any, base_sha256: str, config: PpoConfig, device: str
) -> RewardModelSource:
    """Load a reward model; on the policy's weights where both are adapters of the same."""
    folder = local_folder(resolve_model(reference))
    shared = None
    if config.has_adapter and is_adapter(folder):
        adapter = read_adapter(folder)
        if weights_sha256(find_base(adapter)) == base_sha256:
            log.info("%s stands on the policy's own weights", reference)
            shared = classifier_on(base)
            if adapter.rows:  # it grows or trains rows, which must not become the policy's
                shared.set_input_embeddings(deepcopy(shared.get_input_embeddings()))
    model = load_reward_model(reference, device=device, base=shared, score_at=config.score_at)
    model.model.requires_grad_(False)
    return RewardModelSource(model, shared is not None)


def _value_origin(
    config: PpoConfig,
    sources: Sequence[RewardSource],
    reward_models: Sequence[RewardModelSource],
    tokenizer: PreTrainedTokenizerBase,
) -> int | None:
    """Index of the reward model that the value model starts from, None for the policy.

    A reward model as in Ouyang et al. (2022, arXiv:2203.02155, section 3.5), where one fits; of
    several the one of the largest weight.

    Raises:
        UserError: it was to be a reward model, and none fits.
    """
    if config.value_init == "policy":
        return None
    fitting = [
        index
        for index, reward_model in enumerate(reward_models)
        if (reward_model.is_shared or not config.has_adapter)
        and _can_value(reward_model.model, tokenizer)
    ]
    if not fitting and config.value_init == "reward":
        also = " and an adapter of its base" if config.has_adapter else ""
        raise UserError(
            f"--value-init reward: no reward model is a decoder with the policy's tokenizer{also}",
            hint="use --value-init policy",
        )
    return max(fitting, key=lambda index: abs(sources[index].weight)) if fitting else None


def _can_value(reward_model: RewardModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a reward model is a decoder with all of the policy's tokens under the same ids."""
    vocabulary = reward_model.tokenizer.get_vocab()
    same_ids = all(vocabulary.get(token) == id_ for token, id_ in tokenizer.get_vocab().items())
    encodes_alike = reward_model.tokenizer(PROBE)["input_ids"] == tokenizer(PROBE)["input_ids"]
    model = reward_model.model
    plain = model.get_base_model() if is_adapted(model) else model
    is_decoder = not reward_model.response_format.is_pair and HEAD in dict(plain.named_children())
    return is_decoder and same_ids and encodes_alike


def _value_model(config: PpoConfig, base: Any, origin: RewardModel | None) -> Any:
    """A classifier that learns values, with weights or an adapter of its own."""
    if not config.has_adapter:
        if origin is None:
            return deepcopy(classifier_on(base)).requires_grad_(True)
        copied = deepcopy(origin.model)
        merged = copied.merge_and_unload() if is_adapted(copied) else copied
        return merged.requires_grad_(True)
    if origin is None:
        return adapt(classifier_on(base), config, task="classify")
    peft_config = deepcopy(origin.model.peft_config["default"])
    peft_config.inference_mode = False
    peft_config.trainable_token_indices = None  # the policy's tokens only
    value_model = fuse_lora(get_peft_model(classifier_on(base), peft_config))
    learned = dict(origin.model.named_parameters())
    with torch.no_grad():
        for name, weight in value_model.named_parameters():
            if weight.requires_grad:
                weight.copy_(learned[name])
    return value_model


def value_head_of(classifier: Any) -> nn.Linear:
    """The layer that gives a classifier's number, the copy that trains where PEFT made one."""
    head = dict(classifier.named_children())[HEAD]
    linear = head.modules_to_save["default"] if isinstance(head, ModulesToSaveWrapper) else head
    assert isinstance(linear, nn.Linear)
    return linear


def selected_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities (n,) of targets (n,) from logits (n, V), without a copy of all of them."""
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropies (n,) in nats, -sum p log p, of the distributions of logits (n, V)."""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def language_model_on(base: Any) -> Any:
    """Another causal language model on the weights of this one."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(deepcopy(base.config), trust_remote_code=False)
    _share_weights(model, base)
    return model.eval().requires_grad_(False)


def classifier_on(base: Any) -> Any:
    """A classifier of one number on the body of this language model; its head gives 0.

    Raises:
        ModelError: transformers has no classifier of this architecture, or none with such a head.
    """
    config = deepcopy(base.config)
    config.num_labels, config.problem_type = 1, None
    config.architectures = None
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except ValueError:
        raise ModelError(
            f"transformers has no classifier of the architecture {config.model_type}, and so no "
            "value model"
        ) from None
    _share_weights(model.base_model, base.base_model)
    head = dict(model.named_children()).get(HEAD)
    if not isinstance(head, nn.Linear):
        raise ModelError(f"a value model of the architecture {config.model_type} is not supported")
    score = nn.Linear(head.in_features, 1, bias=False, device=base.device)
    nn.init.zeros_(score.weight)
    model.score = score
    return model.eval()


def _share_weights(model: nn.Module, base: nn.Module) -> None:
    """Give a model on the meta device the weights of another, without a copy.

    Modules without children are shared whole, so that quantized ones are too; of the others, into
    which adapters are put, only their own parameters and buffers.
    """
    modules = dict(model.named_modules())
    for name, module in base.named_modules():
        parent, _, last = name.rpartition(".")
        if name and next(module.children(), None) is None:
            setattr(modules[parent], last, module)
            continue
        for key, weight in module.named_parameters(recurse=False):
            modules[name].register_parameter(key, weight)
        for key, buffer in module.named_buffers(recurse=False):
            modules[name].register_buffer(key, buffer, persistent=key in module.state_dict())
