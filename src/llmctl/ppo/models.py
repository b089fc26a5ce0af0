"""The models of a run: policy, reference, value model, and the reward models beside them.

In full, each has weights of its own. With LoRA one set of base weights serves policy, reference,
value model and those reward models that are LoRA of the same base: each has layers of its own to
put adapters on. `Actors` are what is trained and the reference, as functions of a pass over
episodes.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
)

from llmctl.config.commands import PpoConfig
from llmctl.console import log
from llmctl.errors import ModelError, UserError
from llmctl.models.adapters import is_adapter, read_adapter, weights_sha256
from llmctl.models.hub import model_input
from llmctl.models.loading import find_base, local_folder
from llmctl.models.patched_lora import fuse_lora
from llmctl.ppo.episodes import Pass
from llmctl.ppo.rewards import Source, named_apart, rule_source, weighted
from llmctl.ppo.rules import Told, find_rule
from llmctl.reward.model import Exchange, RewardModel, load_reward_model
from llmctl.runs.directory import resolve_model
from llmctl.training.adapters import adapt
from llmctl.training.base_model import load_base
from llmctl.training.token_loss import handed, output_layer

SCORE = "score"
"""The head of every classifier that transformers makes of a decoder."""
SCORE_BATCH = 64
"""Responses that a reward model scores at a time."""
PROBE = "The quick brown fox, 12345 jumps;\n  naïve café."


class Actors(nn.Module):
    """Policy and value model, as one module: the names in it are those of a checkpoint."""

    def __init__(
        self, policy: Any, value: Any, value_head: nn.Linear, reference: Any, *, temperature: float
    ) -> None:
        """Put the models together.

        Args:
            policy: causal language model, perhaps with an adapter.
            value: body of the value model, which gives hidden states.
            value_head: from hidden states to one value.
            reference: causal language model; it is no part of this module.
            temperature: of policy and reference.
        """
        super().__init__()
        self.policy, self.value, self.value_head = policy, value, value_head
        self.temperature = temperature
        self.scale = 1.0, 0.0
        """Factor of the head's output and what is added to it: a reward model's head gives its
        scores, and values are of normalised ones."""
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._reference = [reference]

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.value_head.weight.device

    @property
    def reference(self) -> Any:
        """The policy as it began."""
        return self._reference[0]

    @property
    def vocabulary(self) -> int:
        """V, logits of a token."""
        return int(self.policy.config.get_text_config().vocab_size)

    def log_probs(self, batch: Pass) -> tuple[Tensor, Tensor]:
        """Log-probabilities (n,) of the chosen tokens under the policy, and its logits (n, V)."""
        logits = self._logits(self.policy, batch)
        return log_probs_of(logits, batch.chosen), logits

    @torch.no_grad()
    def reference_log_probs(self, batch: Pass) -> Tensor:
        """Log-probabilities (n,) of the chosen tokens under the reference."""
        return log_probs_of(self._logits(self.reference, batch), batch.chosen)

    def values(self, batch: Pass) -> Tensor:
        """Values (n,) of the states before each chosen token."""
        with self.autocast():
            states = self.value(input_ids=batch.tokens, use_cache=False).last_hidden_state
            kept = states[:, :-1].flatten(0, 1)[batch.places]
            found: Tensor = self.value_head(kept.to(self.value_head.weight.dtype))[:, 0]
        factor, shift = self.scale
        return found.float() * factor + shift

    def _logits(self, model: Any, batch: Pass) -> Tensor:
        """Logits (n, V) at the temperature, of no other positions."""
        head = output_layer(model)
        with self.autocast(), handed(head, batch.tokens.shape[1], batch.places):
            logits: Tensor = model(input_ids=batch.tokens, use_cache=False).logits[0]
        return logits.float() / self.temperature if self.temperature != 1 else logits.float()


@dataclass(frozen=True)
class Models:
    """All models of a run."""

    actors: Actors
    sources: list[Source]
    value_source: Source | None
    """The reward model that the value model started from."""
    value_model: Any
    """The value model as a classifier, perhaps with an adapter."""
    judges: list["Judge"]

    def compute_in(self, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        """Have all models compute in these numbers."""
        self.actors.autocast = autocast
        for judge in self.judges:
            judge.autocast = autocast


def load_models(
    config: PpoConfig, tokenizer: PreTrainedTokenizerBase, base_sha256: str, device: str
) -> Models:
    """Load every model, and share what can be shared. Random: seed before.

    Args:
        config: the command's fields.
        tokenizer: the policy's.
        base_sha256: of the policy's weights.
        device: type of device.

    Raises:
        ModelError: a model that does not load, or no reward model.
        UserError: rewards or weights that make no sense.
    """
    base = load_base(config, device).to(device)
    named = [weighted("--reward-model", text) for text in config.reward_model]
    rules = [weighted("--reward-rule", text) for text in config.reward_rule]
    names = named_apart([name for name, _ in (*named, *rules)])
    judges = [_load_judge(name, base, base_sha256, config, device) for name, _ in named]
    sources = [
        Source(name, weight, judge.score, is_model=True)
        for name, (_, weight), judge in zip(names, named, judges, strict=False)
    ]
    sources += [
        rule_source(name, weight, find_rule(rule))
        for name, (rule, weight) in zip(names[len(named) :], rules, strict=True)
    ]
    origin = _value_origin(config, sources, judges, tokenizer)
    value_model = _value_model(config, base, None if origin is None else judges[origin].model)
    policy, reference = _policy(config, base)
    body = value_model.get_base_model() if config.has_adapter else value_model
    actors = Actors(
        policy, body.base_model, head_of(body), reference, temperature=config.temperature
    )
    return Models(
        actors.to(device).eval(),
        sources,
        None if origin is None else sources[origin],
        value_model,
        judges,
    )


@dataclass
class Judge:
    """A reward model, and whether it stands on the policy's weights."""

    model: RewardModel
    is_shared: bool
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def score(self, told: Sequence[Told], ended: Sequence[bool]) -> torch.Tensor:
        """Scores (N,) of responses, some of which did not end by themselves."""
        exchanges = [
            Exchange(self._asked(one.prompt), one.response, ended=end)
            for one, end in zip(told, ended, strict=True)
        ]
        with self.autocast():
            return self.model.score(exchanges, batch_size=SCORE_BATCH)

    def _asked(self, prompt: Any) -> Any:
        """A prompt in the form that the reward model was trained on."""
        if isinstance(prompt, str) and self.model.has_turns:
            return [{"role": "user", "content": prompt}]
        return prompt

    @cached_property
    def sha256(self) -> str:
        """Of its weights, read once."""
        return weights_sha256(self.model.folder)

    def as_input(self) -> dict[str, Any]:
        """For the manifest."""
        return model_input("reward_model", self.model.reference, self.sha256)


def _policy(config: PpoConfig, base: Any) -> tuple[Any, Any]:
    """What learns, and what it must stay close to."""
    if config.has_adapter:
        reference = language_model_on(base)
        return adapt(base, config), reference
    reference = deepcopy(base).requires_grad_(False)
    return base.requires_grad_(True), reference


def _load_judge(
    reference: str, base: Any, base_sha256: str, config: PpoConfig, device: str
) -> Judge:
    """A reward model; on the policy's weights where both are adapters of the same."""
    folder = local_folder(resolve_model(reference))
    under = None
    if config.has_adapter and is_adapter(folder):
        adapter = read_adapter(folder)
        if weights_sha256(find_base(adapter)) == base_sha256:
            log.info("%s stands on the policy's own weights", reference)
            under = classifier_on(base)
            if adapter.rows:  # it grows or trains rows, which must not become the policy's
                under.set_input_embeddings(deepcopy(under.get_input_embeddings()))
    found = load_reward_model(reference, device=device, under=under)
    found.model.requires_grad_(False)
    return Judge(found, under is not None)


def _value_origin(
    config: PpoConfig,
    sources: Sequence[Source],
    judges: Sequence[Judge],
    tokenizer: PreTrainedTokenizerBase,
) -> int | None:
    """Number of the reward model that the value model starts from, None for the policy.

    Raises:
        UserError: it was to be a reward model, and none can be.
    """
    if config.value_init == "policy":
        return None
    fitting = [
        number
        for number, judge in enumerate(judges)
        if (judge.is_shared or not config.has_adapter) and _reads(judge.model, tokenizer)
    ]
    if not fitting and config.value_init == "reward":
        also = " and an adapter of its base" if config.has_adapter else ""
        raise UserError(
            f"--value-init reward: no reward model is a decoder with the policy's tokenizer{also}",
            hint="use --value-init policy",
        )
    return max(fitting, key=lambda n: abs(sources[n].weight)) if fitting else None


def _reads(judge: RewardModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a reward model is a decoder that has all of the policy's tokens by their ids."""
    theirs = judge.tokenizer.get_vocab()
    same = all(theirs.get(token) == number for token, number in tokenizer.get_vocab().items())
    encodes = judge.tokenizer(PROBE)["input_ids"] == tokenizer(PROBE)["input_ids"]
    return not judge.written.is_pair and same and encodes and SCORE in dict(_own_children(judge))


def _own_children(judge: RewardModel) -> Iterable[tuple[str, nn.Module]]:
    model = judge.model.get_base_model() if isinstance(judge.model, PeftModel) else judge.model
    return model.named_children()  # type: ignore[no-any-return]


def _value_model(config: PpoConfig, base: Any, origin: RewardModel | None) -> Any:
    """A classifier to learn values, with weights or an adapter of its own."""
    if not config.has_adapter:
        if origin is None:
            return deepcopy(classifier_on(base)).requires_grad_(True)
        copied = deepcopy(origin.model)
        merged = copied.merge_and_unload() if isinstance(copied, PeftModel) else copied
        return merged.requires_grad_(True)
    if origin is None:
        return adapt(classifier_on(base), config, task="classify")
    about = deepcopy(origin.model.peft_config["default"])
    about.inference_mode, about.trainable_token_indices = False, None  # the policy's tokens only
    value_model = fuse_lora(get_peft_model(classifier_on(base), about))
    learned = dict(origin.model.named_parameters())
    with torch.no_grad():
        for name, weight in value_model.named_parameters():
            if weight.requires_grad:
                weight.copy_(learned[name])
    return value_model


def head_of(classifier: Any) -> nn.Linear:
    """The layer that gives a classifier's number, the copy that trains where PEFT made one."""
    head = dict(classifier.named_children())[SCORE]
    found = head.modules_to_save["default"] if isinstance(head, ModulesToSaveWrapper) else head
    assert isinstance(found, nn.Linear)
    return found


def log_probs_of(logits: Tensor, chosen: Tensor) -> Tensor:
    """Log-probabilities (n,) of tokens (n,) from logits (n, V), without a copy of all of them."""
    return logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(-1)


def entropy_of(logits: Tensor) -> Tensor:
    """Entropies (n,) in nats of the distributions that logits (n, V) stand for."""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def language_model_on(base: Any) -> Any:
    """Another causal language model on the weights of this one."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(deepcopy(base.config), trust_remote_code=False)
    _adopt(model, base)
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
    _adopt(model.base_model, base.base_model)
    head = dict(model.named_children()).get("score")
    if not isinstance(head, nn.Linear):
        raise ModelError(f"a value model of the architecture {config.model_type} is not supported")
    score = nn.Linear(head.in_features, 1, bias=False, device=base.device)
    nn.init.zeros_(score.weight)
    model.score = score
    return model.eval()


def _adopt(shell: nn.Module, base: nn.Module) -> None:
    """Give a model without weights the layers of another, which are not copied.

    Layers without layers in them are taken whole, so that quantized ones are too; of the others,
    into which adapters are put, only what they hold themselves.
    """
    places = dict(shell.named_modules())
    for name, module in base.named_modules():
        parent, _, last = name.rpartition(".")
        if name and next(module.children(), None) is None:
            setattr(places[parent], last, module)
            continue
        here = places[name]
        for key, weight in module.named_parameters(recurse=False):
            here.register_parameter(key, weight)
        for key, buffer in module.named_buffers(recurse=False):
            here.register_buffer(key, buffer, persistent=key in module.state_dict())
