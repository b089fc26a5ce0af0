"""Hold all that the loop of PPO works on, and its state beside the weights, for checkpoints."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from llmctl.config.commands.ppo import PpoConfig
from llmctl.decode.loop import best_threads
from llmctl.models.loading import parameter_count
from llmctl.ppo.alarms import Alarms
from llmctl.ppo.encoded_prompts import EncodedPrompts
from llmctl.ppo.episodes import EpisodeTokens, Pass, make_passes
from llmctl.ppo.hyperparameters import CPU_PASS_LOGITS, GPU_PASS_LOGITS
from llmctl.ppo.models import ActorCritic
from llmctl.ppo.rewards import RewardSource, RewardSum
from llmctl.ppo.rollout import RolloutSampler
from llmctl.training.batches import Order
from llmctl.training.hyperparameters import PpoHyperparameters
from llmctl.training.run_state import RunState


@dataclass
class PpoTrainer:
    """Models, rewards and prompts of a run, and its state."""

    config: PpoConfig
    actor_critic: ActorCritic
    optimizers: list[Optimizer]
    rewards: RewardSum
    sampler: RolloutSampler
    prompts: EncodedPrompts
    held_out: EncodedPrompts
    order: Order
    state: RunState
    threads: int
    """CPU threads of training; sampling takes fewer where a model is small."""
    kl_coef: float
    value_source: RewardSource | None
    """The reward model that the value model started from."""
    alarms: Alarms = field(default_factory=Alarms)
    reuses_log_probs: bool = False
    """Whether the sampler's log-probabilities are those of training and need not be recomputed."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Figures of the latest step."""

    @property
    def ppo(self) -> PpoHyperparameters:
        """The hyperparameters that only PPO has."""
        assert self.state.values.ppo is not None
        return self.state.values.ppo

    def passes(
        self, sequences: EpisodeTokens, rows: Sequence[int], mask: Tensor, factor: int = 1
    ) -> Iterator[Pass]:
        """Rows of this rank's episodes in passes of `factor` times the usual tokens and logits."""
        device = self.actor_critic.device
        logits = GPU_PASS_LOGITS if device.type == "cuda" else CPU_PASS_LOGITS
        return make_passes(
            sequences,
            rows,
            max_tokens=factor * self.ppo.pass_tokens,
            max_response_tokens=factor * max(1, logits // self.actor_critic.vocabulary),
            mask=mask,
            device=device,
        )

    def sampling_threads(self, responses: int) -> int:
        """CPU threads to sample a number of responses with."""
        if self.config.threads or self.actor_critic.device.type != "cpu":
            return self.threads
        parameters = parameter_count(self.actor_critic.policy)
        return best_threads(parameters, min(responses, self.sampler.batch_size), self.threads)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes."""
        if self.state.world == 1:
            return tensor
        total = self.state.accelerator.reduce(tensor.to(self.actor_critic.device), "sum")
        return total.to(tensor.device)  # type: ignore[no-any-return]

    def all_gather(self, numbers: Sequence[float]) -> Tensor:
        """Concatenate the numbers of all ranks, in order."""
        tensor = torch.tensor(list(numbers))
        if self.state.world == 1:
            return tensor
        gathered = self.state.accelerator.gather(tensor.to(self.actor_critic.device))
        return gathered.cpu()  # type: ignore[no-any-return]

    def extra_state(self) -> dict[str, Any]:
        """All that decides how the run goes on beside weights and moments; JSON."""
        return {
            "kl_coef": self.kl_coef,
            "rewards": self.rewards.state(),
            "alarms": self.alarms.state(),
            "exact": self.reuses_log_probs,
            "scale": list(self.actor_critic.value_scale),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `extra_state` gave."""
        self.kl_coef, self.reuses_log_probs = state["kl_coef"], state["exact"]
        self.rewards.restore(state["rewards"])
        self.alarms.restore(state["alarms"])
        scale, shift = state["scale"]
        self.actor_critic.value_scale = (scale, shift)
