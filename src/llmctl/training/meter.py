"""Speed and metrics: what metrics.jsonl, the progress line and the final result say."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from llmctl import hardware
from llmctl.console import log
from llmctl.metrics import is_result, line_name
from llmctl.numbers import byte_size, duration, short_number
from llmctl.training.run_state import RunState


class Meter:
    """Clocks and writes one training run, over all its resumptions."""

    def __init__(self, state: RunState) -> None:
        """Start the clock."""
        self.state = state
        self.text = ""
        self._mark = self._trained = time.perf_counter()
        self._since = time.perf_counter(), state.progress.tokens
        self._peak = hardware.peak_flops(state.device)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave evaluation and saving out of the speed."""
        begun = time.perf_counter()
        yield
        away = time.perf_counter() - begun
        self._trained += away
        self._since = self._since[0] + away, self._since[1]

    def keep_time(self) -> None:
        """Bring the progress's clocks up to now, for a checkpoint or a line."""
        now, done = time.perf_counter(), self.state.progress
        done.seconds += now - self._mark
        done.training_seconds += now - self._trained
        self._mark = self._trained = now

    def log(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Write a line of metrics, and renew the text of the progress line."""
        state, done = self.state, self.state.progress
        self.keep_time()
        speed = self._speed()
        facts: dict[str, Any] = {
            "step": done.step,
            "time": round(done.seconds, 3),
            "tokens": done.tokens,
            "loss": float(loss),
            "lr": state.lr,
            "grad_norm": float(grad_norm),
            "tokens_per_second": speed,
            "mfu": self._mfu(speed),
            "memory_bytes": hardware.memory_in_use(state.device),
            **state.metrics(),
        }
        if done.skipped_steps:
            facts["skipped_steps"] = done.skipped_steps
        done.last_log = facts
        state.run.log(facts)
        text = f"loss {float(loss):.3f}  lr {facts['lr']:.2g}  {short_number(speed)} tok/s"
        if facts["mfu"] is not None:
            text += f"  mfu {facts['mfu']:.1%}"
        if "val_loss" in done.last_eval:
            text += f"  val {done.last_eval['val_loss']:.3f}"
        memory = byte_size(facts["memory_bytes"])
        self.text = f"{text}  grad {float(grad_norm):.2g}  {memory}"

    def log_evaluation(self, metrics: dict[str, float]) -> bool:
        """Write the line of an evaluation; return whether it is the best so far."""
        state, done = self.state, self.state.progress
        improved = done.record_evaluation(metrics)
        elapsed = done.seconds + time.perf_counter() - self._mark
        facts = {"step": done.step, "time": round(elapsed, 3), "tokens": done.tokens}
        state.run.log({**facts, **metrics})
        if state.rank == 0:
            shown = "  ".join(
                f"{short_name} {value:.4g}"
                for name, value in metrics.items()
                if (short_name := line_name(name))
            )
            best = "  best" if improved else ""
            log.info("step %s  %s%s  %s", f"{done.step:,}", shown, best, duration(elapsed))
        return improved

    def final(self) -> dict[str, Any]:
        """Metrics of the whole run: the best evaluation, the last loss, the mean speed."""
        self.keep_time()
        done = self.state.progress
        speed = round(done.tokens / max(done.training_seconds, 1e-9), 1)
        means = {"tokens_per_second": speed, "mfu": self._mfu(speed)}
        last = {
            name: value
            for name, value in done.last_log.items()
            if is_result(name, self.state.run.stage) and name not in means
        }
        totals = {"step": done.step, "tokens": done.tokens}
        return {**last, **totals, **done.best_eval, "best_step": done.best_step, **means}

    def _speed(self) -> float:
        """Tokens per second since the last call."""
        now, tokens = time.perf_counter(), self.state.progress.tokens
        before, counted = self._since
        self._since = now, tokens
        return round((tokens - counted) / max(now - before, 1e-9), 1)

    def _mfu(self, speed: float) -> float | None:
        """Share of the peak FLOP/s of all devices that the model's own FLOPs make."""
        if self._peak is None or self.state.flops_per_token is None:
            return None
        return speed * self.state.flops_per_token / (self._peak * self.state.world)
