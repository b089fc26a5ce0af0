"""A trainer's state as named tensors, and back; the same for one process, DDP and FSDP."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from llmctl.checkpoint import Content
from llmctl.errors import ModelError


def capture(
    model: nn.Module, optimizers: list[Optimizer], step: int, state: Mapping[str, Any]
) -> Content:
    """All that decides how the run goes on. Collective: every rank calls it."""
    moments = {
        f"{name}.{key}": value
        for name, facts in _optimizer_state(model, optimizers).items()
        for key, value in facts.items()
    }
    tensors = {name: whole(value) for name, value in moments.items() if torch.is_tensor(value)}
    scalars = {name: value for name, value in moments.items() if name not in tensors}
    return Content(
        step=step,
        model=weights(model),
        optimizer=tensors,
        rng=generators(),
        state={"progressed": dict(state), "optimizer": scalars},
    )


@torch.no_grad()
def restore(model: nn.Module, optimizers: list[Optimizer], content: Content) -> None:
    """Put back what `capture` took.

    Raises:
        ModelError: the checkpoint's weights have other names than the model's.
    """
    named = _named(model)
    if unknown := sorted(set(named) ^ set(content.model)):
        raise ModelError(f"the checkpoint is of another model: {unknown[0]}")
    for name, tensor in named.items():
        tensor.copy_(_spread(content.model[name], tensor))
    saved: dict[str, dict[str, Any]] = {}
    for key, value in {**content.optimizer, **content.state["optimizer"]}.items():
        name, _, fact = key.rpartition(".")
        like = named[name]
        placed = _spread(value, like) if getattr(value, "shape", None) == like.shape else value
        saved.setdefault(name, {})[fact] = placed
    for optimizer in optimizers:
        names = _names_in(model, optimizer)
        state = {number: saved[name] for number, name in enumerate(names) if name in saved}
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    torch.set_rng_state(content.rng["cpu"])
    if "cuda" in content.rng:
        torch.cuda.set_rng_state(content.rng["cuda"])


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights and buffers on the CPU by name, tied ones once. Collective."""
    return {name: whole(tensor) for name, tensor in _named(model).items()}


def whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU, of all shards where the tensor is sharded."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().to("cpu", copy=True)


def generators() -> dict[str, Tensor]:
    """State of this process's random generators."""
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def _named(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and the buffers that are saved, without the prefix that DDP gives."""
    kept = set(model.state_dict())
    tensors = [*model.named_parameters(), *(b for b in model.named_buffers() if b[0] in kept)]
    return {name.removeprefix("module."): tensor for name, tensor in tensors}


def _names_in(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Names of an optimizer's parameters in the order of its groups."""
    names = {id(tensor): name for name, tensor in _named(model).items()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _optimizer_state(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, dict[str, Any]]:
    return {
        name: optimizer.state[parameter]
        for optimizer in optimizers
        for name, parameter in zip(
            _names_in(model, optimizer),
            (p for group in optimizer.param_groups for p in group["params"]),
            strict=True,
        )
    }


def _spread(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor placed as `like` is: on its device, sharded over its mesh."""
    if isinstance(like, DTensor):
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor.to(like.device)
