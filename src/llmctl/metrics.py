"""Names and numbers of metrics and results, as people read them; nothing else knows their units."""

import math
import re
from collections.abc import Mapping
from typing import Any

LABELS = {
    "beyond_embedding": "Tokens without an embedding",
    "best_step": "Best step",
    "bytes_per_token": "Bytes a token",
    "chrf": "chrF",
    "clip_fraction": "Clipped tokens",
    "double_bos": "Sequences with BOS twice",
    "bleu": "BLEU",
    "cut_share": "Cut at the most tokens",
    "disk_bytes": "Weights on disk",
    "dropped": "Rows left out for their length",
    "dropped_equal": "Left out: both the same",
    "dropped_undecided": "Left out: undecided",
    "ended_rows": "Rows whose end is trained on",
    "ended_share": "Share of whole rows whose end is trained on",
    "eos_share": "Ended by themselves",
    "episodes_per_second": "Episodes a second",
    "exact": "Exact matches",
    "f1": "F1",
    "foreign_turns": "Turns with an end that does not stop",
    "full_max": "Longest, before cutting",
    "grad_norm": "Gradient norm",
    "kl": "KL divergence",
    "kl_coef": "KL coefficient",
    "kwh": "Energy",
    "length": "Length of responses",
    "longer_wins": "The longer response wins",
    "lr": "Learning rate",
    "memory_bytes": "Memory in use",
    "mfu": "Model FLOPs utilisation",
    "open_turns": "Turns with no end",
    "overlap": "Rows that also validate",
    "packing_efficiency": "Packed rows that are full",
    "pad_is_eos": "pad = eos",
    "shared_prompts": "Validation prompts answered otherwise",
    "short": "Sequences of a single token",
    "skipped": "Rows that could not be read",
    "slower": "Generates more slowly than with weights in",
    "step": "Steps",
    "tokens_max": "Tokens of the longest",
    "tokens_median": "Tokens of the median",
    "tokens_min": "Tokens of the shortest",
    "tokens_p95": "Tokens of the 95th in 100",
    "negative_kl": "the KL stays below zero",
    "exploding_kl": "the KL explodes",
    "longer_and_better": "scores and lengths rise together",
    "collapsed_entropy": "the entropy collapses",
    "falling_eos": "fewer and fewer responses end by themselves",
    "useless_values": "the value model explains less than a constant would",
    "clipping": "the policy is clipped at more than 4 tokens of 10",
    "flat_scores": "every response has the same score",
    "trained_share": "Share of tokens trained on",
    "trained_tokens": "Tokens trained on",
    "truncated": "Share of rows cut",
    "truncated_rows": "Rows cut",
    "turns": "Turns trained on",
    "untrained_rows": "Rows without a trained token",
    "std": "Standard deviation",
    "tokens_per_second": "Tokens a second",
    "top1_agreement": "Top-1 agreement",
    "train_tokens": "Training tokens",
    "trained_parameters": "Trained parameters",
    "val_bits_per_byte": "Bits per byte",
    "val_kl": "KL from the reference, held out",
    "val_eos_share": "Ended by themselves, held out",
    "val_length": "Length, held out",
    "val_loss": "Validation loss",
    "val_perplexity": "Perplexity",
    "val_win_rate": "Wins against the reference",
    "val_calibration_error": "Calibration error",
    "val_longer_wins": "The longer response wins",
    "val_reference_score": "Score of the reference",
    "vocab_size": "Vocabulary",
    "unknown_rate": "Unknown tokens",
    "vocab_used": "Vocabulary in use",
    "wer": "Word error rate",
}
UNITS = {
    "kl": "nats",
    "val_kl": "nats",
    "entropy": "nats",
    "length": "tokens",
    "val_length": "tokens",
    "tokens_per_second": "tokens/s",
    "episodes_per_second": "episodes/s",
    "loss": "nats",
    "val_loss": "nats",
    "val_bits_per_byte": "bits",
}
_SHARE = re.compile(
    r"(?:share|accuracy|fraction|win_rate(?:_low|_high)?|longer_wins|efficiency|agreement|mfu|"
    r"vocab_used|unknown_rate|trained_share|truncated|exact|f1|wer)$"
)
_BYTES = re.compile(r"(?:^|_)bytes$")
_SECONDS = re.compile(r"(?:^|_)(?:seconds|time)$")
_COUNT = re.compile(
    r"(?:parameters|tokens|rows|pairs|steps?|documents|prompts|vocab_size|sequences|episodes)$"
)
SPEED = "tokens_per_second_"
"""Followed by the type of the weights, in the results of quantize."""
MISSING = "\N{EN DASH}"
NARROW = "\N{NARROW NO-BREAK SPACE}"


def label(key: str) -> str:
    """A key as a heading: `val_token_accuracy` as `Token accuracy, held out`."""
    if key in LABELS:
        return LABELS[key]
    for end in ("_before", "_after"):
        if key.endswith(end):
            return f"{label(key.removesuffix(end))}, {end[1:]}"
    if key.startswith(SPEED):
        return f"{LABELS['tokens_per_second']}, {key.removeprefix(SPEED)}"
    if key.endswith("_interval"):
        return f"{label(key.removesuffix('_interval'))}, 95{NARROW}% interval"
    name, _, part = key.partition("/")
    words = name.removeprefix("val_").replace("_", " ").strip() or key
    shown = words[:1].upper() + words[1:] + (f": {part}" if part else "")
    return f"{shown}, held out" if name.startswith("val_") else shown


def value(key: str, found: Any) -> str:
    """A value as a cell shows it, with its unit where it has one."""
    if isinstance(found, bool):
        return "yes" if found else "no"
    if found is None:
        return MISSING
    if isinstance(found, int | float):
        return number(key, found)
    if isinstance(found, list | tuple):
        return " to ".join(value(key.removesuffix("_interval"), one) for one in found)
    return str(found)


def number(key: str, found: float) -> str:
    """A number by what its key means: a share in percent, bytes, seconds, a count, or as it is."""
    if not math.isfinite(found):
        return MISSING
    name = key.partition("/")[0].removesuffix("_before").removesuffix("_after")
    if name.endswith("_increase"):
        return f"{100 * found:+.3g}{NARROW}%"
    if _SHARE.search(name) and 0 <= found <= 1:
        return f"{100 * found:.3g}{NARROW}%"
    if _BYTES.search(name):
        return scaled(found, 1000, ("B", "kB", "MB", "GB", "TB"))
    if _SECONDS.search(name):
        return seconds(found)
    if name == "kwh":
        return energy(found)
    if _COUNT.search(name) and abs(found) < 10_000:
        return f"{found:,.0f}"
    return compact(found)


def with_unit(key: str, found: float) -> str:
    """A number and the unit of its axis."""
    unit = UNITS.get(key)
    return f"{number(key, found)}{NARROW}{unit}" if unit else number(key, found)


def compact(found: float) -> str:
    """A number in four digits or so: `1.25M`, `0.0123`, `6e-05`."""
    if found == 0:
        return "0"
    size = abs(found)
    if size >= 10_000:
        return scaled(found, 1000, ("", "k", "M", "B", "T"), gap="")
    if size >= 1:
        return f"{found:.4g}"
    return f"{found:.3g}" if size >= 1e-3 else f"{found:.2g}"


def scaled(found: float, base: int, units: tuple[str, ...], gap: str = NARROW) -> str:
    """A number in the largest unit that it fills, in three digits."""
    place, left = 0, float(found)
    while abs(left) >= base * 0.9995 and place < len(units) - 1:
        left, place = left / base, place + 1
    digits = f"{left:.3g}"
    return f"{digits}{gap if units[place] else ''}{units[place]}"


def seconds(found: float) -> str:
    """A duration: `0.42 s`, `3.4 s`, `2 min 05 s`, `3 h 20 min`."""
    if found < 60:
        return f"{found:.2g}{NARROW}s" if found < 10 else f"{found:.0f}{NARROW}s"
    if found < 3600:
        return f"{int(found) // 60}{NARROW}min {int(found) % 60:02d}{NARROW}s"
    if found < 172_800:
        return f"{int(found) // 3600}{NARROW}h {int(found) % 3600 // 60:02d}{NARROW}min"
    return f"{found / 86_400:.1f}{NARROW}days"


def energy(kwh: float) -> str:
    """Kilowatt-hours in a unit that fits: `350 mWh`, `4.2 Wh`, `12.5 kWh`."""
    return scaled(kwh * 1e6, 1000, ("mWh", "Wh", "kWh", "MWh"))


def figures(result: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Keys and values of a result that are figures: no paths, no states, no tables.

    PPO's `val_loss` is none of them: it is a score and a KL, which are there, in one number.
    """
    if "val_win_rate" in result:
        result = {key: value for key, value in result.items() if key != "val_loss"}
    plain = {k: v for k, v in result.items() if isinstance(v, int | float) or _is_interval(v)}
    return [(key, found) for key, found in plain.items() if not isinstance(found, bool)]


def _is_interval(found: Any) -> bool:
    return (
        isinstance(found, list | tuple)
        and len(found) == 2
        and all(isinstance(end, int | float) for end in found)
    )
