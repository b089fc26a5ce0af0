"""Measure the energy of a run by the hardware's counters; estimate it where there are none.

In: two moments of a run. Out: kilowatt-hours, and in words how they were measured. Only processors
count: no memory, no cooling, no power supply.
"""

import ctypes
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl import launch

CORE_WATTS = 12.0
"""Power of a busy core of an unknown processor, as in Green Algorithms (Lannelongue et al., 2021,
doi:10.1002/advs.202100707)."""
KWH = 3.6e6
"""Joules of a kilowatt-hour."""
POWERCAP = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"
NAME_BYTES = 96


@dataclass
class EnergyMeter:
    """Energy used from one reading of the counters to the next."""

    marked: float = field(default_factory=time.monotonic)
    core_seconds: float = field(default_factory=lambda: _core_seconds())
    packages: dict[Path, int] = field(default_factory=lambda: _packages())
    """Microjoules used by each CPU, where that can be read."""
    package_joules: float = 0.0
    gpus: list[tuple[str, float]] = field(default_factory=lambda: list(_gpus()))
    """Name of each GPU that this process may use, and the joules used by it."""

    def tick(self) -> None:
        """Read the CPUs' counters, which wrap around every half hour or so."""
        now = _packages()
        for path, before in self.packages.items():
            used = now.get(path, before) - before
            if used < 0:
                used += int(path.with_name("max_energy_range_uj").read_text())
            self.package_joules += used / 1e6
        self.packages = now

    def add(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Return the manifest's `energy` (kwh, seconds, method) with that since the last reading.

        Where the manifest names a GPU as device, that counts, too.
        """
        self.tick()
        earlier = manifest.get("energy") or {"kwh": 0.0, "seconds": 0.0}
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        machines = launch.machines()
        now = EnergyMeter()
        busy = (now.core_seconds - self.core_seconds) * local
        joules = self.package_joules if self.packages else busy * CORE_WATTS
        assumed = f"CPU assumed to draw {CORE_WATTS:g} W for each busy core"
        methods = ["CPU by its own counter (RAPL)" if self.packages else assumed]
        before, after = self.gpus[:local], now.gpus[:local]
        if before and len(before) == len(after) and before[0][0] == manifest.get("device"):
            joules += sum(b[1] - a[1] for a, b in zip(before, after, strict=True))
            methods.append("GPU by its own counter (NVML)")
        if machines > 1:
            methods.append(f"one machine's times {machines}")
        seconds = now.marked - self.marked
        self.__dict__.update(vars(now))
        return {
            "kwh": earlier["kwh"] + joules * machines / KWH,
            "seconds": round(earlier["seconds"] + seconds, 3),
            "method": "; ".join(methods) + "; without memory and cooling",
        }


def _core_seconds() -> float:
    """Return the core-seconds used by this process and its finished children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _packages() -> dict[Path, int]:
    """Read the counter of every CPU; only root may, on most machines."""
    try:
        domains = sorted(POWERCAP.glob("intel-rapl:?"))
        whole = [d for d in domains if (d / "name").read_text().startswith("package")]
        return {d / "energy_uj": int((d / "energy_uj").read_text()) for d in whole}
    except (OSError, ValueError):
        return {}


def _gpus() -> Iterator[tuple[str, float]]:
    """Yield name and joules of the GPUs that CUDA_VISIBLE_DEVICES allows, in its order."""
    with _nvml() as nvml:
        if nvml is None:
            return
        count = ctypes.c_uint()
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = map(str, range(count.value)) if allowed is None else allowed.split(",")
        for name in names:
            device, used = ctypes.c_void_p(), ctypes.c_ulonglong()
            error = (
                nvml.nvmlDeviceGetHandleByIndex_v2(int(name), ctypes.byref(device))
                if name.strip().isdigit()
                else nvml.nvmlDeviceGetHandleByUUID(name.strip().encode(), ctypes.byref(device))
            )
            if error or nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(used)):
                return  # as CUDA does, which stops at the first that is none; or too old a GPU
            text = ctypes.create_string_buffer(NAME_BYTES)
            nvml.nvmlDeviceGetName(device, text, NAME_BYTES)
            yield text.value.decode(), used.value / 1000


@contextmanager
def _nvml() -> Iterator[Any]:
    """Open NVIDIA's management library (NVML); None where there is no driver."""
    try:
        nvml = ctypes.CDLL(NVML)
    except OSError:
        yield None
        return
    if nvml.nvmlInit_v2():
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()
