"""What the loop of PPO works on, and what of it a checkpoint must hold beside the weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from llmctl.config.commands import PpoConfig
from llmctl.data.prompts import PromptRow
from llmctl.decode.loop import best_threads
from llmctl.models.loading import parameter_count
from llmctl.ppo.alarms import Alarms
from llmctl.ppo.hyperparameters import CPU_PASS_LOGITS, GPU_PASS_LOGITS
from llmctl.ppo.models import Actors
from llmctl.ppo.rewards import Rewards, Source
from llmctl.ppo.rollout import Sampler
from llmctl.ppo.rules import Told
from llmctl.training.batches import Order
from llmctl.training.hyperparameters import Hyperparameters, PpoHyperparameters
from llmctl.training.run_state import RunState


@dataclass(frozen=True)
class Asked:
    """Prompts as rows and as tokens."""

    rows: Sequence[PromptRow]
    tokens: Sequence[list[int]]
    rewarded: Sequence[Any]
    """As rewards see them: text, or a list of messages."""

    def __len__(self) -> int:
        """How many."""
        return len(self.rows)

    def told(self, number: int, response: str) -> Told:
        """What a reward is told of a response to a prompt."""
        row = self.rows[number]
        return Told(self.rewarded[number], response, row.answer, row.name)


@dataclass
class PpoTrainer:
    """The models, the rewards and the prompts, and the job that they are for."""

    config: PpoConfig
    hyperparameters: Hyperparameters
    actors: Actors
    optimizers: list[Optimizer]
    rewards: Rewards
    sampler: Sampler
    asked: Asked
    held_out: Asked
    order: Order
    state: RunState
    threads: int
    """Of training; sampling takes fewer where a model is small."""
    kl_coef: float
    value_source: Source | None
    """The reward model that the value model started from."""
    alarms: Alarms = field(default_factory=Alarms)
    exact: bool = False
    """Whether the sampler's log-probabilities are those of training, so that they need not be
    computed again."""
    latest: dict[str, Any] = field(default_factory=dict)
    """Metrics of the step just done."""

    @property
    def ppo(self) -> PpoHyperparameters:
        """The hyperparameters that only PPO has."""
        assert self.hyperparameters.ppo is not None
        return self.hyperparameters.ppo

    def total(self, found: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.state.world == 1:
            return found
        summed = self.state.accelerator.reduce(found.to(self.actors.device), "sum")
        return summed.to(found.device)  # type: ignore[no-any-return]

    @property
    def most_chosen(self) -> int:
        """Response tokens of a forward and backward pass at most, for their logits."""
        logits = GPU_PASS_LOGITS if self.actors.device.type == "cuda" else CPU_PASS_LOGITS
        return max(1, logits // self.actors.vocabulary)

    def sampling_threads(self, rows: int) -> int:
        """CPU threads to sample so many responses with."""
        if self.config.threads or self.actors.device.type != "cpu":
            return self.threads
        parameters = parameter_count(self.actors.policy)
        return best_threads(parameters, min(rows, self.sampler.batch_size), self.threads)

    def extra_state(self) -> dict[str, Any]:
        """What decides how the run goes on, beside weights and moments; JSON."""
        return {
            "kl_coef": self.kl_coef,
            "rewards": self.rewards.state(),
            "alarms": self.alarms.state(),
            "exact": self.exact,
            "scale": list(self.actors.scale),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what `extra_state` took."""
        self.kl_coef, self.exact = state["kl_coef"], state["exact"]
        self.rewards.restore(state["rewards"])
        self.alarms.restore(state["alarms"])
        factor, shift = state["scale"]
        self.actors.scale = (factor, shift)

    def gathered(self, numbers: Sequence[float]) -> Tensor:
        """This rank's numbers, followed by those of the others in order."""
        mine = torch.tensor(list(numbers))
        if self.state.world == 1:
            return mine
        found = self.state.accelerator.gather(mine.to(self.actors.device))
        return found.cpu()  # type: ignore[no-any-return]
