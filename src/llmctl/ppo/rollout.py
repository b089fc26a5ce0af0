"""Sample responses from a policy: `decode.py`'s loop, that generate uses too.

A text depends on its prompt, the seed and the number of its episode alone. Prompts of like length
share a batch, samples of one prompt share its prefill, and what has ended is computed no more.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from llmctl.config.sections import Sampling
from llmctl.decode.forward import Forward, HuggingFaceForward
from llmctl.decode.llama import fast_forward
from llmctl.decode.loop import Prompt, Response, decode
from llmctl.ppo.episodes import Sequences
from llmctl.signals import StopFlag

Autocast = Callable[[], AbstractContextManager[Any]]


class Halted(Exception):
    """A signal came while responses were sampled; what was sampled is thrown away."""


@dataclass(frozen=True)
class Sampler:
    """How responses are sampled."""

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
        numbers: Sequence[int],
        flag: StopFlag,
        autocast: Autocast,
    ) -> "Rollout":
        """Continue each prompt once.

        Args:
            model: plain causal language model, its adapters in force.
            prompts: token ids.
            numbers: of the episodes, which decide the noise.
            flag: set where a signal came.
            autocast: in which numbers the model computes.

        Raises:
            Halted: a signal came.
        """
        sampling = Sampling(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=1.0
        )
        asked = [Prompt(list(p), number) for p, number in zip(prompts, numbers, strict=True)]
        forward = _Watched(model, prompts[0], flag, autocast)
        responses = decode(
            model,
            asked,
            sampling,
            eos=self.eos,
            forward=forward,
            seed=self.seed,
            batch_size=self.batch_size,
            tokenizer=self.tokenizer,
            log_probs=True,
        )
        found = sorted(responses, key=lambda response: response.index)
        return Rollout(Sequences([list(p) for p in prompts], [r.tokens for r in found]), found)


@dataclass(frozen=True)
class Rollout:
    """Responses and what is known of them at once."""

    sequences: Sequences
    responses: Sequence[Response]

    @property
    def ended(self) -> list[bool]:
        """Whether each ended by itself."""
        return [response.finish_reason == "eos" for response in self.responses]

    @property
    def texts(self) -> list[str]:
        """What each says."""
        return [response.text for response in self.responses]

    def log_probs(self, width: int) -> Tensor:
        """(B, R) of the sampled tokens at the sampling temperature, 0 where there is none."""
        found = torch.zeros(len(self.responses), width)
        for row, response in enumerate(self.responses):
            found[row, : len(response.tokens)] = torch.tensor(response.log_probs)
        return found


class _Watched:
    """The fast pass where it covers the model with its adapter, else transformers'.

    A signal stops it before the next token.
    """

    def __init__(
        self, model: Any, prompt: Sequence[int], flag: StopFlag, autocast: Autocast
    ) -> None:
        plain = model.get_base_model() if isinstance(model, PeftModel) else model
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
            raise Halted
        with self._autocast():
            return self._forward.step(tokens)


def adapted_weights(block: nn.Module) -> dict[str, Tensor]:
    """The weights that a block computes with: each layer's own and its adapter's change to it.

    What is no low-rank change alone (DoRA) or not to be added (quantized) keeps PEFT's names, which
    the fast pass does not know.
    """
    found: dict[str, Tensor] = {}
    layers = {name: m for name, m in block.named_modules() if isinstance(m, LoraLayer)}
    for name, weight in block.named_parameters():
        if not any(name.startswith(f"{prefix}.") for prefix in layers):
            found[name] = weight.detach()
    for name, layer in layers.items():
        base: Any = layer.get_base_layer()
        active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
        if type(base) is not nn.Linear or any(layer.use_dora[adapter] for adapter in active):
            return dict(block.named_parameters())
        changed = base.weight.detach()
        for adapter in active:
            changed = changed.float() + layer.get_delta_weight(adapter).float()
        found[f"{name}.weight"] = changed
        if base.bias is not None:
            found[f"{name}.bias"] = base.bias.detach()
    return found
