"""A block's weights side by side, as the fast forward pass multiplies by them.

In: the weights of a block by the names that transformers gives them. Out: a `Layer`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

WeightsOf = Callable[[nn.Module], Mapping[str, Tensor]]


def plain_weights(block: nn.Module) -> dict[str, Tensor]:
    """The weights of a block by name, as they are."""
    return {name: weight.detach() for name, weight in block.named_parameters()}


@dataclass(frozen=True)
class Layer:
    """One block's weights as (in, out) matrices, with the weights of the norms folded in.

    The halves of each query and key head are interleaved, so that rotating is one complex product;
    attention, a sum over the head, does not see the order.
    """

    qkv: Tensor
    qkv_bias: Tensor | None
    qk_norm: Tensor | None
    """Weights of Qwen3's norms of queries and keys, (heads + kv_heads, head_size)."""
    out: Tensor
    gate_up: Tensor
    down: Tensor


def fuse(named: Mapping[str, Tensor], head_size: int, dtype: torch.dtype) -> Layer:
    """A block's weights in one type, those that read the same input side by side."""
    weights = {name: weight.to(dtype) for name, weight in named.items()}

    def interleaved(name: str) -> Tensor:
        """Of each head (rows · head_size, …), the two halves in turn."""
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
    return Layer(
        qkv=_folded(qkv, weights["input_layernorm.weight"]),
        qkv_bias=torch.cat(heads_of("bias")) if "self_attn.q_proj.bias" in weights else None,
        qk_norm=torch.cat(norms) if norms else None,
        out=weights["self_attn.o_proj.weight"].t(),
        gate_up=_folded(gate_up, weights["post_attention_layernorm.weight"]),
        down=weights["mlp.down_proj.weight"].t(),
    )


def _folded(weights: Sequence[Tensor], norm: Tensor) -> Tensor:
    """One (in, out) matrix that also multiplies by the weight of the norm before it."""
    joined = torch.cat(list(weights))
    return (joined.float() * norm.float()).to(joined.dtype).t().contiguous()
