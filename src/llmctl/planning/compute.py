"""FLOPs of a run and its speed: a `Workload` in, numbers out; and scaling laws.

In the laws N is parameters, D tokens, C = 6 N D FLOPs. Losses are nats a token on the papers' own
web text with their own tokenizers: they compare runs, and do not predict a small model's loss.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch

from llmctl import hardware
from llmctl.models import presets
from llmctl.planning.workload import Workload

ASSUMED_MFU = 0.4
"""Share of a GPU's peak that is assumed where no rate is given: good runs of large models reach it
(Chowdhery et al., 2022, arXiv:2204.02311, table 3: 46 %)."""

MEASURED_TOKENS = 256
MEASURED_SECONDS = 2.0
MEASURED_VOCABULARY = 8192

PF_DAY = 1e15 * 86_400
"""FLOPs of a day at 10^15 a second (Kaplan et al., 2020, arXiv:2001.08361, section 1.3)."""


@dataclass(frozen=True)
class Rate:
    """Speed of one device."""

    flops: float
    """FLOPs a second, as they are counted here."""
    origin: str
    """given, measured, or N% of the peak."""


def flops_per_token(workload: Workload, config: Any) -> float:
    """FLOPs of training a token: 6 N + 12 L H T (see `presets.flops_per_token`).

    A frozen weight has no gradient, which saves 2 of its 6; activations that are computed again
    cost another forward pass, a third more.
    """
    full = presets.flops_per_token(workload.shape.active, config, round(workload.mean_length))
    frozen = max(0, workload.shape.active - workload.trained) if workload.has_adapter else 0
    recomputed = full / 3 if workload.is_checkpointed else 0.0
    return full - 2.0 * frozen + recomputed


def flops_per_step(workload: Workload, config: Any) -> float:
    """FLOPs of a step over all devices.

    A step of PPO samples each token and computes reference and value once (2 N each), scores it
    with the reward models (2 N of theirs), and trains policy and value model in every epoch.
    """
    training = flops_per_token(workload, config) * workload.tokens_per_step
    if workload.ppo is None:
        return training
    forward = 2.0 * (3 * workload.shape.active + workload.ppo.reward_parameters)
    return 2 * workload.ppo.epochs * training + forward * workload.tokens_per_step


def expected_rate(workload: Workload, tflops: float | None) -> Rate | None:
    """The rate that is given, or one to expect of this GPU; None where neither is known."""
    if tflops is not None:
        return Rate(tflops * 1e12, "given")
    if workload.device == "cuda" and torch.cuda.is_available():
        peak = hardware.peak_flops("cuda")
        if peak is not None:
            return Rate(ASSUMED_MFU * peak, f"{ASSUMED_MFU:.0%} of the peak")
    return None


def measure_rate(workload: Workload, config: Any) -> Rate:
    """Measure steps on this machine, of the model cut to one block and a small vocabulary.

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
    device = hardware.pick_device("cuda" if workload.device == "cuda" else "cpu")
    with hardware.memory_errors():
        model = presets.new_model(small).to(device)
        length = min(workload.length, MEASURED_TOKENS)
        tokens = torch.randint(text.vocab_size, (1, length), device=device)
        seconds = _step_seconds(model, tokens, workload)
    active = presets.active_parameters(model)
    return Rate(presets.flops_per_token(active, text, length) * length / seconds, "measured")


def _step_seconds(model: Any, tokens: torch.Tensor, workload: Workload) -> float:
    """Seconds of a forward and backward pass, the fastest of several: the first ones warm up."""
    device = tokens.device.type
    best, first = float("inf"), time.monotonic()
    while time.monotonic() - first < MEASURED_SECONDS or best == float("inf"):
        started = time.monotonic()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=workload.is_half):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.monotonic() - started)
    return best


@dataclass(frozen=True)
class ParametricLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al., 2022, arXiv:2203.15556, eq. 2)."""

    floor: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Loss in nats a token."""
        return float(self.floor + self.a / parameters**self.alpha + self.b / tokens**self.beta)

    def best_tokens(self, parameters: float) -> float:
        """Compute D for which N is the best size at C = 6 N D.

        N = G (C/6)^(beta/(alpha+beta)), G = (alpha A / beta B)^(1/(alpha+beta)) (eq. 4), solved
        for D = C / 6N.
        """
        total = self.alpha + self.beta
        g = (self.alpha * self.a / (self.beta * self.b)) ** (1 / total)
        product = (parameters / g) ** (total / self.beta)
        return float(product / parameters)


HOFFMANN = ParametricLaw(floor=1.69, a=406.4, b=410.7, alpha=0.34, beta=0.28)
"""As published, approach 3 (eq. 10): rounded, and found not to fit its own data."""
BESIROGLU = ParametricLaw(floor=1.8172, a=482.01, b=2085.43, alpha=0.3478, beta=0.3658)
"""The same law fitted again (Besiroglu et al., 2024, arXiv:2404.10102)."""


def kaplan_loss(parameters: float, tokens: float) -> float:
    """L(N, D) = ((Nc / N)^(aN / aD) + Dc / D)^aD, N without embeddings.

    Kaplan et al., 2020, arXiv:2001.08361, eq. 1.5, with the fit of table 2.
    """
    size = (6.4e13 / parameters) ** (0.076 / 0.103)
    return float((size + 1.8e13 / tokens) ** 0.103)


def kaplan_tokens(parameters: float) -> float:
    """Compute D of a compute-efficient run: N = 1.3e9 C^0.73, D = 2e10 C^0.27, C in PF-days.

    Kaplan et al., 2020, arXiv:2001.08361, table 6; N is without embeddings.
    """
    days = (parameters / 1.3e9) ** (1 / 0.73)
    return float(2e10 * days**0.27)
