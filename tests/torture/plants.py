"""What a trial's process does to itself before the command starts: crashes, bad numbers, counts."""

import os
import signal
from importlib import import_module
from pathlib import Path

CRASHED = 137
"""The exit code a shell gives a process that SIGKILL ended."""


def die_at_event(number: int) -> None:
    """Leave as if killed right after a checkpoint's `number`-th operation on the disk."""
    from llmctl.runs import checkpoint

    seen = 0

    def fault(event: str, path: Path) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            os._exit(CRASHED)

    checkpoint.fault = fault


def die_at_call(where: str) -> None:
    """Leave as if killed at a call of this function ("module:function") or method.

    It is the first, or with a number behind it ("module:function:2") that one.
    """
    module, path, *number = where.split(":")
    *owners, name = path.split(".")
    owner = import_module(module)
    for attribute in owners:
        owner = getattr(owner, attribute)
    called, left = getattr(owner, name), int(*number or "1")

    def counted(*arguments, **options):
        nonlocal left
        left -= 1
        if left == 0:
            os._exit(CRASHED)
        return called(*arguments, **options)

    setattr(owner, name, counted)


def list_events(log: Path, signal_at: str | None = None) -> None:
    """Write down each operation on the disk; send a SIGTERM to oneself right after one."""
    from llmctl.runs import checkpoint

    def fault(event: str, path: Path) -> None:
        line = f"{event} {path.parent.name}/{path.name}"
        with log.open("a") as file:
            file.write(f"{line}\n")
        if line == signal_at:
            os.kill(os.getpid(), signal.SIGTERM)

    checkpoint.fault = fault


def spoil_loss(kind: str, passes: tuple[int, ...], steps_log: Path | None = None) -> None:
    """At these backward passes, counted from 1: `inf`, `nan-gradient` or `memory`."""
    import torch

    if steps_log is not None:
        count_steps(steps_log)
    backward, seen = torch.Tensor.backward, 0

    def spoiled(loss, *arguments, **options):
        nonlocal seen
        seen += 1
        if seen in passes:
            if kind == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            if kind == "inf":
                loss.data.fill_(torch.inf)
            else:
                loss.register_hook(lambda gradient: gradient * torch.nan)
        backward(loss, *arguments, **options)

    torch.Tensor.backward = spoiled


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
    from llmctl.runs import checkpoint
    from tests.torture.harness import fill

    seen = 0

    def fault(event: str, path: Path) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            fill(disk)

    checkpoint.fault = fault
