"""The update rules: which parameter is updated by what.

Muon is torch's, with the matrices of one shape orthogonalised together, which is four times as fast
on a CPU.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from transformers.pytorch_utils import Conv1D

from llmctl.training.hyperparameters import Hyperparameters

STACKED = 2**26
"""Most elements that are orthogonalised at once, which bounds the memory it takes."""


def make_optimizers(
    model: nn.Module, hyperparameters: Hyperparameters, device: str
) -> list[Optimizer]:
    """One or two optimizers over all parameters that train.

    With Muon (Jordan et al., 2024) the matrices inside the blocks are orthogonalised and everything
    else is AdamW's. Its step is scaled to AdamW's size (Liu et al., 2025, arXiv:2502.16982, eq. 4),
    so that one learning rate serves both.
    """
    if hyperparameters.optimizer.endswith("8bit"):
        _keep_embedding_moments(model)
    matrices = block_matrices(model) if hyperparameters.optimizer == "muon" else set[Tensor]()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    muon = [weight for weight in trained if weight in matrices]
    rest = [weight for weight in trained if weight not in matrices]
    optimizers = [_adamw(decay_groups(rest, hyperparameters.weight_decay), hyperparameters, device)]
    if muon:
        assert hyperparameters.momentum is not None
        optimizers.append(
            BatchedMuon(
                muon,
                lr=hyperparameters.lr,
                weight_decay=hyperparameters.weight_decay,
                momentum=hyperparameters.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


def decay_groups(weights: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay, all else does not."""
    trained = list(weights)
    groups = [
        {"params": [w for w in trained if w.dim() >= 2], "weight_decay": weight_decay},
        {"params": [w for w in trained if w.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def set_lr(optimizers: list[Optimizer], lr: float) -> None:
    """Give every parameter group this learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def _adamw(
    groups: list[dict[str, Any]], hyperparameters: Hyperparameters, device: str
) -> Optimizer:
    betas = (hyperparameters.beta1, hyperparameters.beta2)
    if hyperparameters.optimizer.endswith("8bit"):
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

        kind = PagedAdamW8bit if hyperparameters.optimizer.startswith("paged") else AdamW8bit
        return kind(groups, lr=hyperparameters.lr, betas=betas)  # type: ignore[no-any-return]
    return AdamW(groups, lr=hyperparameters.lr, betas=betas, fused=device in ("cpu", "cuda"))


def _keep_embedding_moments(model: nn.Module) -> None:
    """Keep the moments of embeddings in 32 bits: in 8 they are unstable (Dettmers et al., 2021,
    arXiv:2110.02861, section 2.3).
    """
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})


def block_matrices(model: nn.Module) -> set[Tensor]:
    """Weights of the linear layers, the output head and routers aside."""
    return {
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not name.endswith(("lm_head", "mlp.gate"))
    }


class BatchedMuon(Muon):
    """`torch.optim.Muon`, its update and its state, in stacks of matrices of one shape.

    Newton-Schulz on one small matrix after another spends its time in overhead; on a stack the same
    products are one batched call each. Muon: Jordan et al., 2024. Scale: Liu et al., 2025,
    arXiv:2502.16982, eq. 4.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for weights in _stacks(group["params"]):
                self._update(weights, group)

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        gradients = [weight.grad for weight in weights if weight.grad is not None]  # all have one
        buffers = [self._buffer(weight) for weight in weights]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = (
            torch._foreach_lerp(gradients, buffers, momentum) if group["nesterov"] else buffers
        )
        wide = [u.mT if u.size(0) > u.size(1) else u for u in updates]
        steps = orthogonalise(
            torch.stack(wide), group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        scale = lr * 0.2 * math.sqrt(max(weights[0].shape))
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        for weight, step in zip(weights, steps, strict=True):
            weight.add_(step.mT if weight.size(0) > weight.size(1) else step, alpha=-scale)

    def _buffer(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        return state["momentum_buffer"]  # type: ignore[no-any-return]


def orthogonalise(
    stack: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Newton-Schulz iteration towards U V^T of each matrix's singular value decomposition.

    Args:
        stack: (N, rows, columns), rows <= columns.
        coefficients: of the quintic (a, b, c).
        steps: iterations.
        eps: least norm to divide by.

    Returns:
        (N, rows, columns) in bfloat16.
    """
    a, b, c = coefficients
    x = stack.bfloat16()
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _stacks(weights: list[Tensor]) -> Iterator[list[Tensor]]:
    """Groups of matrices that have a gradient and the same shape, up to transposition."""
    alike: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for weight in weights:
        if weight.grad is not None:
            alike[tuple(sorted(weight.shape))].append(weight)
    for shape, group in alike.items():
        size = max(1, STACKED // math.prod(shape))
        yield from (group[i : i + size] for i in range(0, len(group), size))
