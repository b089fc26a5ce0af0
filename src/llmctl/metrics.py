"""The one table of metrics: what each is, its unit, which direction is better, where it is shown.

Log lines, results, cards, reports, gates and docs/metrics.md all read it. To add a metric, write it
to metrics.jsonl or to a result, and add a row here.
"""

from dataclasses import dataclass
from typing import Literal

Commands = tuple[str, ...]
TRAINING: Commands = ("pretrain", "sft", "reward", "dpo", "ppo")
PPO: Commands = ("ppo",)
DPO: Commands = ("dpo",)
REWARD: Commands = ("reward",)
QUANTIZE: Commands = ("quantize",)
EVALUATE: Commands = ("evaluate",)
TOKENIZE: Commands = ("tokenize",)
AUDIT: Commands = ("audit",)
RANK: Commands = ("rank",)
SPEED = "tokens_per_second_"
"""Followed by the type of the weights, in the results of quantize."""


@dataclass(frozen=True)
class Metric:
    """One metric, or a family of them."""

    name: str
    """As in metrics.jsonl and results; `*` stands for any name, `.` for an object within."""
    unit: str
    """`share` and `change` are shown in percent, `count` as an integer."""
    better: Literal["higher", "lower", ""]
    """Direction; empty where neither is better."""
    meaning: str
    label: str = ""
    """Heading, where it is not the name in words."""
    logged: Commands = ()
    """Commands that write it to metrics.jsonl."""
    result: Commands = ()
    """Commands whose result has it: cards and tables show it there, and gates may use it."""
    key: Commands = ()
    """Commands whose report shows it among the key figures, in the order of the table."""
    curve: Literal["first", "folded", "none"] = "folded"
    """Whether a report's diagram of it is in sight; diagrams are in the order of the table."""
    line: str | None = ""
    """Name in the log line of an evaluation, where it is another; None where it is left out."""


# fmt: off
METRICS = (
    # PPO: training
    Metric("score", "", "higher", "weighted sum of the rewards after normalisation, a mean over episodes",
           logged=PPO, result=PPO, curve="first"),
)
# fmt: on
