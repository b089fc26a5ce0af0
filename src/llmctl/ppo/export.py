"""Write what a PPO run leaves: the policy, the value model beside it, and a summary.

The policy is a plain model or adapter. The summary says how often it wins, at what KL, and what it
now writes.
"""

from typing import Any

from llmctl.config.commands import PpoConfig
from llmctl.console import log
from llmctl.files import writing
from llmctl.models.adapters import save_adapter
from llmctl.models.loading import save_model, write_folder
from llmctl.ppo.setup import Setup
from llmctl.ppo.trainer import PpoTrainer
from llmctl.runs.ownership import SAMPLES, parse_object
from llmctl.training.export import put_best, write_adapter
from llmctl.training.fault_tolerance import together
from llmctl.training.run_state import RunState

WIDTH = 72
"""Characters of a text that are shown."""


def export(config: PpoConfig, trainer: PpoTrainer, setup: Setup) -> dict[str, Any]:
    """Write the weights that did best on the held-out prompts, the last where there are none.

    Raises:
        ModelError: an adapter and its merged model do not agree.
        ResourceError: the disk is full.
    """
    state, run = trainer.state, trainer.state.run
    put_best(state, trainer.actors)
    with together(state.accelerator), writing(run.path):
        if state.rank != 0:
            return {}
        policy, value_model = trainer.actors.policy, setup.models.value_model
        if not config.has_adapter:
            write_folder(
                value_model, value_model.state_dict(), setup.tokenizer, run.path / "value_model"
            )
            save_model(policy, policy.state_dict(), setup.tokenizer, run.path / "model")
            return {"model": str(run.path / "model")}
        save_adapter(
            value_model,
            setup.tokenizer,
            run.path / "value_model",
            base=setup.base.reference,
            base_sha256=setup.base.sha256,
            generation_config=None,
        )
        value_model.config.save_pretrained(run.path / "value_model")
        return write_adapter(policy, None, setup.tokenizer, state, setup.base, merges=config.merge)


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
    rows = [dict(parse_object(line)) for line in lines]
    return [row for row in rows if row.get("step") == state.progress.best_step]


def _short(text: str) -> str:
    """A text on one line, and not too long."""
    flat = " ".join(text.split())
    return flat if len(flat) <= WIDTH else flat[: WIDTH - 1] + "…"
