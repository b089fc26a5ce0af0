"""Alarms: signs that a run goes wrong, each with a remedy.

In: the metrics of the last steps. Out: warnings. An alarm is raised once, and again after it has
been silent for a while.
"""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from llmctl.console import log

STEPS = 5
"""Steps in a row for which a sign must hold."""
SILENCE = 20
"""Steps after which an alarm is repeated."""

WATCHED = (
    *("kl", "length", "score", "score_std", "entropy", "eos_share"),
    *("explained_variance", "clip_fraction"),
)
"""Metrics that alarms read."""

Steps = list[Mapping[str, Any]]


def _all(steps: Steps, holds: Callable[[Mapping[str, Any]], bool]) -> bool:
    return len(steps) >= STEPS and all(holds(step) for step in steps[-STEPS:])


def negative_kl(steps: Steps) -> str | None:
    """KL below 0 for long: samples are not those of the policy that is scored."""
    if not _all(steps, lambda step: step["kl"] < -1.0):
        return None
    return (
        f"the KL is {steps[-1]['kl']:.2f} nats a response and has been below -1 for {STEPS} steps, "
        "which a KL cannot be: try --kl-estimator k3, a lower --lr, or a larger --batch-size"
    )


def exploding_kl(steps: Steps) -> str | None:
    """KL far above a small deviation."""
    if not _all(steps, lambda step: step["kl"] > 50.0):
        return None
    return (
        f"the KL is {steps[-1]['kl']:.0f} nats a response: the policy has left the reference; "
        "raise --kl-coef or set --kl-target, and lower --lr"
    )


def longer_and_better(steps: Steps) -> str | None:
    """Score and length of responses that rise together."""
    if len(steps) < 2 * STEPS:
        return None
    first, last = steps[:STEPS], steps[-STEPS:]
    earlier, now = (sum(step["length"] for step in part) / STEPS for part in (first, last))
    rise = sum(step["score"] for step in last) - sum(step["score"] for step in first)
    if rise <= 0 or now < 2 * earlier:
        return None
    return (
        f"the score rises while responses grew from {earlier:.0f} to {now:.0f} tokens: the reward "
        "may pay for length; look at samples.jsonl, add --reward-rule length:N or "
        "--missing-eos-penalty 1"
    )


def collapsed_entropy(steps: Steps) -> str | None:
    """Entropy that falls below a tenth of the first."""
    first = steps[0]["entropy"]
    if not _all(steps, lambda step: step["entropy"] < 0.1 * first):
        return None
    return (
        f"the entropy fell from {first:.2f} to {steps[-1]['entropy']:.2f} nats a token: the policy "
        "says one thing only; raise --kl-coef or --entropy-coef, lower --lr or --ppo-epochs"
    )


def falling_eos(steps: Steps) -> str | None:
    """Responses that end by themselves half as often as they did."""
    first = max(step["eos_share"] for step in steps)
    if first < 0.2 or not _all(steps, lambda step: step["eos_share"] < 0.5 * first):
        return None
    return (
        f"only {steps[-1]['eos_share']:.0%} of responses end by themselves, {first:.0%} did: set "
        "--missing-eos-penalty 1, or raise --max-new-tokens"
    )


def useless_values(steps: Steps) -> str | None:
    """Value model that predicts worse than a constant."""
    if not _all(steps, lambda step: step["explained_variance"] < 0):
        return None
    return (
        f"the value model explains {steps[-1]['explained_variance']:.2f} of the returns' variance, "
        "less than a constant would: raise --value-lr, or --value-init reward"
    )


def clipping(steps: Steps) -> str | None:
    """Updates so large that clipping stops much of them."""
    if not _all(steps, lambda step: step["clip_fraction"] > 0.4):
        return None
    return (
        f"{steps[-1]['clip_fraction']:.0%} of the tokens are clipped: the updates are too large; "
        "lower --lr or --ppo-epochs, or set --stop-kl 0.02"
    )


def flat_scores(steps: Steps) -> str | None:
    """Scores that are the same for every response."""
    if not _all(steps, lambda step: step["score_std"] == 0):
        return None
    return (
        f"every response has scored {steps[-1]['score']:g} for {STEPS} steps, so that there is "
        "nothing to learn from: is the rule ever met? raise --batch-size or choose another reward"
    )


ALARMS = (
    *(negative_kl, exploding_kl, longer_and_better, collapsed_entropy, falling_eos),
    *(useless_values, clipping, flat_scores),
)


class Alarms:
    """The alarms of one run."""

    def __init__(self) -> None:
        """Begin without a step."""
        self.steps: deque[Mapping[str, Any]] = deque(maxlen=10 * STEPS)
        self.last: dict[str, int] = {}
        """Step at which each alarm was last raised, by its name."""

    def check(self, step: int, metrics: Mapping[str, Any]) -> list[str]:
        """Add a step; log the alarms that it raises, and return their names."""
        self.steps.append({name: metrics[name] for name in WATCHED})
        raised = []
        for alarm in ALARMS:
            text = alarm(list(self.steps))
            name = alarm.__name__
            if text and step - self.last.get(name, -SILENCE) >= SILENCE:
                self.last[name] = step
                raised.append(name)
                log.warning("step %s: %s", f"{step:,}", text)
        return raised

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"steps": list(self.steps), "last": self.last}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave."""
        self.steps.extend(state["steps"])
        self.last = dict(state["last"])
