"""The Llama family's forward pass in few operations, which makes small models generate fast.

transformers spends some forty Python calls and as many small kernels on every layer; here a layer
is a dozen kernels. Covered are plain dense Llama, Mistral, Qwen2 and Qwen3. `fast_forward` refuses
everything else, and compares logits with transformers' own before it trusts itself. `plain` makes
the weights of a folder ready without transformers' code of models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmctl.decode.forward import pad_left
from llmctl.models.plain import PlainConfig
from llmctl.models.quantized import saved_precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WeightsOf = Callable[[nn.Module], Mapping[str, Tensor]]
COVERED = {
    f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}ForCausalLM"
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3")
}
LARGEST = 300_000_000
"""Parameters up to which a second copy of most weights is worth the calls it saves."""
PROBE_TOKENS = 16
PARAMETERS = {
    f"{name}.weight"
    for name in (
        *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj")),
        *("self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        *("input_layernorm", "post_attention_layernorm"),
    )
} | {f"self_attn.{part}_proj.bias" for part in "qkv"}
"""Names in a block; an adapter, a quantized layer or another bias has names that are not here."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference in logits, relative to the largest logit."""


def plain_weights(block: nn.Module) -> dict[str, Tensor]:
    """The weights of a block by name, as they are."""
    return {name: weight.detach() for name, weight in block.named_parameters()}


@dataclass(frozen=True)
class FusedLayer:
    """One block's weights as (in, out) matrices.

    In float32 those that read the norms have the norms' weights folded in, and lie as they are
    written, which suits one row. In half precision, where that would round them once more, all are
    as they were, and views of (out, in), without which a CPU takes ten times as long or more.

    The halves of each query and key head are interleaved, so that rotating is one complex product;
    attention, a sum over the head, does not see the order.
    """

    attention_norm: Tensor | None
    """(hidden,) of the norm before attention, where it is not folded in."""
    mlp_norm: Tensor | None
    qkv: Tensor
    qkv_bias: Tensor | None
    qk_norm: Tensor | None
    """Weights of Qwen3's norms of queries and keys, (heads + kv_heads, head_size)."""
    out: Tensor
    gate_up: Tensor
    down: Tensor


def fuse_layer(named: Mapping[str, Tensor], head_size: int, dtype: torch.dtype) -> FusedLayer:
    """Join a block's weights that read the same input, in one type."""
    weights = {name: weight.to(dtype) for name, weight in named.items()}

    def interleaved(name: str) -> Tensor:
        """Interleave the two halves of each head (rows · head_size, …)."""
        weight = weights[name]
        heads = weight.view(-1, 2, head_size // 2, *weight.shape[1:])
        return heads.transpose(1, 2).flatten(0, 2)

    def heads_of(part: str) -> list[Tensor]:
        query, key = (interleaved(f"self_attn.{name}_proj.{part}") for name in "qk")
        return [query, key, weights[f"self_attn.v_proj.{part}"]]

    qkv = heads_of("weight")
    norms = [
        interleaved(f"self_attn.{name}_norm.weight").expand(len(heads) // head_size, -1)
        for name, heads in zip("qk", qkv, strict=False)
        if f"self_attn.{name}_norm.weight" in weights
    ]
    gate_up = [weights[f"mlp.{name}_proj.weight"] for name in ("gate", "up")]
    norms_of = {name: weights[f"{name}_layernorm.weight"] for name in ("input", "post_attention")}
    is_folded = dtype is torch.float32
    return FusedLayer(
        attention_norm=None if is_folded else norms_of["input"],
        mlp_norm=None if is_folded else norms_of["post_attention"],
        qkv=_joined(qkv, norms_of["input"] if is_folded else None),
        qkv_bias=torch.cat(heads_of("bias")) if "self_attn.q_proj.bias" in weights else None,
        qk_norm=torch.cat(norms) if norms else None,
        out=weights["self_attn.o_proj.weight"].t(),
        gate_up=_joined(gate_up, norms_of["post_attention"] if is_folded else None),
        down=weights["mlp.down_proj.weight"].t(),
    )


def _joined(weights: Sequence[Tensor], norm: Tensor | None) -> Tensor:
    """One (in, out) matrix, which may also multiply by the weight of the norm before it."""
    joined = torch.cat(list(weights))
    return joined.t() if norm is None else joined.mul_(norm).t().contiguous()


@dataclass(frozen=True)
class LlamaWeights:
    """A model's weights as the pass computes with them."""

    embedding: Tensor
    """(vocabulary, hidden)."""
    layers: Sequence[FusedLayer]
    norm: Tensor
    """(hidden,)."""
    unembedding: Tensor
    """(hidden, vocabulary)."""
    frequencies: Tensor
    """Of rotary positions, (head_size / 2,) in float32."""
    heads: int
    kv_heads: int
    head_size: int
    epsilon: float

    @classmethod
    def of_model(
        cls,
        model: PreTrainedModel,
        weights_of: WeightsOf = plain_weights,
        dtype: torch.dtype | None = None,
    ) -> LlamaWeights:
        """Copy the weights of a model that `is_covered`, in the model's type or another."""
        dtype, config = dtype or model.dtype, model.config
        head_size = model.model.layers[0].self_attn.head_dim
        return cls.fuse(
            model.model.embed_tokens.weight.detach(),
            (weights_of(layer) for layer in model.model.layers),
            model.model.norm.weight.detach(),
            model.lm_head.weight.detach(),
            frequencies=model.model.rotary_emb.inv_freq.float(),
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_size=head_size,
            epsilon=config.rms_norm_eps,
            dtype=dtype,
        )

    @classmethod
    def fuse(
        cls,
        embedding: Tensor,
        blocks: Iterable[Mapping[str, Tensor]],
        norm: Tensor,
        head: Tensor,
        *,
        frequencies: Tensor,
        heads: int,
        kv_heads: int,
        head_size: int,
        epsilon: float,
        dtype: torch.dtype,
    ) -> LlamaWeights:
        """Join the weights of each block, one after the other, in one type.

        `head` (vocabulary, hidden) may be the embedding itself.
        """
        table = embedding.to(dtype)
        return cls(
            embedding=table,
            layers=[fuse_layer(block, head_size, dtype) for block in blocks],
            norm=norm.to(dtype),
            unembedding=(table if head is embedding else head.to(dtype)).t(),
            frequencies=frequencies,
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            epsilon=float(epsilon),
        )


@dataclass(frozen=True)
class PlainModel:
    """A model without transformers' code: its weights, and what the decode loop asks of a model."""

    config: PlainConfig
    weights: LlamaWeights
    generation_config: SimpleNamespace
    """Its `eos_token_id`."""
    parameters: int

    def num_parameters(self) -> int:
        """How many, tied ones once."""
        return self.parameters

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.weights.embedding.device


class LlamaForward:
    """See `forward.Forward`. Weights are copied: build a new one when they have changed."""

    def __init__(self, weights: LlamaWeights) -> None:
        """Take the weights; a cache comes with the first prompts."""
        self.device, self.dtype = weights.embedding.device, weights.embedding.dtype
        self.heads, self.kv_heads = weights.heads, weights.kv_heads
        self.head_size, self.epsilon = weights.head_size, weights.epsilon
        self.embedding, self.layers, self.norm = weights.embedding, weights.layers, weights.norm
        self.unembedding, self.frequencies = weights.unembedding, weights.frequencies
        self._is_on_cpu = self.device.type == "cpu"
        self._exact = torch.float32 if self._is_on_cpu else self.dtype
        """Type of all but the products with weights, which a CPU computes no faster in half."""
        blank = self.embedding.new_empty(0, dtype=self._exact)
        hidden = self.embedding.shape[1]
        self._mean = blank.new_full((hidden, 1), 1 / hidden)
        self._epsilon = blank.new_full((1,), self.epsilon)
        self._nothing = blank.new_zeros(1, 1, 1)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """See `Forward.prefill`."""
        tokens, self._starts = pad_left(prompts, self.device)
        self._rows, self._columns = len(prompts), 0
        shape = (len(self.layers), 2, self._rows, self.kv_heads, self.head_size, 0)
        self._cache = self._nothing.new_empty(shape)
        """Keys and values, (layers, 2, rows, kv_heads, head_size, columns)."""
        self._hidden_keys: Tensor | None = None
        """Minus infinity where there is padding, (rows, kv_heads, 1, columns)."""
        if len(set(map(len, prompts))) > 1:
            columns = torch.arange(tokens.shape[1], device=self.device)
            hidden = (columns < self._starts[:, None])[:, None, None]
            blank = self._nothing.new_zeros(self._rows, self.kv_heads, 1, tokens.shape[1])
            self._hidden_keys = blank.masked_fill_(hidden, -torch.inf)
        return self._forward(tokens)

    def step(self, tokens: Tensor) -> Tensor:
        """See `Forward.step`."""
        return self._forward(tokens[:, None])

    def select(self, rows: Sequence[int]) -> None:
        """See `Forward.select`. Where rows leave, only those that fill a gap are moved."""
        index = torch.tensor(rows, device=self.device)
        self._starts = self._starts[index]
        if self._hidden_keys is not None:
            self._hidden_keys = self._hidden_keys[index]
        if len(rows) > self._rows:
            self._cache = self._cache[:, :, index]
        else:
            used = self._cache[..., : self._columns]
            for place, row in enumerate(rows):
                if place != row:
                    used[:, :, place] = used[:, :, row]
            self._cache = self._cache[:, :, : len(rows)]
        self._rows = len(rows)

    def _reserve(self, columns: int) -> None:
        """Make room for so many columns; doubling keeps the copies few."""
        room = self._cache.shape[-1]
        if columns <= room:
            return
        grown = self._cache.new_empty(*self._cache.shape[:-1], max(columns + 64, 2 * room))
        grown[..., :room] = self._cache
        self._cache = grown
        if self._hidden_keys is not None:
            more = grown.shape[-1] - self._hidden_keys.shape[-1]
            self._hidden_keys = F.pad(self._hidden_keys, (0, more))
        angles = torch.outer(torch.arange(grown.shape[-1], device=self.device), self.frequencies)
        self._turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def _forward(self, tokens: Tensor) -> Tensor:
        rows, length = tokens.shape
        first, last = self._columns, self._columns + length
        self._reserve(last)
        self._columns = last
        turns = self._turns_at(first, last)
        mask = self._prompt_mask(last) if first == 0 else None
        hidden = self._nothing
        if first > 0 and self._hidden_keys is not None:
            hidden = self._hidden_keys[..., :last].flatten(0, 1)
        slots = self._cache[..., first:last].unbind(0)
        caches = self._cache.flatten(2, 3).flatten(0, 1)[..., :last].unbind(0)
        x = F.embedding(tokens.flatten(), self.embedding).to(self._exact)
        for layer, slot, keys, values in zip(
            self.layers, slots, caches[::2], caches[1::2], strict=True
        ):
            qkv = self._product(self._normalize(x, layer.attention_norm), layer.qkv, layer.qkv_bias)
            qkv = qkv.to(self._exact).view(rows, length, -1, self.head_size)
            self._rotate(qkv.narrow(2, 0, self.heads + self.kv_heads), layer.qk_norm, turns)
            new = qkv.narrow(2, self.heads, 2 * self.kv_heads)
            slot.copy_(new.view(rows, length, 2, self.kv_heads, -1).permute(2, 0, 3, 4, 1))
            if first == 0:
                mixed = self._attend_prompt(qkv, mask)
            else:
                mixed = self._attend_cache(qkv.narrow(2, 0, self.heads), keys, values, hidden)
            self._add_product(x, mixed, layer.out)
            gate, up = self._product(self._normalize(x, layer.mlp_norm), layer.gate_up).chunk(2, 1)
            self._add_product(x, F.silu(gate).mul_(up), layer.down)
        x = x.view(rows, length, -1)[:, -1]
        return self._product(self._normalize(x, self.norm), self.unembedding)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Product of (n, in) and (in, out) in the weight's type; of one row in half as a vector."""
        x = x.to(self.dtype)
        if x.shape[0] == 1 and self._is_on_cpu and self.dtype is not torch.float32:
            product = torch.mv(weight.t(), x[0])[None]
            return product if bias is None else product.add_(bias)
        return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)

    def _add_product(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add the product of (n, in) and (in, out) to x (n, out), in place."""
        if x.dtype is self.dtype:
            x.addmm_(y, weight)
        else:
            x.add_(self._product(y, weight))

    def _normalize(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """Root mean square norm; on a CPU in half the time of F.rms_norm."""
        if not self._is_on_cpu:
            return F.rms_norm(x, x.shape[-1:], weight, self.epsilon)
        normal = torch.addmm(self._epsilon, x * x, self._mean).rsqrt_() * x
        return normal if weight is None else normal.mul_(weight)

    def _rotate(self, heads: Tensor, norm: Tensor | None, turns: Tensor) -> None:
        """Apply rotary positions in place to queries and keys (rows, length, heads, head_size)."""
        if norm is not None:
            heads.copy_(F.rms_norm(heads, heads.shape[-1:], None, self.epsilon).mul_(norm))
        exact = heads.float()
        torch.view_as_complex(exact.view(*heads.shape[:3], -1, 2)).mul_(turns)
        if exact is not heads:
            heads.copy_(exact)

    def _attend_prompt(self, qkv: Tensor, mask: Tensor | None) -> Tensor:
        """Causal attention within (rows, length, heads + 2 kv_heads, head_size)."""
        rows, length = qkv.shape[:2]
        states = qkv.transpose(1, 2)
        query = states[:, : self.heads]
        key, value = states[:, self.heads :].chunk(2, 1)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return mixed.transpose(1, 2).reshape(rows * length, -1)

    def _attend_cache(self, query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
        """Attention of queries (rows, 1, heads, head_size) to all columns so far.

        Keys and values are (rows · kv_heads, head_size, columns). Written out, since queries that
        share a key then need no copies of it.
        """
        rows = query.shape[0]
        query = query.reshape(rows * self.kv_heads, -1, self.head_size)
        scores = torch.baddbmm(hidden, query, keys, alpha=self.head_size**-0.5)
        return torch.bmm(scores.softmax(2), values.mT).view(rows, -1)

    def _turns_at(self, first: int, last: int) -> Tensor:
        """Rotations of these columns, which in padded rows are earlier positions."""
        if self._hidden_keys is None:
            return self._turns[first:last]
        columns = torch.arange(first, last, device=self.device)
        return self._turns[(columns - self._starts[:, None]).clamp(min=0)]

    def _prompt_mask(self, length: int) -> Tensor | None:
        """Return the addend of a prompt's scores, None where plain causal attention will do.

        Padding sees itself: without any key a query gives NaN on some backends.
        """
        if self._hidden_keys is None:
            return None
        later = self._nothing.new_full((length, length), -torch.inf).triu(1)
        mask: Tensor = self._hidden_keys[:, :1, :, :length] + later
        mask.masked_fill_(torch.eye(length, device=self.device).bool(), 0.0)
        return mask


def is_covered(
    model: PreTrainedModel,
    weights_of: WeightsOf = plain_weights,
    dtype: torch.dtype | None = None,
) -> bool:
    """Whether this is a plain dense Llama, Mistral, Qwen2 or Qwen3 of moderate size."""
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if kind not in COVERED or model.device.type not in ("cpu", "cuda"):
        return False
    if saved_precision(model.config) == "torchao":  # its weights have the names of full ones
        return False
    config = model.config.to_dict()
    names = {name for layer in model.model.layers for name in weights_of(layer)}
    return (
        names <= PARAMETERS
        and config["hidden_act"] == "silu"
        and config["rope_parameters"]["rope_type"] == "default"
        and config.get("sliding_window") is None
        and (dtype is not None or {p.dtype for p in model.parameters()} == {model.dtype})
        and (dtype or model.dtype) in TOLERANCE
        and model.num_parameters() <= LARGEST
    )


@torch.inference_mode()
def fast_forward(
    model: PreTrainedModel | PlainModel,
    prompt: Sequence[int],
    weights_of: WeightsOf = plain_weights,
    dtype: torch.dtype | None = None,
) -> LlamaForward | None:
    """The fast pass, if it covers this model (in eval mode) and gives its logits on this prompt.

    `weights_of` gives the weights that a block computes with where an adapter changes them, and
    `dtype` is that of autocast where it has the model compute in another than its weights'.
    """
    if isinstance(model, PlainModel):
        return LlamaForward(model.weights)
    if not is_covered(model, weights_of, dtype):
        return None
    rows = model.get_input_embeddings().num_embeddings
    probe = [*prompt[:PROBE_TOKENS], *(token % rows for token in range(PROBE_TOKENS))]
    probes = [probe, probe[5:]]  # of two lengths, so that padding is checked too
    expected = [model(torch.tensor([p], device=model.device)).logits[0, -3:] for p in probes]
    forward = LlamaForward(LlamaWeights.of_model(model, weights_of, dtype))
    with torch.autocast(model.device.type, enabled=False):
        return forward if _agrees(forward, probes, expected) else None


def _agrees(forward: LlamaForward, probes: list[list[int]], expected: list[Tensor]) -> bool:
    """Whether the last three logits of each probe are those expected, but for rounding."""
    logits = [forward.prefill([p[:-2] for p in probes])]
    for place in (-2, -1):
        logits.append(forward.step(torch.tensor([p[place] for p in probes], device=forward.device)))
    reference = torch.stack(expected, 1)
    error = (torch.stack(logits) - reference).abs().max()
    return bool(error <= TOLERANCE[forward.dtype] * reference.abs().max())
