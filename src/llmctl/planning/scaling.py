"""Scaling laws: parameters and tokens in, the loss that they predict and the best tokens out.

N is parameters, D tokens, C = 6 N D FLOPs. Losses are nats a token on the papers' own web text with
their own tokenizers: they compare runs, and tell no one what a small model's loss will be.
"""

from dataclasses import dataclass

PF_DAY = 1e15 * 86_400
"""FLOPs of a day at 10^15 a second (Kaplan et al., 2020, arXiv:2001.08361, section 1.3)."""


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
