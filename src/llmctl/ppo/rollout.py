"""Sample responses from a policy with the decoding loop of `llmctl generate`.

In: a model and prompts. Out: a `Rollout`. A text depends on its prompt, the seed and its stream id
alone. Prompts of like length share a batch, samples of one prompt share its prefill, and finished
sequences are computed no more.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from llmctl.config.sections import Sampling
from llmctl.decode.forward import Forward, HuggingFaceForward
from llmctl.decode.llama import fast_forward
from llmctl.decode.loop import Prompt, Response, decode
from llmctl.models.adapters import is_adapted
from llmctl.ppo.episodes import EpisodeTokens
from llmctl.signals import StopFlag

Autocast = Callable[[], AbstractContextManager[Any]]


class RolloutInterrupted(Exception):
    """A signal came while responses were sampled; they are thrown away."""


@dataclass(frozen=True)
class RolloutSampler:
    """Settings of sampling."""

    tokenizer: Any
    max_new_tokens: int
    temperature: float
    eos: Collection[int]
    """Tokens that end a response; none where EOS is ignored."""
    seed: int
    batch_size: int
    """Most sequences at once."""

    def sample(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        stream_ids: Sequence[int],
        flag: StopFlag,
        autocast: Autocast,
    ) -> "Rollout":
        """Continue each prompt once.

        The model is a plain causal one, its adapters active. Same (seed, stream id), same text.

        Raises:
            RolloutInterrupted: a signal came.
        """
        sampling = Sampling(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=1.0
        )
        streams = zip(prompts, stream_ids, strict=True)
        responses = decode(
            model,
            [Prompt(list(tokens), stream_id) for tokens, stream_id in streams],
            sampling,
            eos=self.eos,
            forward=_InterruptibleForward(model, prompts[0], flag, autocast),
            seed=self.seed,
            batch_size=self.batch_size,
            tokenizer=self.tokenizer,
            log_probs=True,
        )
        ordered = sorted(responses, key=lambda response: response.index)
        tokens = [response.tokens for response in ordered]
        return Rollout(EpisodeTokens([list(p) for p in prompts], tokens), ordered)


@dataclass(frozen=True)
class Rollout:
    """Sampled responses, as tokens and as text."""

    sequences: EpisodeTokens
    responses: Sequence[Response]

    @property
    def ended(self) -> list[bool]:
        """Whether each response ended by itself."""
        return [response.finish_reason == "eos" for response in self.responses]

    @property
    def texts(self) -> list[str]:
        """Text of each response."""
        return [response.text for response in self.responses]

    def log_probs(self, width: int) -> Tensor:
        """(B, R) of the sampled tokens at the sampling temperature, 0 where there is none."""
        log_probs = torch.zeros(len(self.responses), width)
        for row, response in enumerate(self.responses):
            log_probs[row, : len(response.tokens)] = torch.tensor(response.log_probs)
        return log_probs


class _InterruptibleForward:
    """The fused forward pass where it covers the model with its adapter, else transformers'.

    A signal stops it before the next token.
    """

    def __init__(
        self, model: Any, prompt: Sequence[int], flag: StopFlag, autocast: Autocast
    ) -> None:
        plain = model.get_base_model() if is_adapted(model) else model
        with autocast():
            half = torch.is_autocast_enabled(plain.device.type)
            dtype = torch.get_autocast_dtype(plain.device.type) if half else None
            fast = fast_forward(plain, prompt, adapted_weights, dtype)
        self._forward: Forward = fast or HuggingFaceForward(model)
        self._autocast: Autocast = nullcontext if fast else autocast
        self._flag = flag
        self.device, self.select = self._forward.device, self._forward.select

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        with self._autocast():
            return self._forward.prefill(prompts)

    def step(self, tokens: Tensor) -> Tensor:
        if self._flag.received:
            raise RolloutInterrupted
        with self._autocast():
            return self._forward.step(tokens)


def adapted_weights(block: nn.Module) -> dict[str, Tensor]:
    """Weights of a block, by name, each layer's with its adapter's low-rank update added.

    Where adding is not enough (DoRA) or not possible (quantized) all keep PEFT's names, which the
    fused pass does not know.
    """
    weights: dict[str, Tensor] = {}
    layers = {name: m for name, m in block.named_modules() if isinstance(m, LoraLayer)}
    for name, weight in block.named_parameters():
        if not any(name.startswith(f"{prefix}.") for prefix in layers):
            weights[name] = weight.detach()
    for name, layer in layers.items():
        base: Any = layer.get_base_layer()
        active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
        if type(base) is not nn.Linear or any(layer.use_dora[adapter] for adapter in active):
            return dict(block.named_parameters())
        merged = base.weight.detach()
        for adapter in active:
            merged = merged.float() + layer.get_delta_weight(adapter).float()
        weights[f"{name}.weight"] = merged
        if base.bias is not None:
            weights[f"{name}.bias"] = base.bias.detach()
    return weights
