"""Speed and metrics: what metrics.jsonl, the progress line and the final result say."""

import time
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from llmctl import hardware
from llmctl.console import duration, log, short
from llmctl.training.trainer import Trainer


class Meter:
    """Clocks and writes one training run."""

    def __init__(self, trainer: Trainer) -> None:
        """Start the clock."""
        self.trainer = trainer
        self.started = self._mark = time.perf_counter()
        self._steps = self._all_steps = 0
        self._all_seconds = 0.0
        self._last: dict[str, Any] = {}
        self.text = ""
        self._peak = hardware.peak_flops(trainer.device)

    def count(self) -> None:
        """One more step is done."""
        self._steps += 1

    def paused(self) -> AbstractContextManager[None]:
        """Leave evaluation and saving out of the speed."""
        return _Paused(self)

    def log(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Write a line of metrics, and renew the text of the progress line."""
        trainer, done = self.trainer, self.trainer.progressed
        speed = self._speed()
        self._last = {
            "step": done.step,
            "time": round(time.perf_counter() - self.started, 3),
            "tokens": done.tokens,
            "loss": float(loss),
            "lr": trainer.plan.lr_at(done.step - 1),
            "grad_norm": float(grad_norm),
            "tokens_per_second": speed,
            "mfu": self._mfu(speed),
            "memory_bytes": hardware.memory_in_use(trainer.device),
        }
        trainer.run.log(self._last)
        text = f"loss {float(loss):.3f}  lr {self._last['lr']:.2g}  {short(speed)} tok/s"
        if self._last["mfu"] is not None:
            text += f"  mfu {self._last['mfu']:.1%}"
        if "val_loss" in done.last_eval:
            text += f"  val {done.last_eval['val_loss']:.3f}"
        memory = short(self._last["memory_bytes"])
        self.text = f"{text}  grad {float(grad_norm):.2g}  {memory}B"

    def log_evaluation(self, found: dict[str, float]) -> bool:
        """Write the line of an evaluation; return whether it is the best so far."""
        done = self.trainer.progressed
        done.last_eval = found
        improved = found["val_loss"] < done.best_loss
        if improved:
            done.best_step, done.best_loss, done.best_eval = done.step, found["val_loss"], found
            done.evals_since_best = 0
        else:
            done.evals_since_best += 1
        elapsed = round(time.perf_counter() - self.started, 3)
        self.trainer.run.log({"step": done.step, "time": elapsed, "tokens": done.tokens, **found})
        if self.trainer.rank == 0:
            log.info(
                "step %s  val_loss %.4f  perplexity %.4g  bits/byte %.4f%s  %s",
                f"{done.step:,}",
                found["val_loss"],
                found["val_perplexity"],
                found["val_bits_per_byte"],
                "  best" if improved else "",
                duration(elapsed),
            )
        return improved

    def final(self) -> dict[str, Any]:
        """Metrics of the whole run: the best evaluation, the last loss, the mean speed."""
        self._speed()
        done = self.trainer.progressed
        speed = self._rate(self._all_steps, self._all_seconds)
        keep = ("loss", "grad_norm", "memory_bytes")
        return {
            "step": done.step,
            "tokens": done.tokens,
            **{name: self._last[name] for name in keep if name in self._last},
            **done.best_eval,
            "best_step": done.best_step,
            "tokens_per_second": speed,
            "mfu": self._mfu(speed),
        }

    def _speed(self) -> float:
        """Tokens per second since the last call."""
        now = time.perf_counter()
        seconds, steps = now - self._mark, self._steps
        self._mark, self._steps = now, 0
        self._all_steps += steps
        self._all_seconds += seconds
        return self._rate(steps, seconds)

    def _rate(self, steps: int, seconds: float) -> float:
        return round(steps * self.trainer.plan.tokens_per_step / max(seconds, 1e-9), 1)

    def _mfu(self, speed: float) -> float | None:
        """Share of the peak FLOP/s of all devices that the model's own FLOPs make."""
        if self._peak is None:
            return None
        return speed * self.trainer.flops_per_token / (self._peak * self.trainer.world)


class _Paused:
    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._meter._mark += time.perf_counter() - self._since
