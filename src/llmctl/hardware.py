"""Devices, cores and memory of this process, and the devices' peak speed."""

import gc
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from llmctl.errors import ResourceError

PEAK_FLOPS = {  # dense bf16 tensor-core FLOP/s from the vendors' data sheets; first match wins
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "B200": 2250e12,
    "B100": 1750e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165.2e12,
    "3090": 71e12,
}


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Parts of torch's messages, on GPUs and on CPUs."""


def pick_device(name: str) -> str:
    """Return the device for `auto|cpu|cuda|mps`; in a distributed run the local rank's GPU.

    Raises:
        ResourceError: the device was asked for and is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((device for device, there in available.items() if there), "cpu")
    if not available.get(name, True):
        raise ResourceError(f"--device {name}: there is none here", hint="use --device cpu")
    return name


def usable_cores() -> int:
    """Return the cores for this process: by affinity, cgroup quota and other local ranks."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quota = _cgroup_cores()
    if quota is not None:
        cores = min(cores, quota)
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _cgroup_cores() -> int | None:
    """Return the whole cores of the cgroup's quota, None without one (cgroup v2, then v1)."""
    for files in (
        ("/sys/fs/cgroup/cpu.max",),
        ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
    ):
        try:
            words = " ".join(Path(name).read_text() for name in files).split()
        except OSError:
            continue
        if words[0].isdigit() and int(words[1]) > 0:
            return max(1, int(words[0]) // int(words[1]))
    return None


def set_threads(threads: int | None) -> int:
    """Use this many CPU threads, by default the usable cores; return the number."""
    count = threads or usable_cores()
    torch.set_num_threads(count)
    return count


@contextmanager
def threads_set(threads: int) -> Iterator[None]:
    """Use this many CPU threads in the body."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def has_bf16(device: str) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def device_name(device: str) -> str:
    """Return the vendor's name of the device."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return str(torch.cpu.get_capabilities().get("cpu_name", device)) if device == "cpu" else device


def peak_flops(device: str) -> float | None:
    """Return the peak dense bf16 FLOP/s of the device, None where it is not known."""
    name = device_name(device)
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)


@contextmanager
def memory_errors(
    batch_size: int | None = None, grad_accum: int = 1, hint: str | None = None
) -> Iterator[None]:
    """Turn running out of memory into an error that says what to change.

    That is the batch of the training that the body does, unless a hint says otherwise.

    Raises:
        ResourceError: the device or the machine has no memory left.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, RuntimeError) and not any(sign in text for sign in OUT_OF_MEMORY):
            raise
        raise ResourceError(
            f"out of memory: {(text.splitlines() or [''])[0][:200]}",
            hint=hint or _smaller(batch_size, grad_accum),
        ) from None


def _smaller(batch_size: int | None, grad_accum: int) -> str:
    """Return the hint; a training step keeps its size."""
    if batch_size is None:
        return "use a smaller --batch-size"
    if batch_size == 1:
        return "one sequence is too much already: use a smaller model or shorter sequences"
    half = batch_size // 2 if batch_size % 2 == 0 else 1
    more = batch_size * grad_accum // half
    return (
        f"try --batch-size {half} --grad-accum {more}, which keeps the effective batch "
        "(to go on from a checkpoint, with --resume --resume-allow batch_size,grad_accum), "
        "or --find-batch-size"
    )


def memory_in_use(device: str) -> int:
    """Bytes: the peak on a GPU since the start, resident memory of the process elsewhere."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return int(psutil.Process().memory_info().rss)


def peak_memory(device: str) -> int:
    """Bytes: the most that this process has held so far."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def release_memory(device: str) -> None:
    """Give back what is no longer used, and forget the peak."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory_total() -> int:
    """Bytes of the machine's memory, or of what the process's cgroups grant of it."""
    total = int(psutil.virtual_memory().total)
    for folder in _memory_cgroups():
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                most = (folder / name).read_text().strip()
            except OSError:
                continue
            if most.isdigit():
                total = min(total, int(most))
    return total


def memory_left() -> int:
    """Return the free bytes of the machine's memory, within the limits of the cgroups."""
    left = int(psutil.virtual_memory().available)
    for folder in _memory_cgroups():
        for limit, usage in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            try:
                most, used = ((folder / name).read_text().strip() for name in (limit, usage))
            except OSError:
                continue
            if most.isdigit():
                left = min(left, int(most) - int(used) + _reclaimable(folder))
    return left


def _memory_cgroups() -> Iterator[Path]:
    """Yield the folders of this process's memory cgroup and of those above, version 2 or 1."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = Path("/sys/fs/cgroup") / controllers
            inner = root / path.lstrip("/")
            yield from (f for f in (inner, *inner.parents) if f.is_relative_to(root))


def _reclaimable(folder: Path) -> int:
    """Return the bytes of cached files in a cgroup, which count as used but are reclaimable."""
    try:
        words = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return 0
    return int(words.get("total_inactive_file", words.get("inactive_file", 0)))
