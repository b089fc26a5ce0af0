"""The models of a run: policy, reference, value model, and the reward models beside them.

In full, each has weights of its own. With LoRA one set of base weights serves policy, reference,
value model and those reward models that are LoRA of the same base.
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
from torch import nn
from transformers import PreTrainedTokenizerBase

from llmctl.adapters import is_adapter, read_adapter, weights_sha256
from llmctl.config.stages import PpoConfig
from llmctl.console import log
from llmctl.data.hub import model_input
from llmctl.errors import UserError
from llmctl.low_rank import fuse
from llmctl.models import find_base, local_folder
from llmctl.ppo.actors import Actors
from llmctl.ppo.rewards import Source, named_apart, rule_source, weighted
from llmctl.ppo.rules import Told, find_rule
from llmctl.ppo.sharing import classifier_on, language_model_on
from llmctl.rundir import resolve_model
from llmctl.scoring import Exchange, RewardModel, load_reward_model
from llmctl.training.adapters import adapt
from llmctl.training.base_model import load_base

SCORE = "score"
"""The head of every classifier that transformers makes of a decoder."""
SCORE_BATCH = 64
"""Responses that a reward model scores at a time."""
PROBE = "The quick brown fox, 12345 jumps;\n  naïve café."


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
    value_model = fuse(get_peft_model(classifier_on(base), about))
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
