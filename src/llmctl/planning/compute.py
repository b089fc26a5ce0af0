"""FLOPs of a run and how long they take: a `Work` in, numbers out; and scaling laws.

Of the laws N is parameters, D tokens, C = 6 N D FLOPs. Losses are nats a token on the papers' own
web text with their own tokenizers: they compare runs, and tell no one what a small model's loss
will be.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch

from llmctl import hardware
from llmctl.models import presets
from llmctl.planning.work import Work

ASSUMED_SHARE = 0.4
"""Of a GPU's peak, where no rate is given: what good runs of large models reach (Chowdhery et al.,
2022, arXiv:2204.02311, table 3: 46 %; half of it on small ones)."""

MEASURED_TOKENS = 256
MEASURED_SECONDS = 2.0
MEASURED_VOCABULARY = 8192

PF_DAY = 1e15 * 86_400
"""FLOPs of a day at 10^15 a second (Kaplan et al., 2020, arXiv:2001.08361, section 1.3)."""


@dataclass(frozen=True)
class Rate:
    """How fast one device computes."""

    flops: float
    """A second, as they are counted here."""
    origin: str
    """given, measured, or a share of the peak."""


def flops_per_token(work: Work, config: Any) -> float:
    """Of training, for a token: 6 N + 12 L H T, as `shapes.flops_per_token` counts.

    A frozen weight has no gradient, which saves a third of its share; activations that are computed
    again cost another forward pass, a third more.
    """
    whole = presets.flops_per_token(work.shape.active, config, round(work.mean_length))
    frozen = max(0, work.shape.active - work.trained) if work.has_adapter else 0
    again = whole / 3 if work.is_checkpointed else 0.0
    return whole - 2.0 * frozen + again


def flops_per_step(work: Work, config: Any) -> float:
    """Over all devices.

    A step of PPO samples each token once, looks at it with policy's reference, value model and
    reward models (2 N each), and trains policy and value model in every pass.
    """
    training = flops_per_token(work, config) * work.tokens_per_step
    if work.episodes is None:
        return training
    looks = 3 * work.shape.active + work.episodes.judges
    return 2 * work.episodes.passes * training + 2.0 * looks * work.tokens_per_step


def rate_of(work: Work, tflops: float | None) -> Rate | None:
    """The rate that was given, or one to be expected of this GPU; None where nothing says."""
    if tflops is not None:
        return Rate(tflops * 1e12, "given")
    if work.device == "cuda" and torch.cuda.is_available():
        peak = hardware.peak_flops("cuda")
        if peak is not None:
            return Rate(ASSUMED_SHARE * peak, f"{ASSUMED_SHARE:.0%} of the peak")
    return None


def measure(work: Work, config: Any) -> Rate:
    """The rate of real steps on this machine, of a model cut to one block and a small vocabulary.

    Blocks are alike, and they are most of the work.

    Raises:
        ResourceError: not even that fits.
    """
    small = type(config).from_dict(config.to_dict())
    text = small.get_text_config()
    text.num_hidden_layers = 1
    text.vocab_size = min(text.vocab_size, MEASURED_VOCABULARY)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text, name, None)
    if "layer_types" in text.to_dict() and text.layer_types:
        text.layer_types = text.layer_types[:1]
    device = hardware.pick_device("cuda" if work.device == "cuda" else "cpu")
    with hardware.memory_errors():
        model = presets.new_model(small).to(device)
        length = min(work.length, MEASURED_TOKENS)
        tokens = torch.randint(text.vocab_size, (1, length), device=device)
        seconds = _seconds_of_a_step(model, tokens, work)
    active = presets.active_parameters(model)
    return Rate(presets.flops_per_token(active, text, length) * length / seconds, "measured")


def _seconds_of_a_step(model: Any, tokens: torch.Tensor, work: Work) -> float:
    """Of a forward and backward pass, the fastest of several: the first ones warm up."""
    device = tokens.device.type
    half = work.is_half
    best, begun = float("inf"), time.monotonic()
    while time.monotonic() - begun < MEASURED_SECONDS or best == float("inf"):
        started = time.monotonic()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.monotonic() - started)
    return best


@dataclass(frozen=True)
class Parametric:
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al., 2022, arXiv:2203.15556, eq. 2)."""

    floor: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats a token."""
        return float(self.floor + self.a / parameters**self.alpha + self.b / tokens**self.beta)

    def best_tokens(self, parameters: float) -> float:
        """D for which N is the best size at C = 6 N D.

        N = G (C/6)^(beta/(alpha+beta)), G = (alpha A / beta B)^(1/(alpha+beta)) (eq. 4), solved
        for D = C / 6N.
        """
        total = self.alpha + self.beta
        g = (self.alpha * self.a / (self.beta * self.b)) ** (1 / total)
        product = (parameters / g) ** (total / self.beta)
        return float(product / parameters)


HOFFMANN = Parametric(floor=1.69, a=406.4, b=410.7, alpha=0.34, beta=0.28)
"""As published, approach 3 (eq. 10): rounded, and found not to fit its own data."""
BESIROGLU = Parametric(floor=1.8172, a=482.01, b=2085.43, alpha=0.3478, beta=0.3658)
"""The same law fitted again (Besiroglu et al., 2024, arXiv:2404.10102)."""


def kaplan_loss(parameters: float, tokens: float) -> float:
    """L(N, D) = ((Nc / N)^(aN / aD) + Dc / D)^aD, N without embeddings.

    Kaplan et al., 2020, arXiv:2001.08361, eq. 1.5, with the fit of table 2.
    """
    size = (6.4e13 / parameters) ** (0.076 / 0.103)
    return float((size + 1.8e13 / tokens) ** 0.103)


def kaplan_tokens(parameters: float) -> float:
    """Tokens of a compute-efficient run: N = 1.3e9 C^0.73 and D = 2e10 C^0.27, C in PF-days.

    Kaplan et al., 2020, arXiv:2001.08361, table 6; N is without embeddings.
    """
    days = (parameters / 1.3e9) ** (1 / 0.73)
    return float(2e10 * days**0.27)
