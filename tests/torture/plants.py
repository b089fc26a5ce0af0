"""What a trial's process does to itself before the command starts: crashes, bad numbers, counts."""

import os
from pathlib import Path

CRASHED = 137
"""The exit code a shell gives a process that SIGKILL ended."""


def die_at_event(number: int) -> None:
    """Leave as if killed right after a checkpoint's `number`-th operation on the disk."""
    from llmctl import checkpoint

    seen = 0

    def fault(event: str, path: Path) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            os._exit(CRASHED)

    checkpoint.fault = fault


def list_events(log: Path) -> None:
    """Write down each operation on the disk."""
    from llmctl import checkpoint

    def fault(event: str, path: Path) -> None:
        with log.open("a") as file:
            file.write(f"{event} {path.parent.name}/{path.name}\n")

    checkpoint.fault = fault


def spoil_loss(kind: str, passes: tuple[int, ...], steps_log: Path | None = None) -> None:
    """At these forward passes with labels, counted from 1: `inf`, `nan-gradient` or `memory`."""
    import torch
    from torch.nn.modules.module import register_module_forward_hook
    from transformers import PreTrainedModel

    if steps_log is not None:
        count_steps(steps_log)
    seen = 0

    def hook(module, arguments, output):
        nonlocal seen
        loss = getattr(output, "loss", None)
        if not isinstance(module, PreTrainedModel) or loss is None or not module.training:
            return
        seen += 1
        if seen not in passes:
            return
        if kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        for name in ("loss", "log_probs"):  # TRL takes the loss from the second where it can
            value = getattr(output, name, None)
            if value is not None and kind == "inf":
                setattr(output, name, value + (torch.inf if name == "loss" else -torch.inf))
            elif value is not None:
                value.register_hook(lambda gradient: gradient * torch.nan)

    register_module_forward_hook(hook)


def count_steps(log: Path) -> None:
    """Append a dot for each step of an optimizer that has gradients: without, nothing changes."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def hook(optimizer, arguments, options):
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        if any(p.grad is not None for p in parameters):
            with log.open("a") as file:
                file.write(".")

    register_optimizer_step_post_hook(hook)


def fill_disk_at_event(number: int, disk: Path) -> None:
    """Take all the space that is left right after a checkpoint's `number`-th operation."""
    from llmctl import checkpoint
    from torture.harness import fill

    seen = 0

    def fault(event: str, path: Path) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            fill(disk)

    checkpoint.fault = fault
