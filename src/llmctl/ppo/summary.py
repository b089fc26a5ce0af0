"""What a run of PPO says at its end: how often the policy wins, at what KL, what it now writes."""

from typing import Any

from llmctl.claim import SAMPLES, as_object
from llmctl.console import log
from llmctl.training.run_state import RunState

WIDTH = 72
"""Characters of a text that are shown."""


def log_summary(state: RunState) -> None:
    """Say what the kept model, that of the best step, does on the held-out prompts."""
    found = state.progress.best_eval
    if state.rank != 0 or not found:
        return
    log.info("on %d held-out prompts, step %s:", found["val_prompts"], state.progress.best_step)
    low, high = found["val_win_rate_low"], found["val_win_rate_high"]
    rows = [
        ("wins against the reference", found["val_win_rate"], f"({low:.3f} to {high:.3f}, 95 %)"),
        ("score", found["val_score"], _beside(found)),
        ("KL from the reference", found["val_kl"], "nats a response"),
        ("ended by themselves", found["val_eos_share"], f"{found['val_length']:.0f} tokens"),
    ]
    for name, value, more in rows:
        log.info("  %-28s %8.3f  %s", name, value, more)
    for row in _samples(state):
        log.info("  prompt: %s", _short(row["prompt"]))
        log.info("    before %6.2f: %s", row["score_before"], _short(row["before"]))
        log.info("    now    %6.2f: %s", row["score"], _short(row["now"]))


def _beside(found: dict[str, float]) -> str:
    mean, deviation = found["val_reference_score"], found["val_reference_std"]
    return f"the reference's is {mean:.3f} ± {deviation:.3f}"


def _samples(state: RunState) -> list[dict[str, Any]]:
    """Rows of the kept step."""
    file = state.run.path / SAMPLES
    lines = file.read_bytes().splitlines() if file.exists() else []
    rows = [dict(as_object(line)) for line in lines]
    return [row for row in rows if row.get("step") == state.progress.best_step]


def _short(text: str) -> str:
    """A text on one line, and not too long."""
    flat = " ".join(text.split())
    return flat if len(flat) <= WIDTH else flat[: WIDTH - 1] + "…"
