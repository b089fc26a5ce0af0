"""Self-checks before the first update: that a run trains what it samples.

In: the models and the first experience. Out: measured differences, each within its bound. A run
that fails one is refused: its losses would look well, and its policy would learn something else.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmctl.console import log
from llmctl.errors import ModelError
from llmctl.ppo.episodes import EpisodeTokens, Experience, make_pass
from llmctl.ppo.models import ActorCritic, selected_log_probs

TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "pure-bf16": 5e-2}
"""Most that |ratio - 1| and differences of log-probabilities (nats) may be: the largest of all
tokens in float32, the mean in bf16, where another shape of a pass rounds single tokens by much."""
EXACT = {"fp32": 1e-4, "bf16": 0.0, "pure-bf16": 0.0}
"""Sampled and computed log-probabilities that differ by at most this count as the same."""
SAMPLING_BOUND = 0.2
"""Nats; the sampler may use kernels or a precision that training does not."""
ROWS = 4

RATIO_HINT = "training does not see the policy that sampled: dropout, or a model that is not pure?"
KL_HINT = "the reference is not the policy as it began: is the adapter new?"
PADDING_HINT = "this architecture looks at padding, and cannot be trained in batches"
TEMPERATURE_HINT = "the log-probabilities of training are not those of --temperature"
SAMPLING_HINT = "the sampler's log-probabilities are not those of the model"


@dataclass(frozen=True)
class SelfChecks:
    """The measured differences; the manifest holds them all."""

    ratio: float
    """|ratio - 1| of the first episodes."""
    kl: float
    """|log p - log q| of policy and reference."""
    padding: float
    """Change of a log-probability or value by the sequences beside it."""
    temperature: float
    """Difference to log-probabilities from the model's own logits divided by the temperature."""
    sampling: float
    """Difference of the sampler's log-probabilities from those of training."""

    def as_json(self) -> dict[str, float]:
        """The differences by their names in the manifest."""
        return {f"self_check_{name}": value for name, value in vars(self).items()}


@torch.no_grad()
def run_self_checks(
    models: ActorCritic, experience: Experience, eos: set[int], precision: str
) -> SelfChecks:
    """Measure on the first rows of the first step, where the policy is still the reference.

    Raises:
        ModelError: a difference is too large; the message says which and by how much.
    """
    bound = TOLERANCE[precision]
    sequences, mask = experience.sequences, experience.mask
    rows = list(range(min(ROWS, len(sequences))))
    batch = make_pass(sequences, rows, mask, models.device)
    log_probs, _ = models.log_probs(batch)
    old = experience.log_probs[rows][batch.mask]
    sampled = experience.sampler_log_probs[rows][batch.mask]
    checks = SelfChecks(
        ratio=magnitude(torch.expm1(log_probs - old), precision),
        kl=magnitude(log_probs - models.reference_log_probs(batch), precision),
        padding=_padding(models, experience, eos, precision),
        temperature=_temperature(models, sequences, mask, precision),
        sampling=magnitude(sampled - log_probs, precision),
    )
    for difference, most, problem, hint in (
        (checks.ratio, bound, "the ratio is off 1 by {:.3g}", RATIO_HINT),
        (checks.kl, bound, "policy and reference differ by {:.3g} nats", KL_HINT),
        (checks.padding, bound, "padding moves it by {:.3g}", PADDING_HINT),
        (checks.temperature, bound, "off by {:.3g} nats", TEMPERATURE_HINT),
        (checks.sampling, SAMPLING_BOUND, "off by {:.3g} nats", SAMPLING_HINT),
    ):
        if not difference <= most:
            what = problem.format(difference)
            raise ModelError(f"a self-check before training failed: {what}", hint=hint)
    log.info(
        "self-checks: ratio 1 within %.1g, KL 0 within %.1g, padding %.1g, temperature %.1g, "
        "sampler %.1g",
        *vars(checks).values(),
    )
    return checks


def magnitude(difference: Tensor, precision: str) -> float:
    """Largest absolute difference in float32, the mean in bf16: see TOLERANCE."""
    absolute = difference.abs()
    return float(absolute.max() if precision == "fp32" else absolute.mean())


def _padding(models: ActorCritic, experience: Experience, eos: set[int], precision: str) -> float:
    """Compare the shortest sequence alone with it beside the longest, EOS for padding."""
    sequences = experience.sequences
    lengths = [len(p) + len(r) for p, r in zip(sequences.prompts, sequences.responses, strict=True)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    alone = make_pass(sequences, [order[0]], experience.mask, models.device)
    pad = min(eos, default=1)
    beside = make_pass(sequences, [order[0], order[-1]], experience.mask, models.device, pad)
    count = len(alone.targets)
    log_probs = models.log_probs(beside)[0][:count] - models.log_probs(alone)[0]
    values = models.values(beside)[:count] - models.values(alone)
    return magnitude(torch.stack([log_probs, values]), precision)


def _temperature(
    models: ActorCritic, sequences: EpisodeTokens, mask: Tensor, precision: str
) -> float:
    """Compare with one sequence through the whole model, logits divided by the temperature."""
    batch = make_pass(sequences, [0], mask, models.device)
    with models.autocast():
        logits = models.policy(input_ids=batch.tokens, use_cache=False).logits
    divided = logits[0, :-1].float()[batch.positions] / models.temperature
    log_probs, _ = models.log_probs(batch)
    return magnitude(selected_log_probs(divided, batch.targets) - log_probs, precision)
