"""Direct preference optimisation: pairs of responses and a language model in, a trainer out.

A batch of B pairs is 2B sequences in one forward pass: the chosen ones, then the rejected ones.

The reference is the model that the run began with: the base below an adapter where there is one,
else log-probabilities that are computed before anything is trained or restored. Either way there
is no second model.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import logsigmoid

from llmctl.config.commands.dpo import DpoConfig, PairLoss
from llmctl.console import log
from llmctl.data.preference_pairs import Pairs, PreferenceData
from llmctl.data.tokenized import Tokenized
from llmctl.errors import ModelError
from llmctl.models.adapters import is_adapted
from llmctl.runs.directory import Run
from llmctl.training.base_model import (
    Prepared,
    load_in,
    load_language_model,
    prepare,
    require_prompts,
    without_dropout,
)
from llmctl.training.batches import IGNORED, Batch, SequenceRows, on_device, validation_shares
from llmctl.training.distributed import autocast
from llmctl.training.fault_tolerance import together
from llmctl.training.loop import Trainer
from llmctl.training.model_checks import require_causal
from llmctl.training.objective import Loss, Validation
from llmctl.training.samples import TextSampler, prompts_of
from llmctl.training.state import generators_kept
from llmctl.training.token_loss import TokenLoss, require_chunkable, token_loss_of

FALLS = 3
FALLEN = -0.05
"""Measurements in a row, and nats a token, after which chosen responses have grown unlikely."""
ROUNDING = {"fp32": 1e-5}
COARSE_ROUNDING = 2e-2
"""Change of a log-probability, relative to the largest, that is rounding."""
PAIRED = ("numbers", "weights", "counts")
"""Keys of a batch of pairs that a batch of sequences lacks."""


@dataclass(frozen=True)
class DpoLoss:
    """The loss of a pair."""

    loss: PairLoss
    beta: float
    label_smoothing: float = 0.0

    def rewards(self, gains: Tensor, counts: Tensor) -> Tensor:
        """Implicit rewards: beta times what the loss compares.

        That is log pi(y|x) - log pi_ref(y|x), summed over the tokens of a response for sigmoid
        (Rafailov et al., 2023, arXiv:2305.18290, section 5.1). For ipo it is their mean: the paper
        does not speak of lengths, and its authors told TRL's that their results are of the mean.

        `gains` are log pi - log pi_ref of whole responses, `counts` the tokens of each.
        """
        compared = gains / counts.clamp_min(1) if self.loss == "ipo" else gains
        return self.beta * compared

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The loss of each pair from its rewards, of any shape.

        sigmoid: -(1 - e) log sigmoid(m) - e log sigmoid(-m) for the margin m and label smoothing e.
        At e = 0 this is DPO's (Rafailov et al., 2023, arXiv:2305.18290, equation 7), else the
        conservative one (Mitchell, 2023, A note on DPO with noisy preferences, equation 3).
        ipo: (m / beta - 1 / (2 beta))^2 (Azar et al., 2023, arXiv:2310.12036, equation 17).
        """
        margin = chosen - rejected
        match self.loss:
            case "sigmoid":
                right = -(1 - self.label_smoothing) * logsigmoid(margin)
                return right - self.label_smoothing * logsigmoid(-margin)
            case "ipo":
                return (margin / self.beta - 1 / (2 * self.beta)).square()


class ComparedPairRows:
    """N pairs as batches of sequences, padded at the right."""

    def __init__(self, pairs: Pairs, pad: int) -> None:
        """Take the pairs; `pad` fills the rest of a row."""
        self._sequences = SequenceRows(_one_after_the_other(pairs.chosen, pairs.rejected), pad)
        self.lengths: list[int] = pairs.lengths.tolist()
        """(N,) tokens of the longer side of each."""
        self.weights = pairs.weights.astype(np.float64)

    def __len__(self) -> int:
        """N."""
        return len(self.lengths)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """`SequenceRows.batch` of the 2B sequences, `counts` (2B,) of their tokens that count,
        and `numbers` and `weights` (B,) of the pairs, which add up to `weight`.
        """
        batch = self._sequences.batch([*numbers, *(len(self) + number for number in numbers)])
        batch["counts"] = (batch["labels"][:, 1:] != IGNORED).sum(1)
        batch["numbers"] = torch.tensor(list(numbers))
        batch["weights"] = torch.from_numpy(self.weights[list(numbers)])
        batch["weight"] = float(self.weights[list(numbers)].sum())
        return batch


class DirectPreference:
    """Loss of implicit rewards, a mean over pairs by their weights."""

    figures = (
        *("reward_accuracy", "reward_margin", "chosen_logprob", "rejected_logprob"),
        "chosen_gain",
    )

    def __init__(
        self,
        pair_loss: DpoLoss,
        token_loss: TokenLoss,
        model: Any,
        train: ComparedPairRows,
        val: ComparedPairRows | None,
        validation: Validation | None,
    ) -> None:
        """Take the losses, and the model that they are for, not wrapped yet."""
        self.pair_loss, self.token_loss, self.model = pair_loss, token_loss, model
        self.train, self.val, self.validation = train, val, validation
        self._reference_of: dict[str, Tensor] = {}
        """(N, 2) log-probabilities by the reference, of `train` and `val` where they are known."""
        self._gains: list[float] = [0.0]
        self._has_warned = False

    def loss(self, model: Any, batch: Batch) -> Loss:
        """Sum over the weighted pairs of a batch."""
        losses, sums, balance = self._compare(model, batch, "train")
        total = (losses * batch["weights"]).sum().float()
        return Loss(total, batch["weight"], sums, balance)

    def validate(self, model: Any) -> dict[str, float]:
        """Mean loss over the weighted validation pairs, and means over all of them."""
        assert self.validation is not None
        loss, weight, *sums, pairs = self.validation.sums(model, self._measure).tolist()
        named = zip(self.figures, sums, strict=True)
        metrics = {"val_loss": loss / weight, **{f"val_{k}": v / pairs for k, v in named}}
        self._warn_of_displacement(metrics["val_chosen_gain"])
        return metrics

    def watch(self, figures: dict[str, float]) -> None:
        """Look at the figures of training where nothing is held out."""
        if self.validation is None:
            self._warn_of_displacement(figures["chosen_gain"])

    @torch.no_grad()
    def measure_reference(
        self, model: Any, accelerator: Accelerator, batch_size: int, device: str, precision: str
    ) -> None:
        """Let the reference read all pairs whose log-probabilities are to be known. Collective.

        Before anything is trained or restored; with an adapter that is the validation data, since
        the base below it can be asked at any time.
        """
        sets = {"train": None if is_adapted(self.model) else self.train, "val": self.val}
        rank, world = accelerator.process_index, accelerator.num_processes
        for name, pairs in sets.items():
            if pairs is None:
                continue
            log_probs = torch.zeros(len(pairs), 2, dtype=torch.float64, device=device)
            with generators_kept(), self._base_alone(), autocast(precision, device):
                for numbers, counts in validation_shares(pairs.lengths, batch_size, rank, world):
                    batch = on_device(pairs.batch(numbers), device)
                    own, _ = log_probabilities(model, self.token_loss, batch)
                    if counts:
                        log_probs[numbers] = own.view(2, -1).T
            self._reference_of[name] = accelerator.reduce(log_probs, "sum")

    @torch.no_grad()
    def require_sound(self, model: Any, device: str, precision: str) -> None:
        """Before any step the model is its own reference: every implicit reward is 0.

        Raises:
            ModelError: it is not.
            UserError: the loss cannot be chunked.
        """
        longest = max(range(len(self.train)), key=self.train.lengths.__getitem__)
        batch = on_device(self.train.batch([longest]), device)
        model.train()
        with generators_kept(), autocast(precision, device):
            if self.token_loss.chunked:
                rows = {name: value for name, value in batch.items() if name not in PAIRED}
                require_chunkable(model, self.token_loss, rows)
            reference = self._reference(model, batch, "train")
            own, _ = log_probabilities(model, self.token_loss, batch)
        change = float((own - reference).abs().max() / reference.abs().max().clamp_min(1e-6))
        if not change <= ROUNDING.get(precision, COARSE_ROUNDING):
            raise ModelError(
                f"before any step the model differs from itself as reference by {change:.2%} of a "
                "log-probability: it computes with noise",
                hint="set what is random in its config.json to 0, such as dropout or router jitter",
            )

    def _compare(self, model: Any, batch: Batch, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """Losses (B,) of a batch, sums of the figures and of pairs, and the balancing loss."""
        reference = self._reference(model, batch, name)
        own, balance = log_probabilities(model, self.token_loss, batch)
        gains, counts = own - reference, batch["counts"]
        chosen, rejected = self.pair_loss.rewards(gains, counts).chunk(2)
        margin, said = (chosen - rejected).detach(), own.detach()
        pairs = len(margin)
        sums = (
            (margin > 0).sum(),
            margin.sum(),
            said[:pairs].sum(),
            said[pairs:].sum(),
            (gains.detach() / counts.clamp_min(1))[:pairs].sum(),
            margin.new_tensor(pairs),
        )
        losses = self.pair_loss.losses(chosen, rejected)
        return losses, torch.stack([part.double() for part in sums]), balance

    def _reference(self, model: Any, batch: Batch, name: str) -> Tensor:
        """Log-probabilities (2B,) by the reference: known, or those of the base below the adapter.

        Before the model's own pass: switching the adapter also switches its gradients.
        """
        if name in self._reference_of:
            return self._reference_of[name][batch["numbers"]].T.flatten()
        with torch.no_grad(), self._base_alone():
            return log_probabilities(self.model, self.token_loss, batch)[0]

    def _base_alone(self) -> AbstractContextManager[Any]:
        """The base without its adapter; the model itself where there is none."""
        if not is_adapted(self.model):
            return nullcontext()
        alone: AbstractContextManager[Any] = self.model.disable_adapter()
        return alone

    def _measure(self, model: Any, batch: Batch) -> Tensor:
        """Summed loss of a batch, its weight, and the sums of its figures."""
        losses, sums, _ = self._compare(model, batch, "val")
        weights = batch["weights"]
        loss = (losses * weights).sum()
        return torch.cat([torch.stack([loss, weights.sum()]).double(), sums])

    def _warn_of_displacement(self, gain: float) -> None:
        """Say once where the chosen responses grow less likely, too."""
        self._gains.append(gain)
        if is_displaced(self._gains) and not self._has_warned:
            self._has_warned = True
            log.warning(
                "the chosen responses grow less likely too, by %.2g nats a token so far: lower "
                "--lr, raise --beta, or fine-tune on them first (llmctl sft)",
                -gain,
            )


def prepare_dpo(
    config: DpoConfig, data: PreferenceData, accelerator: Accelerator, device: str
) -> Prepared:
    """Load the model, fit it to the tokens, adapt it, arrange the pairs.

    Raises:
        ModelError: the model does not load, is an adapter, or no causal language model.
        UserError: sizes or targets that do not go together.
        ResourceError: an optimizer or a precision that does not run here.
    """
    require_prompts(config, data.val, "pairs")
    model, stops = load_language_model(config, data, device)
    without_dropout(model)
    pad = data.tokenizer.pad_token_id or 0
    train = ComparedPairRows(data.train, pad)
    val = None if data.val is None else ComparedPairRows(data.val, pad)

    def loss(copied: Any, batch: Batch) -> Loss:  # without a reference, which takes as much memory
        token_loss = token_loss_of(copied, chunked=config.chunked_loss)
        return Loss(log_probabilities(copied, token_loss, batch)[0].sum(), batch["weight"])

    def check() -> None:
        require_causal(model, data.embedding_rows)

    return prepare(
        config, "pairs", model, train, val, accelerator, device, loss=loss, check=check, stops=stops
    )


def build_dpo(
    config: DpoConfig,
    data: PreferenceData,
    prepared: Prepared,
    run: Run,
    accelerator: Accelerator,
    device: str,
) -> Trainer:
    """Put the trainer together, and let the reference read the pairs. Collective.

    Raises:
        UserError: a loss that cannot be chunked.
        ModelError: the model has no output layer, or differs from itself as reference.
    """
    model, values = prepared.model, prepared.hyperparameters
    train, val = prepared.train, prepared.val
    assert isinstance(train, ComparedPairRows)
    assert val is None or isinstance(val, ComparedPairRows)
    validation = prepared.validation(accelerator, device)
    token_loss = token_loss_of(model, chunked=config.chunked_loss)
    pair_loss = DpoLoss(config.loss, config.beta, config.label_smoothing)
    objective = DirectPreference(pair_loss, token_loss, model, train, val, validation)
    first = [pair.chosen for pair in data.preferences.train]
    prompts = prompts_of(config, data.response_format.chat, first, data.val_prompts())
    stops = prepared.stops
    trainer = prepared.assemble(
        config,
        data,
        run,
        accelerator,
        device,
        objective,
        settings={
            "loss": config.loss,
            "beta": config.beta,
            "label_smoothing": config.label_smoothing,
            "chunked_loss": config.chunked_loss,
            "load_in": load_in(config),
        },
        sample=TextSampler(config, prompts, data.tokenizer, model, stops, run, accelerator).write,
        watch=objective.watch,
    )
    objective.measure_reference(
        trainer.bare_model, accelerator, values.batch_size, device, values.precision
    )
    with together(accelerator):
        objective.require_sound(trainer.bare_model, device, values.precision)
    return trainer


def log_probabilities(
    model: Any, token_loss: TokenLoss, batch: Batch
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (2B,) of responses after their prompts, float64, and the balancing loss."""
    rows = {name: value for name, value in batch.items() if name not in PAIRED}
    tokens = token_loss(model, rows)
    count, length = batch["labels"].shape
    # places differ, so nothing is added in an order that varies, as index_add does on a GPU
    spread = tokens.losses.new_zeros(count * (length - 1)).index_put(
        (batch["places"],), tokens.losses
    )
    return -spread.view(count, -1).double().sum(1), tokens.balance


def is_displaced(gains: Sequence[float]) -> bool:
    """Whether the chosen responses have grown less likely for some time.

    The loss sees the difference of two responses alone, and both may fall (Razin et al., 2024,
    arXiv:2410.08847).

    `gains` are those of the chosen ones over the reference, in nats a token, one after another.
    """
    last = gains[-FALLS - 1 :]
    falls = len(last) > FALLS and all(after < before for before, after in pairwise(last))
    return falls and last[-1] < FALLEN


def _one_after_the_other(first: Tokenized, second: Tokenized) -> Tokenized:
    """The sequences of both."""
    return Tokenized(
        np.concatenate([first.tokens, second.tokens]),
        np.concatenate([first.starts, first.starts[-1] + second.starts[1:]]),
        np.concatenate([first.trained, second.trained]),
        np.concatenate([first.full_lengths, second.full_lengths]),
        np.concatenate([first.ends, second.ends]),
        np.concatenate([first.rows, second.rows]),
    )
