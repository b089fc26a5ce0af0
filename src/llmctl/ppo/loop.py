"""The loop of PPO: collect experience, update; then what every training command does after a step.

In: a `PpoTrainer`. Out: trained models, checkpoints, metrics. `experience.py` samples and scores,
`update.py` learns from it, `win_rate.py` compares with the reference.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

import torch

from llmctl.config.sections import Checkpoints
from llmctl.console import ProgressBar
from llmctl.ppo.advantages import adapt_kl_coef
from llmctl.ppo.episodes import Experience
from llmctl.ppo.experience import collect_experience, received_signal, sample_responses
from llmctl.ppo.rewards import RawScores
from llmctl.ppo.rollout import RolloutInterrupted
from llmctl.ppo.self_checks import EXACT, run_self_checks
from llmctl.ppo.trainer import PpoTrainer
from llmctl.ppo.update import update_models
from llmctl.ppo.win_rate import HELD_OUT_STREAMS, WinRate
from llmctl.signals import StopFlag, stop_flag
from llmctl.training.fault_tolerance import (
    find_checkpoint,
    finish_step,
    is_over,
    save,
    together,
)
from llmctl.training.meter import Meter
from llmctl.training.optimizers import set_lr
from llmctl.training.state import checkpoint_bytes, restore, set_generators

REFERENCE_EPISODES = 128
"""Most responses of the reference whose scores normalize those of training."""
Result = TypeVar("Result")


def fit(trainer: PpoTrainer, win_rate: WinRate) -> dict[str, Any]:
    """Train until the last step and return the final metrics.

    Raises:
        DivergedError: a loss or a gradient is NaN or infinite; nothing was updated with it.
        DataError: a reward that fails.
        ModelError: a self-check before the first update failed.
        Interrupted, Terminated: a signal came; the run is saved.
    """
    state, values = trainer.state, trainer.state.values
    progress, meter = state.progress, Meter(state)
    with stop_flag() as flag, ProgressBar(state.run.stage, values.max_steps) as progress_bar:
        progress_bar.start_at(progress.step)
        if not is_over(state):
            prepare_reference(trainer, win_rate, flag, meter)
        while not is_over(state):
            started, lr = time.perf_counter(), values.lr_at(progress.step)
            set_lr(trainer.optimizers[:1], lr)
            set_lr(trainer.optimizers[1:], lr * trainer.ppo.value_lr / values.lr)
            experience = collect_experience(trainer, flag)
            if experience is None:
                save_and_exit(trainer, flag, meter)
            if progress.step == 0:
                check_first_step(trainer, experience)
            outcome = update_models(trainer, experience, flag)
            complete_metrics(trainer, time.perf_counter() - started)
            finish_step(state, meter, outcome)
            progress_bar.update(progress.step, _progress_text(trainer))
    return meter.final()


def resume(trainer: PpoTrainer, config: Checkpoints) -> None:
    """Restore the checkpoint that the call asks for, if it asks for one."""
    size = checkpoint_bytes(trainer.actor_critic, trainer.optimizers)
    content = find_checkpoint(trainer.state, config, size)
    if content is not None:
        restore(trainer.actor_critic, trainer.optimizers, content)
        set_generators(content.rng)
        trainer.restore(content.state["ppo"])


def prepare_reference(trainer: PpoTrainer, win_rate: WinRate, flag: StopFlag, meter: Meter) -> None:
    """Measure the reference's scores once, and sample its held-out responses. Collective.

    Raises:
        DataError: a reward that fails.
        Interrupted, Terminated: a signal came.
    """
    if trainer.rewards.is_unmeasured:
        raw = run_or_exit(trainer, flag, meter, lambda: reference_scores(trainer, flag))
        assert raw is not None  # a signal does not return
        set_scales(trainer, raw)
    run_or_exit(trainer, flag, meter, lambda: win_rate.sample_reference(flag))


def run_or_exit(
    trainer: PpoTrainer, flag: StopFlag, meter: Meter, work: Callable[[], Result]
) -> Result | None:
    """Do this rank's part of work that a signal may stop on any rank. Collective.

    Raises:
        DataError: a reward that fails, on any rank.
        Interrupted, Terminated: a signal came.
    """
    result: Result | None = None
    with together(trainer.state.accelerator), suppress(RolloutInterrupted):
        result = work()
    if received_signal(trainer, flag):
        save_and_exit(trainer, flag, meter)
    return result


def reference_scores(trainer: PpoTrainer, flag: StopFlag) -> RawScores:
    """Score this rank's share of the reference's responses to prompts of training.

    Raises:
        RolloutInterrupted: a signal came.
        DataError: a reward that fails.
    """
    prompts, state = trainer.prompts, trainer.state
    count = max(state.world, min(REFERENCE_EPISODES, 2 * len(prompts)))
    episodes = range(state.rank, count, state.world)
    indices = [episode % len(prompts) for episode in episodes]
    stream_ids = [2 * HELD_OUT_STREAMS + episode for episode in episodes]
    scored = sample_responses(trainer, prompts, indices, stream_ids, flag, from_reference=True)
    return scored.raw


def set_scales(trainer: PpoTrainer, raw: RawScores) -> None:
    """Set the moments of each reward model, and the value scale. Collective.

    A value head that started as a reward model's gives scores r; V is weight (r - mean) / std.
    """
    trainer.rewards.measure(raw, trainer.all_reduce)
    if trainer.value_source is not None:
        moments, weight = trainer.value_source.moments, trainer.value_source.weight
        scale = weight / moments.divisor
        trainer.actor_critic.value_scale = (scale, -scale * moments.mean)
        trainer.state.run.record(value_scale=trainer.actor_critic.value_scale)


def check_first_step(trainer: PpoTrainer, experience: Experience) -> None:
    """Run the self-checks and record them; raise a ModelError if one fails. Collective."""
    state, precision = trainer.state, trainer.state.values.precision
    eos = set(trainer.sampler.eos)
    with together(state.accelerator):
        checks = run_self_checks(trainer.actor_critic, experience, eos, precision)
    worst = float(trainer.all_gather([checks.sampling]).max())
    trainer.reuses_log_probs = worst <= EXACT[precision]
    state.run.record(**checks.as_json(), keeps_sampled_log_probs=trainer.reuses_log_probs)


def complete_metrics(trainer: PpoTrainer, seconds: float) -> None:
    """Add the rest of a step's metrics and its alarms; adapt the penalty of the next step."""
    config, state, metrics = trainer.config, trainer.state, trainer.metrics
    episodes = metrics.pop("step_episodes")
    metrics.pop("response_tokens")
    metrics["kl_coef"] = trainer.kl_coef
    metrics["episodes"] = (state.progress.step + 1) * episodes
    metrics["episodes_per_second"] = round(episodes / seconds, 3)
    if config.kl_target is not None:
        trainer.kl_coef = adapt_kl_coef(
            trainer.kl_coef, metrics["kl"], config.kl_target, episodes, config.kl_horizon
        )
    metrics["alarms"] = trainer.alarms.check(state.progress.step + 1, metrics)


def save_and_exit(trainer: PpoTrainer, flag: StopFlag, meter: Meter) -> NoReturn:
    """Save the state of the last whole step, unless it is saved, and end the run. Collective.

    A checkpoint that is written again is gone for an instant.

    Raises:
        Interrupted, Terminated: always.
    """
    state = trainer.state
    signal = received_signal(trainer, flag)
    if state.saved != state.progress.step:
        with torch.no_grad():
            save(state, meter)
    raise StopFlag.error(signal, state.progress.step)


def _progress_text(trainer: PpoTrainer) -> str:
    last = trainer.state.progress.last_log
    if not last:
        return ""
    text = f"score {last['score']:.3f}  kl {last['kl']:.2f}  entropy {last['entropy']:.2f}"
    text += f"  {last['length']:.0f} tokens  {last['episodes_per_second']:.1f} episodes/s"
    if "val_win_rate" in trainer.state.progress.last_eval:
        text += f"  wins {trainer.state.progress.last_eval['val_win_rate']:.0%}"
    return text
