"""Alarms: signs that a run goes wrong, each with a remedy.

In: the metrics of the last steps. Out: warnings. An alarm is raised once, and again after it has
been silent for a while.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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

Step = Mapping[str, Any]
Steps = list[Step]


@dataclass(frozen=True)
class Lasting:
    """An alarm for a sign that holds for STEPS steps in a row."""

    holds: Callable[[Step, float], bool]
    """Given the metrics of a step, and `first`."""
    text: str
    """Formatted with the metrics of the last step, and `first`."""
    first: Callable[[Steps], float] = lambda steps: 0.0
    """Gives, from all steps, the value that the sign is measured against."""

    def __call__(self, steps: Steps) -> str | None:
        """Tell the sign and its remedy, where it holds."""
        first = self.first(steps)
        if len(steps) < STEPS or not all(self.holds(step, first) for step in steps[-STEPS:]):
            return None
        return self.text.format(first=first, **steps[-1])


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


ALARMS: dict[str, Callable[[Steps], str | None]] = {
    "negative_kl": Lasting(  # samples are not those of the policy that is scored
        lambda step, _: step["kl"] < -1.0,
        f"the KL is {{kl:.2f}} nats a response and has been below -1 for {STEPS} steps, which a KL "
        "cannot be: try --kl-estimator k3, a lower --lr, or a larger --batch-size",
    ),
    "exploding_kl": Lasting(
        lambda step, _: step["kl"] > 50.0,
        "the KL is {kl:.0f} nats a response: the policy has left the reference; raise --kl-coef or "
        "set --kl-target, and lower --lr",
    ),
    "longer_and_better": longer_and_better,
    "collapsed_entropy": Lasting(
        lambda step, first: step["entropy"] < 0.1 * first,
        "the entropy fell from {first:.2f} to {entropy:.2f} nats a token: the policy says one "
        "thing only; raise --kl-coef or --entropy-coef, lower --lr or --ppo-epochs",
        first=lambda steps: steps[0]["entropy"],
    ),
    "falling_eos": Lasting(
        lambda step, first: first >= 0.2 and step["eos_share"] < 0.5 * first,
        "only {eos_share:.0%} of responses end by themselves, {first:.0%} did: set "
        "--missing-eos-penalty 1, or raise --max-new-tokens",
        first=lambda steps: max(step["eos_share"] for step in steps),
    ),
    "useless_values": Lasting(
        lambda step, _: step["explained_variance"] < 0,
        "the value model explains {explained_variance:.2f} of the returns' variance, less than a "
        "constant would: raise --value-lr, or --value-init reward",
    ),
    "clipping": Lasting(
        lambda step, _: step["clip_fraction"] > 0.4,
        "{clip_fraction:.0%} of the tokens are clipped: the updates are too large; lower --lr or "
        "--ppo-epochs, or set --stop-kl 0.02",
    ),
    "flat_scores": Lasting(
        lambda step, _: step["score_std"] == 0,
        f"every response has scored {{score:g}} for {STEPS} steps, so that there is nothing to "
        "learn from: is the rule ever met? raise --batch-size or choose another reward",
    ),
}


class Alarms:
    """The alarms of one run."""

    def __init__(self) -> None:
        """Begin without a step."""
        self.steps: deque[Step] = deque(maxlen=10 * STEPS)
        self.last: dict[str, int] = {}
        """Step at which each alarm was last raised, by its name."""

    def check(self, step: int, metrics: Mapping[str, Any]) -> list[str]:
        """Add a step; log the alarms that it raises, and return their names."""
        self.steps.append({name: metrics[name] for name in WATCHED})
        raised = []
        for name, alarm in ALARMS.items():
            text = alarm(list(self.steps))
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
