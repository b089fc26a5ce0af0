"""Batched Muon is torch's Muon."""

import pytest
import torch
from torch.optim import Muon

from llmctl.training.optimizers import BatchedMuon, orthogonalise

SHAPES = [(16, 16), (16, 16), (48, 16), (16, 48), (24, 16)]


def test_steps_equal_torch_muon():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    pairs = [(BatchedMuon(ours, **options), ours), (Muon(theirs, **options), theirs)]
    for _ in range(5):
        gradients = [torch.randn(shape) for shape in SHAPES]
        for optimizer, weights in pairs:
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient.clone()
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-2)  # bfloat16 inside
    for a, b in zip(pairs[0][0].state.values(), pairs[1][0].state.values(), strict=True):
        torch.testing.assert_close(a["momentum_buffer"], b["momentum_buffer"])


def test_orthogonalise_makes_singular_values_near_one():
    torch.manual_seed(0)
    stack = torch.randn(3, 16, 40)
    values = torch.linalg.svdvals(orthogonalise(stack, (3.4445, -4.775, 2.0315), 5, 1e-7).float())
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_a_weight_without_gradient_stays():
    weight = torch.nn.Parameter(torch.ones(4, 4))
    BatchedMuon([weight], lr=0.1, adjust_lr_fn="match_rms_adamw").step()
    assert weight.equal(torch.ones(4, 4))


@pytest.mark.parametrize("limit", [1, 16 * 16, 2**26])
def test_stack_size_changes_nothing(limit, monkeypatch):
    monkeypatch.setattr("llmctl.training.optimizers.STACKED", limit)
    torch.manual_seed(1)
    weights = [torch.nn.Parameter(torch.randn(16, 16)) for _ in range(3)]
    expected = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    for weight, other in zip(weights, expected, strict=True):
        weight.grad = torch.randn(16, 16)
        other.grad = weight.grad.clone()
    BatchedMuon(weights, adjust_lr_fn="match_rms_adamw").step()
    Muon(expected, adjust_lr_fn="match_rms_adamw").step()
    for weight, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight, other, atol=1e-3, rtol=1e-2)
