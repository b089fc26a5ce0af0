"""Write the results of a PPO run: the policy, the value model beside it, and a summary in the log.

The policy is a plain model or adapter. The summary tells its win rate, at what KL, and some of its
responses.
"""

from typing import Any

from llmctl.config.commands.ppo import PpoConfig
from llmctl.console import log
from llmctl.files import writing
from llmctl.models.adapters import save_adapter
from llmctl.models.loading import save_model, write_folder
from llmctl.numbers import counted
from llmctl.ppo.setup import PreparedPpo
from llmctl.ppo.trainer import PpoTrainer
from llmctl.runs.ownership import SAMPLES, parse_object
from llmctl.training.export import put_best, write_adapter
from llmctl.training.fault_tolerance import together
from llmctl.training.run_state import RunState

WIDTH = 72
"""Most characters of a text that the summary shows."""


def export(config: PpoConfig, trainer: PpoTrainer, prepared: PreparedPpo) -> dict[str, Any]:
    """Write the weights that did best on the held-out prompts, the last where there are none.

    Raises:
        ModelError: an adapter and its merged model do not agree.
        ResourceError: the disk is full.
    """
    state, run, tokenizer = trainer.state, trainer.state.run, prepared.tokenizer
    put_best(state, trainer.actor_critic)
    with together(state.accelerator), writing(run.path):
        if state.rank != 0:
            return {}
        policy, value_model = trainer.actor_critic.policy, prepared.models.value_model
        if not config.has_adapter:
            weights = value_model.state_dict()
            write_folder(value_model, weights, tokenizer, run.path / "value_model")
            save_model(policy, policy.state_dict(), tokenizer, run.path / "model")
            return {"model": str(run.path / "model")}
        save_adapter(
            value_model,
            tokenizer,
            run.path / "value_model",
            base=prepared.base.reference,
            base_sha256=prepared.base.sha256,
            generation_config=None,
        )
        value_model.config.save_pretrained(run.path / "value_model")
        return write_adapter(policy, None, tokenizer, state, prepared.base, merges=config.merge)


def log_summary(state: RunState) -> None:
    """Log how the kept model, that of the best step, does on the held-out prompts."""
    metrics = state.progress.best_eval
    if state.rank != 0 or not metrics:
        return
    prompts = counted(int(metrics["val_prompts"]), "held-out prompt")
    log.info("on %s, step %s:", prompts, state.progress.best_step)
    low, high = metrics["val_win_rate_low"], metrics["val_win_rate_high"]
    mean, std = metrics["val_reference_score"], metrics["val_reference_std"]
    rows = [
        ("wins against the reference", "val_win_rate", f"({low:.3f} to {high:.3f}, 95 %)"),
        ("score", "val_score", f"the reference's is {mean:.3f} ± {std:.3f}"),
        ("KL from the reference", "val_kl", "nats a response"),
        ("ended by themselves", "val_eos_share", f"{metrics['val_length']:.0f} tokens"),
    ]
    for label, name, note in rows:
        log.info("  %-28s %8.3f  %s", label, metrics[name], note)
    for sample in _best_samples(state):
        log.info("  prompt: %s", _shorten(sample["prompt"]))
        log.info("    before %6.2f: %s", sample["score_before"], _shorten(sample["before"]))
        log.info("    now    %6.2f: %s", sample["score"], _shorten(sample["now"]))


def _best_samples(state: RunState) -> list[dict[str, Any]]:
    """Rows of samples.jsonl of the kept step."""
    file = state.run.path / SAMPLES
    lines = file.read_bytes().splitlines() if file.exists() else []
    rows = [dict(parse_object(line)) for line in lines]
    return [row for row in rows if row.get("step") == state.progress.best_step]


def _shorten(text: str) -> str:
    """Put a text on one line of at most WIDTH characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= WIDTH else flat[: WIDTH - 1] + "…"
