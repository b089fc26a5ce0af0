"""Compute a LoRA layer under autocast as one operation, in place of PEFT's six.

Hu et al., 2021 (arXiv:2106.09685, eq. 3): y = x Wᵀ + b + s (x Aᵀ) Bᵀ, of which A and B train. PEFT
casts x to float32 and back for A, and rounds the sum twice; here addition and multiplication are
one operation, so that the sum is rounded once.
"""

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class LowRankProduct(torch.autograd.Function):
    """x Wᵀ + b + s (x Aᵀ) Bᵀ in the dtype of `weight`, with gradients of x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
    ) -> Tensor:
        """Compute the product.

        Args:
            ctx: for the backward pass.
            inputs: (N, in), in the dtype to compute in.
            weight: (out, in), frozen, in the same dtype.
            bias: (out,), frozen, in the same dtype.
            a: (rank, in), in the dtype that it trains in.
            b: (out, rank), likewise.
            scale: of the adapter.

        Returns:
            (N, out).
        """
        low_a, low_b = a.to(inputs.dtype), (b * scale).to(inputs.dtype)
        inner = inputs @ low_a.T
        output = inputs @ weight.T if bias is None else torch.addmm(bias, inputs, weight.T)
        ctx.save_for_backward(inputs, weight, low_a, low_b, inner)
        ctx.scale, ctx.types = scale, (a.dtype, b.dtype)
        return output.addmm_(inner, low_b.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Compute gradients of inputs, A and B."""
        inputs, weight, low_a, low_b, inner = ctx.saved_tensors
        (grad,) = grads
        grad_inner = grad @ low_b
        grad_inputs = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_inputs = (grad @ weight).addmm_(grad_inner, low_a)
        grad_a = (grad_inner.T @ inputs).to(ctx.types[0]) if ctx.needs_input_grad[3] else None
        if ctx.needs_input_grad[4]:
            grad_b = (grad.T @ inner).to(ctx.types[1]) * ctx.scale
        return grad_inputs, None, None, grad_a, grad_b, None


class LowRankLinear(Linear):  # type: ignore[misc]
    """PEFT's layer, one operation under autocast with one plain adapter."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute what PEFT's layer does."""
        kind = x.device.type
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else ""
        if args or kwargs or not (torch.is_autocast_enabled(kind) and self._is_plain(name)):
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        dtype, base = torch.get_autocast_dtype(kind), self.get_base_layer()
        output: Tensor = LowRankProduct.apply(  # type: ignore[no-untyped-call]
            x.flatten(0, -2).to(dtype),
            base.weight.to(dtype),
            None if base.bias is None else base.bias.to(dtype),
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
        )
        return output.view(*x.shape[:-1], -1)

    def _is_plain(self, name: str) -> bool:
        """Whether this adapter alone is active on a frozen layer."""
        if self.disable_adapters or self.merged or self.fan_in_fan_out or name not in self.lora_A:
            return False
        drops = self.training and not isinstance(self.lora_dropout[name], nn.Identity)
        base = self.get_base_layer()
        return (
            not drops
            and name not in self.lora_variant
            and self.lora_B[name].bias is None
            and not any(weight.requires_grad for weight in base.parameters())
        )


def fuse_lora(model: PeftModel) -> PeftModel:
    """Make the low-rank layers of a model `LowRankLinear`; quantized ones and others stay."""
    for module in model.modules():
        if type(module) is Linear and type(module.get_base_layer()) is nn.Linear:
            module.__class__ = LowRankLinear
    return model
