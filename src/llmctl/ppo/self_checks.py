"""What every run shows of itself before its first update: that it trains what it samples.

Each check holds a number against a bound, and a run that fails one is refused: its losses would
look well, and its policy would learn something else.
"""

from dataclasses import dataclass

import torch

from llmctl.console import log
from llmctl.errors import ModelError
from llmctl.ppo.episodes import Episodes, Sequences, make_pass
from llmctl.ppo.models import Actors, log_probs_of

TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "pure-bf16": 5e-2}
"""Most that |ratio - 1| and differences of log-probabilities (nats) may be: the largest of all
tokens in float32, the mean in bf16, where another shape of a pass rounds single tokens by much."""
EXACT = {"fp32": 1e-4, "bf16": 0.0, "pure-bf16": 0.0}
"""Sampled and computed log-probabilities that differ less than this are the same ones."""
ROWS = 4


@dataclass(frozen=True)
class Checked:
    """What was found; all of it stands in the manifest."""

    ratio: float
    """|ratio - 1| of the first episodes."""
    kl: float
    """|log p - log q| of policy and reference."""
    padding: float
    """Change of a log-probability or value by what stands beside a sequence."""
    temperature: float
    """Difference to log-probabilities computed plainly at the temperature."""
    sampling: float
    """Difference of the log-probabilities of sampling from those of training."""

    @property
    def facts(self) -> dict[str, float]:
        """For the manifest."""
        return {f"self_check_{name}": value for name, value in vars(self).items()}


@torch.no_grad()
def check(actors: Actors, episodes: Episodes, eos: set[int], precision: str) -> Checked:
    """Measure on the first rows of the first step; the policy is still the reference.

    Args:
        actors: before any update.
        episodes: of the first step.
        eos: tokens that end a response.
        precision: fp32, bf16 or pure-bf16.

    Raises:
        ModelError: something is not as it must be; the message says what and how far.
    """
    bound = TOLERANCE[precision]
    sequences, mask = episodes.sequences, episodes.mask
    rows = list(range(min(ROWS, len(sequences))))
    batch = make_pass(sequences, rows, mask, actors.device)
    found, _ = actors.log_probs(batch)
    old = episodes.log_probs[rows][batch.mask]
    kl = off(found - actors.reference_log_probs(batch), precision)
    checked = Checked(
        ratio=off(torch.expm1(found - old), precision),
        kl=kl,
        padding=_padding(actors, episodes, eos, precision),
        temperature=_temperature(actors, sequences, mask, precision),
        sampling=off(episodes.sampled[rows][batch.mask] - found, precision),
    )
    _require(checked.ratio <= bound, f"the ratio is off 1 by {checked.ratio:.3g}", RATIO)
    _require(checked.kl <= bound, f"policy and reference differ by {kl:.3g} nats", KL)
    _require(checked.padding <= bound, f"padding moves it by {checked.padding:.3g}", PADDING)
    _require(checked.temperature <= bound, f"off by {checked.temperature:.3g} nats", TEMPERATURE)
    _require(checked.sampling <= SAMPLING_BOUND, f"off by {checked.sampling:.3g} nats", SAMPLING)
    log.info(
        "self-checks: ratio 1 within %.1g, KL 0 within %.1g, padding %.1g, temperature %.1g, "
        "sampler %.1g",
        *vars(checked).values(),
    )
    return checked


SAMPLING_BOUND = 0.2
"""Nats; the sampler may use kernels, or numbers, that training does not."""
RATIO = "training does not see the policy that sampled: dropout, or a model that is not pure?"
KL = "the reference is not the policy as it began: is the adapter new?"
PADDING = "this architecture looks at padding, and cannot be trained in batches"
TEMPERATURE = "the log-probabilities of training are not those of --temperature"
SAMPLING = "the sampler's log-probabilities are not those of the model"


def off(difference: torch.Tensor, precision: str) -> float:
    """How far something is off: see TOLERANCE."""
    found = difference.abs()
    return float(found.max() if precision == "fp32" else found.mean())


def _require(holds: bool, what: str, hint: str) -> None:
    if not holds:
        raise ModelError(f"a self-check before training failed: {what}", hint=hint)


def _padding(actors: Actors, episodes: Episodes, eos: set[int], precision: str) -> float:
    """The shortest sequence alone, and beside the longest with EOS for padding."""
    sequences = episodes.sequences
    lengths = [len(p) + len(r) for p, r in zip(sequences.prompts, sequences.responses, strict=True)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    few, many = [order[0]], [order[0], order[-1]]
    pad = min(eos, default=1)
    alone = make_pass(sequences, few, episodes.mask, actors.device)
    beside = make_pass(sequences, many, episodes.mask, actors.device, pad)
    count = len(alone.chosen)
    moved = actors.log_probs(beside)[0][:count] - actors.log_probs(alone)[0]
    shifted = actors.values(beside)[:count] - actors.values(alone)
    return off(torch.stack([moved, shifted]), precision)


def _temperature(actors: Actors, sequences: Sequences, mask: torch.Tensor, precision: str) -> float:
    """One sequence through the whole model, its logits divided by the temperature."""
    batch = make_pass(sequences, [0], mask, actors.device)
    with actors.autocast():
        logits = actors.policy(input_ids=batch.tokens, use_cache=False).logits
    plain = logits[0, :-1].float()[batch.places] / actors.temperature
    found, _ = actors.log_probs(batch)
    return off(log_probs_of(plain, batch.chosen) - found, precision)
