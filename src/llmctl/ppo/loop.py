"""The loop of PPO: sample, score, update; then what every training command does after a step.

In: a `PpoTrainer`. Out: trained models, checkpoints, metrics. `experience.py` makes the episodes of
a step, `update.py` learns from them, `win_rate.py` compares with the reference.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

import torch

from llmctl.config.sections import Checkpoints
from llmctl.console import ProgressBar
from llmctl.ppo.advantages import adapt_kl_coef
from llmctl.ppo.episodes import Episodes
from llmctl.ppo.experience import collect, sample, stopped, tell
from llmctl.ppo.rewards import Raw
from llmctl.ppo.rollout import Halted
from llmctl.ppo.self_checks import EXACT, check
from llmctl.ppo.trainer import PpoTrainer
from llmctl.ppo.update import update
from llmctl.ppo.win_rate import NUMBERS, Judge
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
"""Responses of the reference by whose scores those of training are normalised."""
Found = TypeVar("Found")
FINAL = ("score", "kl", "kl_coef", "entropy", "length", "eos_share", "clip_fraction", "episodes")
"""Metrics of the last step that the result shows; scores of each source too."""


def fit(trainer: PpoTrainer, judge: Judge) -> dict[str, Any]:
    """Train until the plan's last step and return the final metrics.

    Raises:
        DivergedError: a loss or a gradient is NaN or infinite; nothing was updated with it.
        DataError: a reward that fails.
        ModelError: a self-check before the first update failed.
        Interrupted, Terminated: a signal came; the run is saved.
    """
    state = trainer.state
    done, meter = state.progress, Meter(state)
    with (
        stop_flag() as flag,
        ProgressBar(state.title, trainer.hyperparameters.max_steps) as progress_bar,
    ):
        progress_bar.start_at(done.step)
        if not is_over(state):
            begin(trainer, judge, flag, meter)
        while not is_over(state):
            begun, rate = time.perf_counter(), trainer.hyperparameters.lr_at(done.step)
            set_lr(trainer.optimizers[:1], rate)
            set_lr(trainer.optimizers[1:], rate * trainer.ppo.value_lr / trainer.hyperparameters.lr)
            episodes = collect(trainer, flag)
            if episodes is None:
                leave(trainer, flag, meter)
            if done.step == 0:
                first_checks(trainer, episodes)
            verdict = update(trainer, episodes, flag)
            complete(trainer, time.perf_counter() - begun)
            finish_step(state, meter, verdict)
            progress_bar.update(done.step, _shown(trainer))
    last = done.last_log
    shown = {k: v for k, v in last.items() if k in FINAL or k.startswith("score/")}
    return {**meter.final(), **shown}


def resume(trainer: PpoTrainer, config: Checkpoints) -> None:
    """Put the trainer in the state of the checkpoint that the call asks for, if it asks for one."""
    size = checkpoint_bytes(trainer.actors, trainer.optimizers)
    content = find_checkpoint(trainer.state, config, size)
    if content is not None:
        restore(trainer.actors, trainer.optimizers, content)
        set_generators(content.rng)
        trainer.restore(content.state["ppo"])


def begin(trainer: PpoTrainer, judge: Judge, flag: StopFlag, meter: Meter) -> None:
    """Measure the reference's scores where nothing was measured yet; have it answer. Collective.

    Raises:
        DataError: a reward that fails.
        Interrupted, Terminated: a signal came.
    """
    if trainer.rewards.is_unmeasured:
        raw = attempt(trainer, flag, meter, lambda: reference_scores(trainer, flag))
        assert raw is not None  # leave does not return
        measure(trainer, raw)
    attempt(trainer, flag, meter, lambda: judge.begin(flag))


def attempt(
    trainer: PpoTrainer, flag: StopFlag, meter: Meter, work: Callable[[], Found]
) -> Found | None:
    """Do this rank's part of something that a signal may stop on any rank. Collective.

    Raises:
        DataError: a reward that fails, on any rank.
        Interrupted, Terminated: a signal came.
    """
    found: Found | None = None
    with together(trainer.state.accelerator), suppress(Halted):
        found = work()
    if stopped(trainer, flag):
        leave(trainer, flag, meter)
    return found


def reference_scores(trainer: PpoTrainer, flag: StopFlag) -> Raw:
    """Scores of this rank's share of the reference's responses.

    Raises:
        Halted: a signal came.
        DataError: a reward that fails.
    """
    asked, state = trainer.asked, trainer.state
    wanted = max(state.world, min(REFERENCE_EPISODES, 2 * len(asked)))
    mine = range(state.rank, wanted, state.world)
    prompts = [number % len(asked) for number in mine]
    noise = [2 * NUMBERS + number for number in mine]
    rollout = sample(trainer, asked, prompts, noise, flag, of_reference=True)
    return trainer.rewards.raw(tell(asked, prompts, rollout), rollout.ended)


def measure(trainer: PpoTrainer, raw: Raw) -> None:
    """Learn the scale of each reward model, and of the values that begin as one's. Collective."""
    trainer.rewards.measure(raw, trainer.total)
    if trainer.value_source is not None:
        scale, weight = trainer.value_source.scale, trainer.value_source.weight
        factor = weight / scale.deviation_used
        trainer.actors.scale = (factor, -factor * scale.mean)
        trainer.state.run.record(value_scale=trainer.actors.scale)


def first_checks(trainer: PpoTrainer, episodes: Episodes) -> None:
    """What a run shows of itself before it learns anything. Collective.

    Raises:
        ModelError: a check failed.
    """
    state, precision = trainer.state, trainer.hyperparameters.precision
    with together(state.accelerator):
        found = check(trainer.actors, episodes, set(trainer.sampler.eos), precision)
    worst = float(trainer.gathered([found.sampling]).max())
    trainer.exact = worst <= EXACT[precision]
    state.run.record(**found.facts, keeps_sampled_log_probs=trainer.exact)


def complete(trainer: PpoTrainer, seconds: float) -> None:
    """The rest of a step's metrics, its alarms, and the next step's penalty."""
    config, state, latest = trainer.config, trainer.state, trainer.latest
    episodes = latest.pop("step_episodes")
    latest.pop("response_tokens")
    latest["kl_coef"] = trainer.kl_coef
    latest["episodes"] = (state.progress.step + 1) * episodes
    latest["episodes_per_second"] = round(episodes / seconds, 3)
    if config.kl_target is not None:
        trainer.kl_coef = adapt_kl_coef(
            trainer.kl_coef, latest["kl"], config.kl_target, episodes, config.kl_horizon
        )
    latest["alarms"] = trainer.alarms.look(state.progress.step + 1, latest)


def leave(trainer: PpoTrainer, flag: StopFlag, meter: Meter) -> NoReturn:
    """Save the state of the last whole step, and end. Collective.

    Raises:
        Interrupted, Terminated: always.
    """
    state = trainer.state
    signal = stopped(trainer, flag)
    with torch.no_grad():
        save(state, meter)
    raise StopFlag.error(signal, state.progress.step)


def _shown(trainer: PpoTrainer) -> str:
    """The text of the progress line."""
    last = trainer.state.progress.last_log
    if not last:
        return ""
    text = f"score {last['score']:.3f}  kl {last['kl']:.2f}  entropy {last['entropy']:.2f}"
    text += f"  {last['length']:.0f} tokens  {last['episodes_per_second']:.1f} episodes/s"
    if "val_win_rate" in trainer.state.progress.last_eval:
        text += f"  wins {trainer.state.progress.last_eval['val_win_rate']:.0%}"
    return text
