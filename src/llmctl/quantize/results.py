"""The report on a smaller model: figures as a result has them, and as lines that people read."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.filesize import decimal

from llmctl.console import log
from llmctl.errors import GateError
from llmctl.quantize.compare import Fidelity, Sample
from llmctl.quantize.layers import Layers

SHOWN = 160
"""Characters of a sample in the log."""
MORE_BITS = {"4 bits": "--bits 8", "q4_0": "--gguf q8_0", "q8_0": "--gguf bf16"}
"""What is nearer to the model, by what a method's name says."""


@dataclass(frozen=True)
class Sizes:
    """Bytes that a model takes."""

    disk: int | None
    """Of its weights' files; None where nothing was written."""
    memory: int


@dataclass(frozen=True)
class Report:
    """What was won and lost."""

    method: str
    text: str
    """What the models were measured on."""
    layers: Layers
    share: float
    """Of all weights, those that are in few bits."""
    before: Sizes
    after: Sizes
    fidelity: Fidelity
    speeds: dict[str, float]
    """Tokens a second, by the type of the weights; `after` is the smaller model, where it can be
    timed here."""
    samples: list[Sample]

    def facts(self) -> dict[str, Any]:
        """For a result."""
        found = self.fidelity
        others = {f"tokens_per_second_{name}": speed for name, speed in self.speeds.items()}
        return {
            "method": self.method,
            "eval_text": self.text,
            "eval_tokens": found.tokens,
            "disk_bytes_before": self.before.disk,
            "disk_bytes_after": self.after.disk,
            "memory_bytes_before": self.before.memory,
            "memory_bytes_after": self.after.memory,
            "perplexity_before": found.perplexity_before,
            "perplexity_after": found.perplexity_after,
            "perplexity_increase": found.increase,
            "kl": found.kl,
            "top1_agreement": found.top1,
            **others,
            "slower": self.slower(),
            "quantized_layers": len(self.layers.taken),
            "quantized_share": self.share,
            "kept_layers": self.layers.kept,
            "samples": [asdict(sample) for sample in self.samples],
        }

    def slower(self) -> list[str]:
        """Types of the full weights in which generation is faster than by the smaller model."""
        after = self.speeds.get("after")
        return [name for name, speed in self.speeds.items() if after and speed > after]

    def show(self) -> None:
        """Say it on stderr."""
        found, speeds = self.fidelity, dict(self.speeds)
        after = speeds.pop("after", None)
        own = next(iter(speeds.values()))
        unit = "token" if found.tokens == 1 else "tokens"
        log.info("%s, measured on %s %s of %s:", self.method, f"{found.tokens:,}", unit, self.text)
        rows = [
            ("", "before", "after", ""),
            ("weights on disk", *_bytes(self.before.disk, self.after.disk)),
            ("weights in memory", *_bytes(self.before.memory, self.after.memory)),
            (
                "perplexity",
                f"{found.perplexity_before:.3f}",
                f"{found.perplexity_after:.3f}",
                f"{found.increase:+.2%}",
            ),
            (
                "tokens/s",
                f"{own:.1f}",
                *((f"{after:.1f}", f"{after / own:.2f}x") if after else "- "),
            ),
        ]
        for name, one, other, change in rows:
            log.info("  %-20s %12s %12s  %s", name, one, other, change)
        log.info("  %-20s %12s  nats a token", "mean KL", f"{found.kl:.2g}")
        log.info("  %-20s %12s  of the most likely tokens", "agreement", f"{found.top1:.2%}")
        self._show_slower()
        for line in self.layers.summary():
            log.info("  kept: %s", line)
        for sample in self.samples:
            log.info("  prompt:  %s", _short(sample.prompt))
            log.info("  before:  %s", _short(sample.before))
            log.info("  after:   %s", _short(sample.after))

    def _show_slower(self) -> None:
        for name in self.slower():
            log.warning(
                "generation is slower here than with weights in %s: %.1f tokens/s, not %.1f",
                name,
                self.speeds["after"],
                self.speeds[name],
            )

    def hold(self, limit: float | None) -> None:
        """Refuse a model that lost more than it may.

        Raises:
            GateError: perplexity grew by more than this share.
        """
        found = self.fidelity
        if limit is None or found.increase <= limit:
            return
        self.show()
        fewest = next((few for few in MORE_BITS if few in self.method), None)
        more = f"more bits ({MORE_BITS[fewest]}), or " if fewest else ""
        error = GateError(
            f"perplexity grew by {found.increase:.2%}, from {found.perplexity_before:.3f} to "
            f"{found.perplexity_after:.3f}; --max-perplexity-increase {limit:g} allows "
            f"{limit:.2%}: nothing was written",
            hint=f"keep {more}the layers that matter (--keep)" if self.layers.taken else None,
        )
        error.report = self.facts()
        raise error


def _bytes(before: int | None, after: int | None) -> tuple[str, str, str]:
    sizes = ["-" if size is None else decimal(size) for size in (before, after)]
    change = f"{after / before:.1%}" if before and after else ""
    return sizes[0], sizes[1], change


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"
