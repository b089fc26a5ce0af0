"""State of a training run as named tensors, and back; the same for one process, DDP and FSDP."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Muon, Optimizer
from transformers import PreTrainedConfig

from llmctl import hardware
from llmctl.errors import ModelError
from llmctl.runs.checkpoint import CheckpointContent
from llmctl.training.run_state import Progress

WITHOUT_EFFECT = ("transformers_version", "_name_or_path", "dtype", "use_cache", "score_at")
"""Keys of a model's configuration that decide nothing in training."""


def capture(
    model: nn.Module,
    optimizers: list[Optimizer],
    progress: Progress,
    state: Mapping[str, Any] | None = None,
    *,
    rank: int = 0,
) -> CheckpointContent:
    """All that decides how the run goes on. Collective: every rank calls it; rank 0 gets tensors.

    The model is placed as it trains. What is frozen is not kept: it never changes. `state` is what
    else must come back; JSON.
    """
    moments = {
        f"{name}.{key}": value
        for name, facts in _optimizer_state(model, optimizers).items()
        for key, value in facts.items()
    }
    tensors = {name: value for name, value in moments.items() if torch.is_tensor(value)}
    scalars = {name: value for name, value in moments.items() if name not in tensors}
    return CheckpointContent(
        step=progress.step,
        model=_gathered(_trained(model), rank),
        optimizer=_gathered(tensors, rank),
        rng=generators(),
        state={
            "progressed": vars(progress),
            "optimizer": scalars,
            "made_with": surroundings(next(model.parameters()).device.type),
            **(state or {}),
        },
        best=progress.best_step,
    )


@torch.no_grad()
def restore(model: nn.Module, optimizers: list[Optimizer], content: CheckpointContent) -> None:
    """Put back what `capture` took, but for the random generators: see `set_generators`.

    Raises:
        ModelError: the checkpoint's weights have other names than the model's.
    """
    put_weights(model, content.model)
    named = _trained(model)
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


@torch.no_grad()
def put_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a model, placed as it trains, weights; raise a ModelError for other names or shapes."""
    named = _trained(model)
    if unknown := sorted(set(named) ^ set(tensors)):
        raise ModelError(f"the checkpoint is of another model: {unknown[0]}")
    for name, tensor in named.items():
        if tensors[name].shape != tensor.shape:
            raise ModelError(f"the checkpoint is of another model: the shape of {name}")
        tensor.copy_(_spread(tensors[name], tensor))


def weights(model: nn.Module, rank: int = 0, *, trained_only: bool = False) -> dict[str, Tensor]:
    """All weights, or those that train, and buffers on rank 0's CPU by name, tied ones once.

    Collective.
    """
    return _gathered(_trained(model) if trained_only else _named(model), rank)


def surroundings(device: str) -> dict[str, Any]:
    """Return what the last bits depend on besides the run: device, library, threads."""
    return {
        "device": hardware.device_name(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def generators() -> dict[str, Tensor]:
    """State of this process's random generators: torch's, NumPy's and Python's."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    numpy_state = [kind, np.asarray(keys).tolist(), *rest]
    states = {
        "cpu": torch.get_rng_state(),
        "numpy": _as_tensor(numpy_state),
        "python": _as_tensor(random.getstate()),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_generators(states: Mapping[str, Tensor]) -> None:
    """Put back what `generators` took."""
    torch.set_rng_state(states["cpu"])
    np.random.set_state(tuple(_as_json(states["numpy"])))
    version, internal, gauss = _as_json(states["python"])
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


@contextmanager
def generators_kept() -> Iterator[None]:
    """Let the body draw random numbers without a trace."""
    before = generators()
    try:
        yield
    finally:
        set_generators(before)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode for the body."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def checkpoint_bytes(model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> int:
    """About how large a checkpoint will be: weights that train, and two moments of each.

    Those among them that Muon updates have one.
    """
    total = 3 * sum(tensor.numel() * tensor.element_size() for tensor in _trained(model).values())
    for optimizer in optimizers:
        if isinstance(optimizer, Muon):
            groups = (group["params"] for group in optimizer.param_groups)
            total -= sum(p.numel() * p.element_size() for params in groups for p in params)
    return total


def architecture(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the entries of a model's configuration that decide what its weights compute."""
    return {name: value for name, value in config.to_dict().items() if name not in WITHOUT_EFFECT}


def _as_tensor(state: object) -> Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def _as_json(tensor: Tensor) -> Any:
    return json.loads(bytes(tensor.tolist()))


def _gathered(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Copies on rank 0's CPU, of all shards where sharded; nothing on other ranks. Collective."""
    copies: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank == 0:
            copies[name] = full.detach().to("cpu", copy=True)
    return copies


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """Return what training changes: parameters that have gradients, and buffers."""
    return {
        name: tensor
        for name, tensor in _named(model).items()
        if tensor.requires_grad or not isinstance(tensor, nn.Parameter)
    }


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
    names = {id(tensor): name for name, tensor in _named(model).items()}
    return {
        names[id(parameter)]: optimizer.state[parameter]
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _spread(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor placed as `like` is: on its device, sharded over its mesh."""
    if isinstance(like, DTensor):
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor.to(like.device)
