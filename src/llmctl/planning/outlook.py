"""All that is known of a run before it runs, as one object: a `Work` in, what is shown out."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from llmctl import hardware
from llmctl.planning import scaling
from llmctl.planning.compute import Rate, flops_per_step, flops_per_token, rate_of
from llmctl.planning.memory import Memory, cache_bytes, memory_of
from llmctl.planning.placing import Choice, Placing, bytes_per_parameter, choose, placings
from llmctl.planning.work import Work


@dataclass(frozen=True)
class Outlook:
    """What a run takes, and what may come of it."""

    work: Work
    memory: Memory
    flops_per_token: float
    flops_per_step: float
    rate: Rate | None
    tokens_per_second: float | None
    """Over all devices, as was given or follows from the rate."""
    capacity: float
    """Bytes of a device."""
    placings: list[Placing]
    choice: Choice | None
    notes: tuple[str, ...] = ()

    @property
    def flops(self) -> float | None:
        """Of the whole run."""
        steps = self.work.steps
        return None if steps is None else steps * self.flops_per_step

    @property
    def seconds(self) -> float | None:
        """Of training at the rate, without evaluation and saving."""
        if self.work.tokens is None or self.tokens_per_second is None:
            return None
        return self.work.tokens / self.tokens_per_second

    def as_json(self) -> dict[str, Any]:
        """Every number."""
        work, shape, memory = self.work, self.work.shape, self.memory
        return {
            "stage": work.stage,
            "device": work.device,
            "devices": work.world,
            "parameters": {
                **shape.parts,
                "total": shape.parameters,
                "active": shape.active,
                "trained": work.trained,
            },
            "run": {
                "steps": work.steps,
                "tokens": work.tokens,
                "tokens_per_step": work.tokens_per_step,
                "batch_size": work.batch_size,
                "grad_accum": work.grad_accum,
                "length": work.length,
                "precision": work.precision,
                "optimizer": work.optimizer,
            },
            "memory": {
                "parts": {name: round(size) for name, size in memory.parts.items()},
                "phases": {name: round(size) for name, size in memory.phases.items()},
                "peak": round(memory.peak),
                "peak_phase": memory.peak_phase,
                "host": round(memory.host),
                "bytes_per_parameter": bytes_per_parameter(work),
                "kv_cache_per_token": round(cache_bytes(work, 1, 1)),
                "device": round(self.capacity),
            },
            "compute": {
                "flops_per_token": self.flops_per_token,
                "flops_per_step": self.flops_per_step,
                "flops": self.flops,
                "pf_days": None if self.flops is None else self.flops / scaling.PF_DAY,
                "rate": None if self.rate is None else asdict(self.rate),
                "tokens_per_second": self.tokens_per_second,
                "seconds": self.seconds,
            },
            "scaling": laws(work),
            "sharding": [asdict(placing) for placing in self.placings],
            "flags": None if self.choice is None else self.choice.flags,
            "notes": list(self.notes),
        }


def outlook(
    work: Work,
    config: Any,
    *,
    capacity: float | None = None,
    tflops: float | None = None,
    tokens_per_second: float | None = None,
    rate: Rate | None = None,
    notes: tuple[str, ...] = (),
) -> Outlook:
    """Work it all out.

    Args:
        work: to be done.
        config: of the model.
        capacity: bytes of a device; by default of this machine's.
        tflops: that a device reaches, in 10^12 a second.
        tokens_per_second: over all devices, where that is known instead.
        rate: that was measured.
        notes: what was assumed.
    """
    capacity = capacity or device_memory(work.device)
    per_step = flops_per_step(work, config)
    rate = rate or rate_of(work, tflops)
    speed = tokens_per_second
    if speed is None and rate is not None:
        speed = rate.flops * work.world * work.tokens_per_step / per_step
    return Outlook(
        work,
        memory_of(work),
        flops_per_token(work, config),
        per_step,
        rate,
        speed,
        capacity,
        placings(work, work.world, capacity),
        choose(work, work.world, capacity),
        notes,
    )


def device_memory(device: str) -> float:
    """Bytes of a GPU here, else of this machine that its cgroups grant."""
    if device == "cuda" and torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[1])
    return float(hardware.memory_total())


def laws(work: Work) -> dict[str, Any]:
    """What scaling laws say of this model and of these tokens; the best tokens where none is told.

    They are of pretraining, and of models that meet all their parameters.
    """
    parameters = work.shape.active
    inner = max(1, parameters - work.shape.parts["embedding"] - work.shape.parts["head"])
    found: dict[str, Any] = {
        "hoffmann_2022": _law(scaling.HOFFMANN, parameters, work),
        "besiroglu_2024": _law(scaling.BESIROGLU, parameters, work),
    }
    best = scaling.kaplan_tokens(inner)
    tokens = work.tokens if work.stage == "pretrain" else None
    found["kaplan_2020"] = {
        "best_tokens": best,
        "loss_at_best": scaling.kaplan_loss(inner, best),
        "loss": None if tokens is None else scaling.kaplan_loss(inner, tokens),
    }
    return found


def _law(law: scaling.Parametric, parameters: int, work: Work) -> dict[str, Any]:
    best = law.best_tokens(parameters)
    tokens = work.tokens if work.stage == "pretrain" else None
    return {
        "best_tokens": best,
        "loss_at_best": law.loss(parameters, best),
        "loss": None if tokens is None else law.loss(parameters, tokens),
    }
