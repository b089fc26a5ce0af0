"""The report on a quantized model: a dict for the result, and lines for the log."""

from dataclasses import dataclass
from typing import Any

from llmctl.console import log
from llmctl.errors import GateError
from llmctl.numbers import byte_size, counted
from llmctl.quantize.fidelity import Fidelity
from llmctl.quantize.layers import Layers

SHOWN = 160
"""Characters of a sample in the log."""
MORE_BITS = {"4 bits": "--bits 8", "q4_0": "--gguf q8_0", "q8_0": "--gguf bf16"}
"""Part of a method's name -> flag of a method that loses less."""


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model."""

    disk: int | None
    """Bytes of its weights' files; None where nothing was written."""
    memory: int


@dataclass(frozen=True)
class QuantizationReport:
    """Sizes, fidelity, speed and samples of a model before and after."""

    method: str
    text: str
    """Name of the text that the models were measured on."""
    layers: Layers
    share: float
    """Share of all weights that are quantized."""
    before: WeightBytes
    after: WeightBytes
    fidelity: Fidelity
    speeds: dict[str, float]
    """Tokens a second, by the type of the weights; `after` is the smaller model, where it can be
    timed here."""
    samples: list[dict[str, str]]
    """Continuations of a `prompt` by the model `before` and `after`."""

    def as_dict(self) -> dict[str, Any]:
        """The figures by name, for the result."""
        fidelity = self.fidelity
        others = {f"tokens_per_second_{name}": speed for name, speed in self.speeds.items()}
        return {
            "method": self.method,
            "eval_text": self.text,
            "eval_tokens": fidelity.tokens,
            "disk_bytes_before": self.before.disk,
            "disk_bytes_after": self.after.disk,
            "memory_bytes_before": self.before.memory,
            "memory_bytes_after": self.after.memory,
            "perplexity_before": fidelity.perplexity_before,
            "perplexity_after": fidelity.perplexity_after,
            "perplexity_increase": fidelity.increase,
            "kl": fidelity.kl,
            "top1_agreement": fidelity.top1,
            **others,
            "slower": self.slower(),
            "quantized_layers": len(self.layers.taken),
            "quantized_share": self.share,
            "kept_layers": self.layers.kept,
            "samples": self.samples,
        }

    def slower(self) -> list[str]:
        """Types of the full weights with which generation is faster than with the quantized."""
        after = self.speeds.get("after")
        return [name for name, speed in self.speeds.items() if after and speed > after]

    def show(self) -> None:
        """Log the report."""
        fidelity, speeds = self.fidelity, dict(self.speeds)
        after = speeds.pop("after", None)
        own = next(iter(speeds.values()))
        tokens = counted(fidelity.tokens, "token")
        log.info("%s, measured on %s of %s:", self.method, tokens, self.text)
        rows = [
            ("", "before", "after", ""),
            ("weights on disk", *_bytes(self.before.disk, self.after.disk)),
            ("weights in memory", *_bytes(self.before.memory, self.after.memory)),
            (
                "perplexity",
                f"{fidelity.perplexity_before:.3f}",
                f"{fidelity.perplexity_after:.3f}",
                f"{fidelity.increase:+.2%}",
            ),
            (
                "tokens/s",
                f"{own:.1f}",
                *((f"{after:.1f}", f"{after / own:.2f}x") if after else ("-", "")),
            ),
        ]
        for row in rows:
            log.info("  %-20s %12s %12s  %s", *row)
        log.info("  %-20s %12s  nats a token", "mean KL", f"{fidelity.kl:.2g}")
        log.info("  %-20s %12s  of the most likely tokens", "agreement", f"{fidelity.top1:.2%}")
        for name in self.slower():
            log.warning(
                "generation is slower here than with weights in %s: %.1f tokens/s, not %.1f",
                *(name, after, speeds[name]),
            )
        for line in self.layers.summary():
            log.info("  kept: %s", line)
        for sample in self.samples:
            for name, text in sample.items():
                log.info("  %-8s %s", f"{name}:", _short(text))

    def check_gate(self, limit: float | None) -> None:
        """Refuse a model that lost more than it may.

        Raises:
            GateError: perplexity grew by more than this share.
        """
        fidelity = self.fidelity
        if limit is None or fidelity.increase <= limit:
            return
        self.show()
        fewest = next((few for few in MORE_BITS if few in self.method), None)
        more = f"more bits ({MORE_BITS[fewest]}), or " if fewest else ""
        error = GateError(
            f"perplexity grew by {fidelity.increase:.2%}, from {fidelity.perplexity_before:.3f} to "
            f"{fidelity.perplexity_after:.3f}; --max-perplexity-increase {limit:g} allows "
            f"{limit:.2%}: nothing was written",
            hint=f"keep {more}the layers that matter (--keep)" if self.layers.taken else None,
        )
        error.report = self.as_dict()
        raise error


def _bytes(before: int | None, after: int | None) -> tuple[str, str, str]:
    sizes = ["-" if size is None else byte_size(size) for size in (before, after)]
    change = f"{after / before:.1%}" if before and after else ""
    return sizes[0], sizes[1], change


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"
