"""The one table of metrics: what each is, its unit, which direction is better, where it is shown.

Log lines, results, cards, reports, gates and docs/metrics.md all read it. To add a metric, write it
to metrics.jsonl or to a result, and add a row.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, Literal

from llmctl.numbers import MISSING, NARROW, compact, energy, is_number, scaled, seconds

Commands = tuple[str, ...]
TRAINING: Commands = ("pretrain", "sft", "reward", "dpo", "ppo")
PRETRAIN: Commands = ("pretrain",)
SFT: Commands = ("sft",)
REWARD: Commands = ("reward",)
DPO: Commands = ("dpo",)
PPO: Commands = ("ppo",)
TOKENIZE: Commands = ("tokenize",)
MERGE: Commands = ("merge",)
QUANTIZE: Commands = ("quantize",)
EVALUATE: Commands = ("evaluate",)
GENERATE: Commands = ("generate",)
RANK: Commands = ("rank",)
DATA: Commands = ("audit",)
"""Also in the manifest of runs that audit their data."""
SPEED = "tokens_per_second_"
"""Followed by the type of the weights, in the results of quantize."""


@dataclass(frozen=True)
class Metric:
    """One metric, or a family of them."""

    name: str
    """As in metrics.jsonl and results; `*` stands for any name, `outer.inner` is nested."""
    unit: str
    """`share` and `change` are shown in percent, `count` as an integer; `names` is a list."""
    better: Literal["higher", "lower", ""]
    meaning: str
    label: str = ""
    """Heading, where it is not the name in words."""
    logged: Commands = ()
    """Commands that write it to metrics.jsonl."""
    result: Commands = ()
    """Commands whose result has it: cards and tables show it, gates may use it."""
    key: Commands = ()
    """Commands whose report has it among the key figures, which are in the table's order."""
    curve: Literal["first", "folded", "none"] = "folded"
    """Whether its diagram is in sight; diagrams are in the table's order."""
    line: str | None = ""
    """Name in the log line of an evaluation, where it is shorter; None where it is left out."""


# fmt: off
METRICS: tuple[Metric, ...] = (
    # PPO
    Metric("score", "", "higher", "weighted sum of an episode's rewards, after normalisation",
           logged=PPO, result=PPO, curve="first"),
    Metric("score/*", "", "higher", "one reward, before its weight and normalisation",
           logged=PPO, result=PPO, curve="first"),
    Metric("kl", "nats", "lower", "of a response from the reference; of a token by quantization",
           "KL divergence", logged=PPO, result=PPO + QUANTIZE, curve="first"),
    Metric("val_win_rate", "share", "higher", "held-out prompts where it outscores the reference",
           "Wins against the reference", logged=PPO, result=PPO, key=PPO, curve="first"),
    Metric("val_win_rate_low", "share", "", "lower end of its 95 % interval",
           logged=PPO, result=PPO, curve="none", line=None),
    Metric("val_win_rate_high", "share", "", "upper end of its 95 % interval",
           logged=PPO, result=PPO, curve="none", line=None),
    Metric("win_rate", "share", "higher", "prompts on which it outscores the model of --compare",
           result=EVALUATE),
    Metric("win_rate_low", "share", "", "lower end of its 95 % interval", result=EVALUATE),
    Metric("win_rate_high", "share", "", "upper end of its 95 % interval", result=EVALUATE),
    Metric("val_score", "", "higher", "score of responses to held-out prompts",
           logged=PPO, result=PPO, key=PPO, curve="first"),
    Metric("val_score/*", "", "higher", "one reward of them",
           logged=PPO, result=PPO, curve="first"),
    Metric("val_reference_score", "", "", "score of the reference on held-out prompts",
           "Score of the reference", logged=PPO, result=PPO, key=PPO, line=None),
    Metric("val_reference_std", "", "", "its standard deviation",
           logged=PPO, result=PPO, curve="none", line=None),
    Metric("val_kl", "nats", "lower", "KL from the reference on held-out prompts",
           "KL from the reference, held out", logged=PPO, result=PPO, key=PPO, curve="first"),
    Metric("val_length", "tokens", "", "tokens of a response to a held-out prompt",
           "Length, held out", logged=PPO, result=PPO, key=PPO, curve="first"),
    Metric("val_eos_share", "share", "", "responses to held-out prompts that ended by themselves",
           "Ended by themselves, held out", logged=PPO, result=PPO, curve="first"),
    Metric("val_prompts", "count", "", "held-out prompts",
           logged=PPO, result=PPO, curve="none", line=None),

    # loss and accuracy
    Metric("loss", "nats", "lower", "mean over trained tokens, pairs or texts since the last line",
           logged=TRAINING, result=TRAINING + EVALUATE, curve="first"),
    Metric("exact", "share", "higher", "responses that are the reference",
           "Exact matches", result=EVALUATE, key=EVALUATE),
    Metric("accuracy", "share", "higher", "texts labelled, or pairs ordered, as they should be",
           logged=SFT + REWARD, result=EVALUATE, key=EVALUATE, curve="first"),
    Metric("f1", "share", "higher", "F1, a mean over labels", "F1", result=EVALUATE, key=EVALUATE),
    Metric("perplexity", "", "lower", "exp(loss)", result=EVALUATE, key=EVALUATE),
    Metric("bits_per_byte", "bits", "lower", "loss by byte of text, whatever the tokenizer",
           "Bits per byte", result=EVALUATE, key=EVALUATE),
    Metric("rouge1", "", "higher", "ROUGE of single words", result=EVALUATE, key=EVALUATE),
    Metric("rouge2", "", "higher", "ROUGE of pairs of words", result=EVALUATE),
    Metric("rougeL", "", "higher", "ROUGE of the longest common run", result=EVALUATE),
    Metric("bleu", "", "higher", "of all responses, 0 to 100", "BLEU",
           result=EVALUATE, key=EVALUATE),
    Metric("chrf", "", "higher", "of all responses, 0 to 100", "chrF", result=EVALUATE),
    Metric("wer", "share", "lower", "word errors by words of the references",
           "Word error rate", result=EVALUATE, key=EVALUATE),
    Metric("reward", "", "higher", "score by the reward model", result=EVALUATE),
    Metric("cut_share", "share", "lower", "responses that reached the most tokens",
           "Cut at the most tokens", result=EVALUATE),
    Metric("ambiguous_share", "share", "lower", "responses that name several labels, and so none",
           "Several labels in one response", result=EVALUATE),
    Metric("comparison.*", "count", "", "answers compared as numbers, or as text", result=EVALUATE),
    Metric("val_accuracy", "share", "higher", "`accuracy` on validation data",
           logged=SFT + REWARD, result=SFT + REWARD, key=SFT + REWARD, curve="first"),
    Metric("val_reward_accuracy", "share", "higher", "`reward_accuracy` on validation pairs",
           logged=DPO, result=DPO, key=DPO, curve="first"),
    Metric("val_macro_f1", "share", "higher", "F1 on validation texts, a mean over labels",
           logged=SFT, result=SFT),
    Metric("val_longer_wins", "share", "", "validation pairs whose chosen response is the longer",
           "The longer response wins", result=REWARD, key=REWARD),
    Metric("val_calibration_error", "", "lower", "mean gap of confidence and accuracy",
           "Calibration error", result=REWARD, key=REWARD),
    Metric("val_coin_interval", "share", "", "accuracies that a coin may reach", result=REWARD),
    Metric("val_loss", "nats", "lower", "loss on validation data; of PPO the objective, negated",
           "Validation loss", logged=TRAINING, result=TRAINING,
           key=PRETRAIN + SFT + REWARD + DPO, curve="first"),
    Metric("val_bits_per_byte", "bits", "lower", "`bits_per_byte` on validation data",
           "Bits per byte", logged=PRETRAIN, result=PRETRAIN, key=PRETRAIN, curve="first",
           line="bits/byte"),
    Metric("val_perplexity", "", "lower", "exp(val_loss)", "Perplexity",
           logged=PRETRAIN, result=PRETRAIN, key=PRETRAIN, curve="none", line="perplexity"),
    Metric("token_accuracy", "share", "higher", "trained tokens that are the most likely ones",
           logged=SFT, curve="first"),
    Metric("val_token_accuracy", "share", "higher", "`token_accuracy` on validation data",
           logged=SFT, result=SFT, key=SFT, curve="first"),
    Metric("val_margin", "", "higher", "score of chosen less that of rejected responses",
           logged=REWARD, result=REWARD, key=REWARD, curve="first"),
    Metric("reward_accuracy", "share", "higher", "pairs whose chosen response has more reward",
           logged=DPO, curve="first"),
    Metric("reward_margin", "", "higher", "implicit reward of chosen less that of rejected",
           logged=DPO, curve="first"),
    Metric("val_reward_margin", "", "higher", "`reward_margin` on validation pairs",
           logged=DPO, result=DPO, key=DPO, curve="first"),
    Metric("chosen_logprob", "nats", "higher", "log-probability of chosen responses", logged=DPO),
    Metric("val_chosen_logprob", "nats", "higher", "the same on validation pairs",
           logged=DPO, result=DPO),
    Metric("rejected_logprob", "nats", "", "log-probability of rejected responses", logged=DPO),
    Metric("val_rejected_logprob", "nats", "", "the same on validation pairs",
           logged=DPO, result=DPO),
    Metric("chosen_gain", "nats", "higher", "gain of a chosen token on the reference",
           logged=DPO),
    Metric("val_chosen_gain", "nats", "higher", "the same on validation pairs",
           logged=DPO, result=DPO),
    Metric("val_score_mean", "", "", "mean score on validation pairs", result=REWARD),
    Metric("val_score_std", "", "", "its standard deviation", result=REWARD, line=None),
    Metric("val_chosen.*", "", "", "distribution of the scores of chosen responses", result=REWARD),
    Metric("val_rejected.*", "", "", "distribution of those of rejected responses", result=REWARD),
    Metric("val_length_correlation", "", "", "rank correlation of score and length",
           result=REWARD),

    # a step of PPO
    Metric("entropy", "nats", "", "of a sampled token", logged=PPO, result=PPO, curve="first"),
    Metric("length", "tokens", "", "tokens of a response", "Length of responses",
           logged=PPO, result=PPO, curve="first"),
    Metric("eos_share", "share", "", "responses that ended by themselves", "Ended by themselves",
           logged=PPO, result=PPO, curve="first"),
    Metric("clip_fraction", "share", "lower", "tokens at which the clipped policy loss counts",
           "Clipped tokens", logged=PPO, result=PPO, curve="first"),
    Metric("explained_variance", "", "higher", "of the returns by the values; 1 is perfect",
           logged=PPO, curve="first"),

    # every step
    Metric("lr", "", "", "learning rate", "Learning rate", logged=TRAINING),
    Metric("grad_norm", "", "", "norm of the gradient before clipping", "Gradient norm",
           logged=TRAINING, result=TRAINING),
    Metric("tokens_per_second", "tokens/s", "higher", "of all processes; evaluation is left out",
           "Tokens a second", logged=TRAINING + TOKENIZE, result=TRAINING + TOKENIZE),
    Metric("episodes_per_second", "episodes/s", "higher", "of all processes", "Episodes a second",
           logged=PPO),
    Metric("policy_loss", "", "", "clipped surrogate, negated: mean over tokens of all updates",
           logged=PPO),
    Metric("value_loss", "", "lower", "half the squared error of the values, likewise", logged=PPO),
    Metric("score_std", "", "", "standard deviation of `score` over a step's episodes", logged=PPO),
    Metric("kl_coef", "", "", "penalty of the step", "KL coefficient", logged=PPO, result=PPO),
    Metric("policy_kl", "nats", "lower", "of a token, from the sampling policy to the learning one",
           logged=PPO),
    Metric("value_clip_fraction", "share", "lower", "tokens at which the clipped value loss counts",
           logged=PPO),
    Metric("rollout_seconds", "seconds", "lower", "sampling and scoring of a step", logged=PPO),
    Metric("update_seconds", "seconds", "lower", "updates of a step", logged=PPO),
    Metric("updates", "count", "", "optimizer steps in a step of PPO", logged=PPO, curve="none"),
    Metric("episodes", "count", "", "episodes so far", logged=PPO, result=PPO, curve="none"),
    Metric("alarms", "names", "", "signs of a run that goes wrong", logged=PPO),
    Metric("mfu", "share", "higher", "FLOP/s of the model by the devices' peak",
           "Model FLOPs utilisation", logged=TRAINING, result=TRAINING),
    Metric("memory_bytes", "bytes", "lower", "in use by the process, or on its device",
           "Memory in use", logged=TRAINING, result=TRAINING),
    Metric("skipped_steps", "count", "lower", "steps that were not finite and not taken",
           logged=TRAINING, result=TRAINING, curve="none"),
    Metric("step", "count", "", "optimizer steps so far", "Steps",
           logged=TRAINING, result=TRAINING, curve="none"),
    Metric("best_step", "count", "", "step whose weights are kept", "Best step", result=TRAINING),
    Metric("time", "seconds", "", "training so far, over all resumptions",
           logged=TRAINING, curve="none"),
    Metric("seconds", "seconds", "lower", "`energy` of the manifest: how long the run took"),
    Metric("kwh", "kWh", "lower", "`energy` of the manifest: that of the processors", "Energy"),
    Metric("parameters", "count", "", "of the whole model", result=TRAINING, key=PRETRAIN),
    Metric("trained_parameters", "count", "", "those that are trained", "Trained parameters",
           result=SFT + REWARD + DPO + PPO, key=SFT + DPO),
    Metric("merge_difference", "", "lower", "largest difference of a logit by merging the adapter",
           result=SFT + REWARD + DPO + PPO),
    Metric("difference", "", "lower", "the same", result=MERGE),
    Metric("quantized_difference", "", "lower", "the same, from the adapter on the quantized base",
           result=MERGE),

    # tokens and documents
    Metric("tokens", "count", "", "seen in training, read, or written",
           logged=TRAINING + TOKENIZE, result=TRAINING + TOKENIZE + EVALUATE + GENERATE + DATA,
           key=PRETRAIN + SFT + DPO + TOKENIZE, curve="none"),
    Metric("vocab_size", "count", "", "entries of the vocabulary", "Vocabulary",
           logged=TOKENIZE, result=TOKENIZE, key=TOKENIZE),
    Metric("bytes_per_token", "", "higher", "text by tokens", "Bytes a token",
           logged=TOKENIZE, result=TOKENIZE, key=TOKENIZE),
    Metric("vocab_used", "share", "higher", "entries that stand in the text", "Vocabulary in use",
           logged=TOKENIZE, result=TOKENIZE, key=TOKENIZE),
    Metric("lost_characters", "count", "lower", "characters without a token, left out",
           "Lost characters", logged=TOKENIZE, result=TOKENIZE + DATA),
    Metric("unknown_rate", "share", "lower", "tokens that stand for what cannot be written",
           "Unknown tokens", logged=TOKENIZE, result=TOKENIZE, key=TOKENIZE),
    Metric("documents", "count", "", "of both splits", logged=TOKENIZE, result=TOKENIZE),
    Metric("train_tokens", "count", "", "those of training", "Training tokens",
           logged=TOKENIZE, result=TOKENIZE),
    Metric("val_tokens", "count", "", "those held out", logged=TOKENIZE, result=TOKENIZE),
    Metric("bytes", "bytes", "", "of text", logged=TOKENIZE, result=TOKENIZE + EVALUATE),
    Metric("longest_document.*", "count", "", "its tokens and place",
           logged=TOKENIZE, result=TOKENIZE),
    Metric("shortest_document.*", "count", "", "its tokens and place",
           logged=TOKENIZE, result=TOKENIZE),

    # quantization
    Metric("eval_tokens", "count", "", "tokens that both models read", result=QUANTIZE),
    Metric("perplexity_before", "", "lower", "of the full weights", result=QUANTIZE),
    Metric("perplexity_after", "", "lower", "of the smaller model", result=QUANTIZE, key=QUANTIZE),
    Metric("perplexity_increase", "change", "lower", "by the perplexity before",
           result=QUANTIZE, key=QUANTIZE),
    Metric("top1_agreement", "share", "higher", "tokens at which both find the same most likely",
           "Top-1 agreement", result=QUANTIZE, key=QUANTIZE),
    Metric("disk_bytes_before", "bytes", "lower", "the weights' files", "Weights on disk, before",
           result=QUANTIZE),
    Metric("disk_bytes_after", "bytes", "lower", "the smaller files", "Weights on disk, after",
           result=QUANTIZE, key=QUANTIZE),
    Metric("memory_bytes_before", "bytes", "lower", "full weights in memory", result=QUANTIZE),
    Metric("memory_bytes_after", "bytes", "lower", "the smaller ones", result=QUANTIZE),
    Metric(SPEED + "*", "tokens/s", "higher", "of generation, by the type of the weights",
           result=QUANTIZE),
    Metric("quantized_layers", "count", "", "layers in few bits", result=QUANTIZE),
    Metric("quantized_share", "share", "", "weights in few bits", result=QUANTIZE),
    Metric("slower", "names", "", "types of the full weights that generate faster",
           "Generates more slowly than with weights in", result=QUANTIZE),

    # rows
    Metric("rows", "count", "", "read or written", result=EVALUATE + GENERATE + DATA),
    Metric("answered", "count", "", "prompts whose responses are ranked", result=RANK),
    Metric("skipped", "count", "", "prompts passed over; rows that could not be used",
           "Rows that could not be used", result=RANK + DATA),
    Metric("identical", "count", "", "prompts with a single response, which are not asked about",
           result=RANK),
    Metric("remaining", "count", "", "prompts left", result=RANK),
    Metric("train_rows", "count", "", "rows to train on", result=DATA),
    Metric("sequences", "count", "", "that they make", result=DATA),
    Metric("tokens_min", "count", "", "of a sequence", "Tokens of the shortest", result=DATA),
    Metric("tokens_median", "count", "", "of a sequence", "Tokens of the median", result=DATA),
    Metric("tokens_p95", "count", "", "of a sequence", "Tokens of the 95th in 100", result=DATA),
    Metric("tokens_max", "count", "", "of a sequence", "Tokens of the longest", result=DATA),
    Metric("full_max", "count", "", "of a sequence before any cut", "Longest, before cutting",
           result=DATA),
    Metric("max_length", "count", "", "tokens after which a sequence is cut", result=DATA),
    Metric("trained_tokens", "count", "", "tokens that the loss counts", "Tokens trained on",
           result=DATA),
    Metric("trained_share", "share", "", "by all tokens", "Share of tokens trained on",
           result=DATA),
    Metric("untrained_rows", "count", "lower", "rows of which no token counts",
           "Rows without a trained token", result=DATA),
    Metric("truncated_rows", "count", "lower", "rows that lost their end", "Rows cut", result=DATA),
    Metric("truncated", "share", "lower", "rows that lost their end", "Share of rows cut",
           result=DATA),
    Metric("ended_rows", "count", "higher", "rows whose end is trained on and stops generation",
           "Rows whose end is trained on", result=DATA),
    Metric("ended_share", "share", "higher", "their share of the uncut rows",
           "Share of whole rows whose end is trained on", result=DATA),
    Metric("double_bos", "count", "lower", "sequences that begin with BOS twice",
           "Sequences with BOS twice", result=DATA),
    Metric("unknown_tokens", "count", "lower", "tokens that stand for what cannot be written",
           result=DATA),
    Metric("unknown_share", "share", "lower", "their share", result=DATA),
    Metric("beyond_embedding", "count", "lower", "tokens that the model has no embedding for",
           "Tokens without an embedding", result=DATA),
    Metric("short", "count", "lower", "sequences in which nothing is predicted",
           "Sequences of a single token", result=DATA),
    Metric("turns", "count", "", "turns of the assistant", "Turns trained on", result=DATA),
    Metric("open_turns", "count", "lower", "those that end with no special token",
           "Turns with no end", result=DATA),
    Metric("foreign_turns", "count", "lower", "those at whose end generation does not stop",
           "Turns with an end that does not stop", result=DATA),
    Metric("val.*", "", "", "the same of the validation data", result=DATA),
    Metric("dropped", "count", "", "rows longer than the model reads",
           "Rows left out for their length", result=DATA),
    Metric("cut", "count", "lower", "pairs of which a response lost its end", result=DATA),
    Metric("dropped_length", "count", "", "pairs longer than the model reads", result=DATA),
    Metric("dropped_equal", "count", "", "pairs of equal responses", "Left out: both the same",
           result=DATA),
    Metric("dropped_same_tokens", "count", "", "pairs that are the same tokens on both sides",
           "Left out: the same tokens", result=DATA),
    Metric("dropped_undecided", "count", "", "pairs without a preference", "Left out: undecided",
           result=DATA),
    Metric("pairs", "count", "", "of a chosen and a rejected response", result=DATA),
    Metric("train_pairs", "count", "", "pairs to train on", result=DATA),
    Metric("val_pairs", "count", "", "pairs held out", result=DATA),
    Metric("prompts", "count", "", "prompts that the pairs are of", result=DATA),
    Metric("margins", "count", "", "training pairs that say by how much", result=DATA),
    Metric("contradictions", "count", "lower", "pairs that also stand the other way round",
           result=DATA),
    Metric("classes.*", "count", "", "training texts of a label", result=DATA),
    Metric("ambiguous", "count", "lower", "texts with several labels", result=DATA),
    Metric("shared_texts", "count", "lower", "validation texts that also train", result=DATA),
    Metric("duplicates", "count", "lower", "rows that stand there before", result=DATA),
    Metric("overlap", "count", "lower", "training rows that stand in the validation data, too",
           "Rows that also validate", result=DATA),
    Metric("shared_prompts", "count", "lower", "validation prompts that train with other answers",
           "Validation prompts answered otherwise", result=DATA),
    Metric("unread_columns", "", "", "columns that nothing reads", "Columns not read", result=DATA),
    Metric("lost_share", "share", "lower", "characters without a token, left out", result=DATA),
    Metric("pad_is_eos", "", "", "whether padding is the end of a text", "pad = eos", result=DATA),
    Metric("packed_rows", "count", "", "rows that sequences are packed into", result=DATA),
    Metric("packing_efficiency", "share", "higher", "their slots that hold a token",
           "Packed rows that are full", result=DATA),

    # of other sets, models and benchmarks
    Metric("compare.*", "", "", "a metric of the model of --compare", result=EVALUATE),
    Metric("differences.*", "", "", "a metric less that of --compare, with its 95 % interval",
           result=EVALUATE),
    Metric("*/*", "", "", "a metric of a benchmark, by lm-eval", result=EVALUATE),
)
# fmt: on
BY_NAME = {metric.name: metric for metric in METRICS}
WORDS = {
    "std": "Standard deviation",
    "negative_kl": "the KL stays below zero",
    "exploding_kl": "the KL explodes",
    "longer_and_better": "scores and lengths rise together",
    "collapsed_entropy": "the entropy collapses",
    "falling_eos": "fewer and fewer responses end by themselves",
    "useless_values": "the value model explains less than a constant would",
    "clipping": "the policy is clipped at more than 4 tokens of 10",
    "flat_scores": "every response has the same score",
}
"""Headings of what is no metric: parts of distributions, and PPO's alarms."""
UNITS = ("nats", "bits", "tokens", "tokens/s", "episodes/s")
"""Units that stand behind a number; others are part of how it is written."""
ENDS = ("_before", "_after", "_low", "_high", "_interval")


@cache
def find(name: str) -> Metric | None:
    """Find the metric of a name, or the one that it is a form of: `val_kl_interval` is `val_kl`."""
    if name in BY_NAME:
        return BY_NAME[name]
    if row := next((row for row in METRICS if fnmatchcase(name, row.name)), None):
        return row
    for end in ENDS:
        if name.endswith(end):
            return find(name.removesuffix(end))
    return None


def _shared(name: str) -> Metric | None:
    """Find the metric of a name that several share: `margin` of a diagram, `disk_bytes` of two."""
    return find(name) or BY_NAME.get(f"val_{name}") or BY_NAME.get(f"{name}_before")


def place(name: str) -> int:
    """Return a metric's place in the table; the end for one that is not in it."""
    row = _shared(name)
    return len(METRICS) if row is None else METRICS.index(row)


def result_names(command: str) -> list[str]:
    """Names of the numbers that a command's result can have; `*` stands for any name."""
    return [
        row.name
        for row in METRICS
        if command in row.result and row.unit != "names" and not row.name.endswith("_interval")
    ]


def is_result(name: str, command: str) -> bool:
    """Whether a command's result has a metric."""
    row = find(name)
    return row is not None and command in row.result


def line_name(name: str) -> str | None:
    """Return a metric's name in the log line of an evaluation, None where it is left out."""
    row = find(name)
    return name if row is None or row.line == "" else row.line


def label(key: str) -> str:
    """Return a key as a heading: `val_token_accuracy` as `Token accuracy, held out`."""
    if key in BY_NAME and BY_NAME[key].label:
        return BY_NAME[key].label
    if key in WORDS:
        return WORDS[key]
    if (both := BY_NAME.get(f"{key}_before")) and both.label:
        return both.label.removesuffix(", before")
    for end in ("_before", "_after"):
        if key.endswith(end):
            return f"{label(key.removesuffix(end))}, {end[1:]}"
    if key.startswith(SPEED):
        return f"{label('tokens_per_second')}, {key.removeprefix(SPEED)}"
    if key.endswith("_interval"):
        return f"{label(key.removesuffix('_interval'))}, 95{NARROW}% interval"
    name, _, part = key.partition("/")
    words = name.removeprefix("val_").replace("_", " ").strip() or key
    shown = words[:1].upper() + words[1:] + (f": {part}" if part else "")
    return f"{shown}, held out" if name.startswith("val_") else shown


def value(key: str, item: Any) -> str:
    """Return a value as a cell shows it, with its unit where it has one."""
    if isinstance(item, bool):
        return "yes" if item else "no"
    if item is None:
        return MISSING
    if isinstance(item, int | float):
        return number(key, item)
    if isinstance(item, list | tuple):
        return " to ".join(value(key.removesuffix("_interval"), part) for part in item)
    return str(item)


def number(key: str, amount: float) -> str:
    """Return a number by its metric's unit: a share in percent, bytes, seconds, a count."""
    if not math.isfinite(amount):
        return MISSING
    row = _shared(key)
    unit = row.unit if row else ""
    if unit == "change":
        return f"{100 * amount:+.3g}{NARROW}%"
    if unit == "share" and 0 <= amount <= 1:
        return f"{100 * amount:.3g}{NARROW}%"
    if unit == "bytes":
        return scaled(amount, 1000, ("B", "kB", "MB", "GB", "TB"))
    if unit == "seconds":
        return seconds(amount)
    if unit == "kWh":
        return energy(amount)
    if unit == "count" and abs(amount) < 10_000:
        return f"{amount:,.0f}"
    return compact(amount)


def unit_of(key: str) -> str:
    """Return the unit of an axis; empty where numbers carry it, or have none."""
    row = _shared(key)
    return row.unit if row and row.unit in UNITS else ""


def with_unit(key: str, amount: float) -> str:
    """Return a number and the unit of its axis."""
    unit = unit_of(key)
    return f"{number(key, amount)}{NARROW}{unit}" if unit else number(key, amount)


def figures(result: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return keys and values of a result that are numbers or intervals: no paths, no tables.

    PPO's `val_loss` is left out: it is a score and a KL, which are there, in one number.
    """
    if "val_win_rate" in result:
        result = {key: item for key, item in result.items() if key != "val_loss"}
    return [(k, v) for k, v in result.items() if is_number(v) or _is_interval(v)]


def _is_interval(item: Any) -> bool:
    return (
        isinstance(item, list | tuple)
        and len(item) == 2
        and all(isinstance(end, int | float) for end in item)
    )
