"""Check devices and the libraries that compute on them; torch itself may be broken."""

import logging
import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from llmctl.checkup import CheckResult
from llmctl.checkup.machine import check_memory, check_threads
from llmctl.numbers import byte_size

DRIVER = Path("/proc/driver/nvidia/version")
MAX_ERROR = 0.15
"""NF4 with blocks of 64 loses about 0.09 of the norm of weights that are normally distributed."""


def check_devices() -> Iterator[CheckResult]:
    """Check threads, memory, each GPU, and bitsandbytes on the default device."""
    try:
        import torch

        from llmctl import hardware
    except (ImportError, OSError) as error:  # a library of CUDA's that is not there
        text = f"torch does not load: {str(error).splitlines()[0]}"
        yield CheckResult("torch", "failure", text, "pip install --force-reinstall torch")
        return
    yield check_threads(hardware.usable_cores())
    yield check_memory(hardware.memory_left())
    name = hardware.device_name("cpu")
    kind = name if name != "cpu" else platform.processor() or platform.machine()
    bf16 = "in hardware" if hardware.has_bf16("cpu") else "emulated"
    yield CheckResult("cpu", "ok", f"{kind}, bfloat16 {bf16}")
    if torch.cuda.is_available():
        yield from _gpus()
    elif (unused := _unused_gpu(torch.__version__, torch.version.cuda)) is not None:
        yield unused
    device = hardware.pick_device("auto")
    if device == "mps":
        yield CheckResult("gpu", "ok", "Apple's, through mps")
    yield check_4bit("cpu" if device == "mps" else device)


def check_4bit(device: str) -> CheckResult:
    """Check that bitsandbytes' 4-bit weights lose no more than they should on a device."""
    name = "bitsandbytes"
    logging.getLogger(name).setLevel(logging.ERROR)  # it says which kernels a CPU has not
    try:
        error = _round_trip_error(device)
    except (ImportError, OSError, RuntimeError, AttributeError) as problem:
        text = f"4-bit weights do not work on {device}: {str(problem).splitlines()[0]}"
        return CheckResult(name, "failure", text, "pip install --force-reinstall bitsandbytes")
    text = f"4-bit weights on {device}: a round trip is off by {error:.1%}"
    if not error < MAX_ERROR:
        fix = "do not use --load-in-4bit here; pip install --force-reinstall bitsandbytes"
        return CheckResult(name, "failure", text, fix)
    if device == "cpu":
        from bitsandbytes import functional

        if functional.has_avx512bf16():  # models/quantized.py guards 4-bit layers
            text += "; this CPU's AVX512-BF16 path spoils weights, and llmctl keeps off it"
    return CheckResult(name, "ok", text)


def _round_trip_error(device: str) -> float:
    """Error of 4-bit normally distributed weights, as a share of their norm."""
    import torch
    from bitsandbytes import functional

    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    back = functional.dequantize_4bit(packed, state)
    return float((back - weight).norm() / weight.norm())


def _gpus() -> Iterator[CheckResult]:
    """Check each GPU with a small product."""
    import torch

    for index in range(torch.cuda.device_count()):
        name = f"gpu {index}"
        try:
            free, total = torch.cuda.mem_get_info(index)
            ones = torch.ones(64, 64, device=f"cuda:{index}")
            works = bool((ones @ ones == 64).all())
        except RuntimeError as error:
            text = f"does not compute: {str(error).splitlines()[0]}"
            served = f"and driver {_driver()}" if _driver() else "that the driver serves"
            yield CheckResult(name, "failure", text, f"install a torch for CUDA {served}")
            continue
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        text = (
            f"{torch.cuda.get_device_name(index)}, {byte_size(free)} free of {byte_size(total)}, "
            f"CUDA {torch.version.cuda}, driver {_driver() or 'unknown'}, "
            f"bfloat16 {'in hardware' if bf16 else 'emulated'}"
        )
        if not works:
            yield CheckResult(name, "failure", f"{text}: wrong product", "test the card's memory")
        elif free < total / 2:
            yield CheckResult(name, "warning", text, "another program uses it: see nvidia-smi")
        else:
            yield CheckResult(name, "ok", text)


def _unused_gpu(torch_version: str, built_for: str | None) -> CheckResult | None:
    """Explain why torch sees no NVIDIA GPU; None where there is none."""
    if not (DRIVER.exists() or shutil.which("nvidia-smi")):
        return None
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return CheckResult("gpu", "ok", "hidden by CUDA_VISIBLE_DEVICES")
    if built_for is None:
        text = f"there is one, and torch {torch_version} is built for the CPU only"
        fix = "pip install --force-reinstall torch, from the index of CUDA wheels that torch names"
        return CheckResult("gpu", "failure", text, fix)
    text = f"torch is built for CUDA {built_for}; driver {_driver() or 'unknown'} does not serve it"
    return CheckResult("gpu", "failure", text, "update the driver, or reboot after an update")


def _driver() -> str | None:
    """Version of the NVIDIA driver."""
    try:
        match = re.search(r"(\d+\.\d+(?:\.\d+)?)\s", DRIVER.read_text())
    except OSError:
        return None
    return match[1] if match else None
