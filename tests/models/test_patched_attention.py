"""Attention in float32 where bfloat16 is slow: the same numbers, of the same type."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig

from llmctl.models import loading  # noqa: F401 (puts it in force)
from llmctl.models.patched_attention import attend


def inputs(length, dtype, size=16):
    torch.manual_seed(0)
    made = [torch.randn(2, heads, length, size) for heads in (4, 2, 2)]
    return [part.to(dtype).requires_grad_() for part in made]


class Layer(nn.Module):
    is_causal, num_key_value_groups = True, 2


@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_are_float32s(masked):
    mask = torch.zeros(2, 1, 12, 12).masked_fill(torch.ones(12, 12).triu(1).bool(), -1e9)
    half = inputs(12, torch.bfloat16)
    full = [part.detach().float().requires_grad_() for part in half]
    for parts, taken in ((half, mask.bfloat16()), (full, mask)):
        mixed, weights = attend(Layer(), *parts, taken if masked else None)
        assert weights is None
        assert mixed.dtype is parts[0].dtype
        mixed.float().square().sum().backward()
    for mine, theirs in zip(half, full, strict=True):
        torch.testing.assert_close(mine.grad.float(), theirs.grad, rtol=0.03, atol=0.03)


@pytest.fixture
def computed(monkeypatch):
    """Types in which torch is asked for attention, autocast's rounding included."""
    seen = []
    plain = functional.scaled_dot_product_attention

    def watched(query, *rest, **options):
        rounded = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        seen.append(rounded or query.dtype)
        return plain(query, *rest, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched)
    return seen


@pytest.mark.parametrize(
    ("length", "dtype", "expected"),
    [
        (12, torch.bfloat16, torch.float32),
        (1, torch.bfloat16, torch.bfloat16),
        (2048, torch.bfloat16, torch.bfloat16),
        (12, torch.float32, torch.float32),
    ],
)
def test_only_short_sequences_in_bf16_are_computed_otherwise(length, dtype, expected, computed):
    mixed, _ = attend(Layer(), *inputs(length, dtype), None)
    assert computed == [expected]
    assert mixed.dtype is dtype


@pytest.mark.parametrize("length", [8, 2048])
def test_a_llama_under_autocast_uses_it(length, computed):
    shape = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    model = AutoModelForCausalLM.from_config(shape)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.arange(length)[None] % 32).logits.sum().backward()
    assert computed == [torch.float32 if length == 8 else torch.bfloat16]
