"""The update rules: which parameter is updated by what."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers.pytorch_utils import Conv1D

from llmctl.training.muon import BatchedMuon
from llmctl.training.plan import Plan


def make_optimizers(model: nn.Module, plan: Plan, device: str) -> list[Optimizer]:
    """One or two optimizers over all parameters that train.

    With Muon (Jordan et al., 2024) the matrices inside the blocks are orthogonalised and everything
    else is AdamW's. Its step is scaled to AdamW's size (Liu et al., 2025, arXiv:2502.16982, eq. 4),
    so that one learning rate serves both.
    """
    matrices = block_matrices(model) if plan.optimizer == "muon" else set[Tensor]()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    muon = [weight for weight in trained if weight in matrices]
    rest = [weight for weight in trained if weight not in matrices]
    optimizers = [_adamw(decay_groups(rest, plan.weight_decay), plan, device)]
    if muon:
        optimizers.append(
            BatchedMuon(
                muon,
                lr=plan.lr,
                weight_decay=plan.weight_decay,
                momentum=plan.momentum,
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


def _adamw(groups: list[dict[str, Any]], plan: Plan, device: str) -> Optimizer:
    betas = (plan.beta1, plan.beta2)
    if plan.optimizer == "adamw-8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, lr=plan.lr, betas=betas)  # type: ignore[no-any-return]
    return AdamW(groups, lr=plan.lr, betas=betas, fused=device in ("cpu", "cuda"))


def block_matrices(model: nn.Module) -> set[Tensor]:
    """Weights of the linear layers, the output head and routers aside."""
    return {
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not name.endswith(("lm_head", "mlp.gate"))
    }
