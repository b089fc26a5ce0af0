"""Low-rank layers in one operation: their numbers, and the cases that are left to PEFT."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from llmctl.models.patched_lora import LowRankLinear, LowRankProduct, fuse_lora


class Small(nn.Module):
    """One layer."""

    def __init__(self, *, bias):
        super().__init__()
        self.layer = nn.Linear(48, 40, bias=bias)

    def forward(self, x):
        return self.layer(x)


def adapted(*, bias=True, **more):
    torch.manual_seed(0)
    model = get_peft_model(Small(bias=bias), LoraConfig(r=4, target_modules=["layer"], **more))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    return model


def layer_of(model):
    return model.base_model.model.layer


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_definition(bias):
    """Hu et al., 2021, eq. 3, against differences in float64."""
    torch.manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    inputs, a, b = draw(6, 5), draw(2, 5), draw(3, 2)
    weight, shift = draw(3, 5).detach(), draw(3).detach() if bias else None
    found = LowRankProduct.apply(inputs, weight, shift, a, b, 0.7)
    wanted = inputs @ weight.T + 0.7 * (inputs @ a.T) @ b.T + (0 if shift is None else shift)
    torch.testing.assert_close(found, wanted)
    assert torch.autograd.gradcheck(
        lambda x, a, b: LowRankProduct.apply(x, weight, shift, a, b, 0.7), (inputs, a, b)
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [torch.float32, torch.bfloat16])
def test_it_is_nearer_to_exact_numbers_than_pefts(bias, frozen):
    model = adapted(bias=bias)
    layer = layer_of(model)
    layer.base_layer.to(torch.bfloat16)  # numbers that both can hold
    exact = [w.detach().float().double() for w in layer.base_layer.parameters()]
    layer.base_layer.to(frozen)
    a, b = (getattr(layer, f"lora_{x}")["default"].weight for x in "AB")
    x = torch.randn(3, 7, 48, dtype=torch.bfloat16)
    wanted = x.double() @ exact[0].T + (exact[1] if bias else 0)
    wanted = wanted + layer.scaling["default"] * (x.double() @ a.double().T) @ b.double().T
    errors, grads = [], []
    for how in (lambda one: one, fuse_lora):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            found = how(model)(x)
        assert (found.dtype, found.shape) == (torch.bfloat16, (3, 7, 40))
        errors.append(float((found.detach().double() - wanted).detach().square().mean()))
        found.float().square().sum().backward()
        grads.append((a.grad.clone(), b.grad.clone()))
    assert type(layer) is LowRankLinear
    assert errors[1] < errors[0]
    for peft, ours in zip(*grads, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, peft, rtol=0.03, atol=0.03 * float(peft.abs().max()))


def unlike(model, x):
    """Whether the fused layer computes by itself: how PEFT's own is called is counted."""
    fuse_lora(model)
    calls = []
    layer = layer_of(model)
    layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    return found, not calls


def test_what_is_not_plain_is_left_to_peft():
    x = torch.randn(2, 48)
    assert unlike(adapted(), x)[1]
    assert unlike(adapted(lora_dropout=0.5).eval(), x)[1]
    assert not unlike(adapted(lora_dropout=0.5).train(), x)[1]
    assert not unlike(adapted(use_dora=True), x)[1]
    assert not unlike(adapted(lora_bias=True), x)[1]
    two = adapted()
    two.add_adapter("other", LoraConfig(r=4, target_modules=["layer"]))
    two.base_model.set_adapter(["default", "other"])
    assert not unlike(two, x)[1]
    merged = adapted()
    merged.merge_adapter()
    assert not unlike(merged, x)[1]
    trained = adapted()
    layer_of(trained).base_layer.weight.requires_grad_(True)
    assert not unlike(trained, x)[1]
    off = adapted()
    with off.disable_adapter():
        assert not unlike(off, x)[1]


def test_without_autocast_the_numbers_are_pefts_to_the_bit():
    model, x = adapted(), torch.randn(2, 48)
    before = model(x)
    assert torch.equal(fuse_lora(model)(x), before)
