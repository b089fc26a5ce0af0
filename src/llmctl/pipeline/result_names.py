"""Which figures a stage's result can hold, so that a gate on another is refused before it begins.

A figure of an inner object is `outer.inner`; `*` stands for any name. Some come only where the
recipe asks for them: the others are missed as soon as the stage has ended.
"""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from llmctl.config.gates import Gate
from llmctl.errors import UserError

TRAINING = (
    *("step", "best_step", "tokens", "tokens_per_second", "loss", "grad_norm", "memory_bytes"),
    *("skipped_steps", "mfu", "parameters", "trained_parameters", "merge_difference", "val_loss"),
)
FIGURES: dict[str, tuple[str, ...]] = {
    "tokenize": (
        *("documents", "tokens", "train_tokens", "val_tokens", "bytes", "bytes_per_token"),
        *("tokens_per_second", "unknown_rate", "vocab_size", "vocab_used"),
        *("longest_document.*", "shortest_document.*"),
    ),
    "pretrain": (*TRAINING, "val_perplexity", "val_bits_per_byte"),
    "sft": (*TRAINING, "val_token_accuracy", "val_accuracy", "val_macro_f1"),
    "reward": (
        *(*TRAINING, "val_accuracy", "val_margin", "val_calibration_error", "val_longer_wins"),
        *("val_length_correlation", "val_score_mean", "val_score_std"),
        *("val_chosen.*", "val_rejected.*"),
    ),
    "dpo": (
        *(*TRAINING, "val_reward_accuracy", "val_reward_margin", "val_chosen_logprob"),
        *("val_rejected_logprob", "val_chosen_gain"),
    ),
    "ppo": (
        *(*TRAINING, "episodes", "score", "score/*", "kl", "kl_coef", "entropy", "length"),
        *("eos_share", "clip_fraction"),
        *("val_score", "val_score/*", "val_reference_score", "val_reference_std", "val_kl"),
        *("val_win_rate", "val_win_rate_low", "val_win_rate_high", "val_length"),
        *("val_eos_share", "val_prompts"),
    ),
    "merge": ("difference", "quantized_difference"),
    "quantize": (
        *("eval_tokens", "perplexity_before", "perplexity_after", "perplexity_increase", "kl"),
        *("top1_agreement", "disk_bytes_before", "disk_bytes_after", "memory_bytes_before"),
        *("memory_bytes_after", "tokens_per_second_*", "quantized_layers", "quantized_share"),
    ),
    "generate": ("rows", "tokens"),
    "evaluate": ("*",),  # named after the sets
    "rank": ("*",),
}


def require_given(gates: Sequence[Gate], stage: str, file: Path, line: int | None) -> None:
    """Refuse gates on figures that the stage never gives.

    Raises:
        UserError: naming the figure, and the one that may be meant.
    """
    known = FIGURES.get(stage, ())
    for gate in gates:
        if not any(fnmatchcase(gate.figure, pattern) for pattern in known):
            close = difflib.get_close_matches(gate.figure, known, n=1)
            raise UserError(
                f"gates: `{stage}` gives no figure `{gate.figure}`"
                + (f": did you mean `{close[0]}`?" if close else ""),
                file=file,
                line=line,
                hint=f"it can give {', '.join(known)}" if known else "it gives no figures",
            )
