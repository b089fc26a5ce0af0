"""Reward modelling: preferences and any model in, a trainer out; and what its result must show.

What a run leaves is loaded again before it counts: a score head that was not saved scores at
random, and nothing else would tell. The chosen halves of a batch come first, the rejected ones
after them, in one forward pass.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import logsigmoid

from llmctl.config.commands.reward import RewardConfig
from llmctl.console import log
from llmctl.data.chat.responses import ResponseFormat
from llmctl.data.preference_pairs import Pairs, PreferenceData
from llmctl.data.tokenized import EncodedSequence
from llmctl.errors import ModelError
from llmctl.models.classifiers import SCORE
from llmctl.reward.model import load_reward_model, needs_token_types, score_batch, score_encoded
from llmctl.runs.directory import Run
from llmctl.training.base_model import Prepared, load_with_head, new_tokens_of, prepare
from llmctl.training.batches import Batch
from llmctl.training.loop import Trainer
from llmctl.training.objective import Loss, Validation, wins
from llmctl.training.reward_report import PairScores, log_report, report

CHECKED = 4
"""Pairs whose scores must be the same once the result is loaded again."""
TOLERANCE = 1e-3
"""Largest change of a score, relative to the largest one, that is rounding."""
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""Keys of a batch that the model is given."""


class ScoredPairRows:
    """N pairs of texts to score as (2B, L) tensors, padded at the right."""

    def __init__(self, pairs: Pairs, pad: int, *, uses_token_types: bool) -> None:
        """Take the pairs; `pad` fills the rest of a row."""
        self.pairs, self.pad, self.uses_token_types = pairs, pad, uses_token_types
        self.lengths: list[int] = pairs.lengths.tolist()
        """(N,) tokens of the longer side of each."""
        self.weights = pairs.weights.astype(np.float64)

    def __len__(self) -> int:
        """N."""
        return len(self.pairs)

    def texts(self, number: int) -> tuple[EncodedSequence, EncodedSequence]:
        """The chosen and the rejected text of a pair."""
        chosen, rejected = (
            EncodedSequence(tokens.tolist(), trained.tolist(), True)
            for tokens, trained in (
                self.pairs.chosen.sequence(number),
                self.pairs.rejected.sequence(number),
            )
        )
        return chosen, rejected

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The model's inputs (2B, L), `margins` and `weights` (B,), `weight` and `tokens`."""
        pairs = [self.texts(number) for number in numbers]
        texts = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
        batch: Batch = dict(score_batch(texts, self.pad, self.uses_token_types))
        batch["margins"] = torch.from_numpy(self.pairs.margins[list(numbers)])
        batch["weights"] = torch.from_numpy(self.pairs.weights[list(numbers)])
        batch["weight"] = float(self.weights[list(numbers)].sum())
        batch["tokens"] = int(batch["attention_mask"].sum())
        return batch


class PairwisePreference:
    """Loss of scores under the model of Bradley and Terry, a mean over pairs by their weights."""

    figures = ("accuracy",)

    def __init__(self, center: float, val: Validation | None) -> None:
        """Take the weight of centering and the validation data."""
        self.center, self.val = center, val

    def loss(self, model: Any, batch: Batch) -> Loss:
        """Sum over the weighted pairs of a batch."""
        chosen, rejected = pair_scores(model, batch)
        correct = wins(chosen.detach() - rejected.detach()).sum()
        sums = torch.stack([correct, correct.new_tensor(len(chosen))])
        total = preference_loss(chosen, rejected, batch["margins"], batch["weights"], self.center)
        return Loss(total, batch["weight"], sums)

    def validate(self, model: Any) -> dict[str, float]:
        """Mean loss, accuracy and difference over every validation pair.

        The loss is that of the preferences alone, without margins and centering.
        """
        assert self.val is not None
        loss, correct, apart, total = self.val.sums(model, _measure).tolist()
        return {
            "val_loss": loss / total,
            "val_accuracy": correct / total,
            "val_margin": apart / total,
        }


def _measure(model: Any, batch: Batch) -> Tensor:
    """(4,) sums over a batch by the pairs' weights: loss, right ones, differences; and weights."""
    chosen, rejected = pair_scores(model, batch)
    weights, apart = batch["weights"], chosen - rejected
    loss = preference_loss(chosen, rejected, weights=weights)
    correct = (weights * wins(apart)).sum()
    return torch.stack([loss, correct, (weights * apart).sum(), weights.sum()])


def prepare_reward(
    config: RewardConfig, data: PreferenceData, accelerator: Accelerator, device: str
) -> Prepared:
    """Load the model with a head that scores, fit it to the tokens, adapt it, arrange the pairs.

    Raises:
        ModelError: a model that does not load, has several labels, or whose score padding changes.
        UserError: sizes or targets that do not go together.
        ResourceError: an optimizer or a precision that does not run here.
    """
    order = data.train.chosen.lengths.argsort()
    shortest, longest = (
        data.train.chosen.sequence(int(number))[0].tolist() for number in order[[0, -1]]
    )
    most = max(int(pairs.lengths.max()) for pairs in (data.train, data.val or data.train))
    model = load_with_head(
        config,
        SCORE,
        data.tokenizer,
        (shortest, longest),
        device,
        longest=most,
        new_tokens=lambda grown: new_tokens_of(grown, data),
        drops=False,  # noise would tell two responses apart that are the same
    )
    model.config.score_at = _score_at(data.response_format)
    if not config.center_rewards:
        _hold_offset(model)
    pad = int(data.tokenizer.pad_token_id)
    types = needs_token_types(model.config, data.response_format)
    train = ScoredPairRows(data.train, pad, uses_token_types=types)
    val = ScoredPairRows(data.val, pad, uses_token_types=types) if data.val else None
    loss = PairwisePreference(config.center_rewards or 0.0, None).loss
    return prepare(
        config, "pairs", model, train, val, accelerator, device, loss=loss, is_classifier=True
    )


def build_reward(
    config: RewardConfig,
    data: PreferenceData,
    prepared: Prepared,
    run: Run,
    accelerator: Accelerator,
    device: str,
) -> Trainer:
    """Put the trainer together."""
    val = prepared.validation(accelerator, device)
    objective = PairwisePreference(config.center_rewards or 0.0, val)
    settings = {"center_rewards": config.center_rewards}
    return prepared.assemble(config, data, run, accelerator, device, objective, settings=settings)


def _score_at(response_format: ResponseFormat) -> str:
    """Token that the head reads, for config.json: of whoever scores with this model."""
    if response_format.is_pair:
        return "first-token"
    has_template = response_format.tokenizer.chat_template is not None
    return "end-of-turn" if has_template else "last-token"


def pair_scores(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and of the rejected texts, (B,) each, in float32."""
    inputs = {name: batch[name] for name in INPUTS if name in batch}
    chosen, rejected = model(**inputs).logits[:, 0].float().chunk(2)
    return chosen, rejected


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    margins: Tensor | float = 0.0,
    weights: Tensor | float = 1.0,
    center: float = 0.0,
) -> Tensor:
    """Summed loss of pairs under the model of Bradley and Terry (1952).

    Each pair's is -log sigmoid(chosen - rejected - margin) (Ouyang et al., 2022, arXiv:2203.02155,
    equation 1; with the margin Touvron et al., 2023, arXiv:2307.09288, equation 2), and
    center * (chosen + rejected)^2 (Eisenstein et al., 2023, arXiv:2312.09244).

    Args:
        chosen: (B,) scores.
        rejected: (B,) scores.
        margins: (B,) by how much they should differ at least.
        weights: (B,) of each pair.
        center: of the second part.
    """
    loss = -logsigmoid(chosen - rejected - margins)
    if center:
        loss = loss + center * (chosen + rejected).square()
    return (weights * loss).sum()


def check_of(
    prepared: Prepared, run: Run, device: str
) -> Callable[[Any], Callable[[dict[str, Any]], dict[str, Any]]]:
    """Return the check of an exported reward model; see `export.Check`.

    The result is loaded again, must score as the trained model did, and is judged on the
    validation pairs. A `ModelError` says by how much its scores differ.
    """
    train = prepared.train
    assert isinstance(train, ScoredPairRows)
    texts = [text for number in range(min(CHECKED, len(train))) for text in train.texts(number)]

    def remember(model: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
        scores = score_encoded(model, texts, train.pad, train.uses_token_types)

        def check(written: dict[str, Any]) -> dict[str, Any]:
            for folder in (path for name, path in written.items() if name in ("model", "adapter")):
                _require_same(Path(folder), texts, scores, device)
            judged = _judge(Path(written["model"]), prepared.val, device)
            run.record(report=judged)
            hidden = ("reliability", "pairs")
            return {"val_" + name: v for name, v in judged.items() if name not in hidden}

        return check

    return remember


def _hold_offset(model: Any) -> None:
    """Freeze the bias of the head: no difference of scores depends on it.

    Its gradient is rounding, which Adam would blow up to steps of the learning rate.
    """
    for name, weight in model.named_parameters():
        if weight.shape == (1,) and name.endswith("bias"):
            weight.requires_grad_(False)


def _require_same(folder: Path, texts: list[EncodedSequence], wanted: Tensor, device: str) -> None:
    """Raise a ModelError for a result that does not score as the model did in training."""
    scores = load_reward_model(str(folder), device=device).score_encoded(texts)
    change = float((scores - wanted).abs().max() / wanted.abs().max().clamp_min(1e-3))
    if not change <= TOLERANCE:
        raise ModelError(
            f"loaded again, this model gives scores that differ by {change:.1%}", file=folder
        )


def _judge(folder: Path, val: Any, device: str) -> dict[str, Any]:
    """The report on the validation pairs, scored by what was written; empty without any."""
    if val is None:
        log.warning("no pair was held out: nothing says how good this reward model is")
        return {}
    assert isinstance(val, ScoredPairRows)
    pairs = val.pairs
    lengths = [
        np.where(side.trained_counts, side.trained_counts, side.lengths).astype(np.float64)
        for side in (pairs.chosen, pairs.rejected)
    ]
    texts = [text for number in range(len(pairs)) for text in val.texts(number)]
    scores = load_reward_model(str(folder), device=device).score_encoded(texts).double().numpy()
    judged = report(
        PairScores(
            scores[::2],
            scores[1::2],
            pairs.weights.astype(np.float64),
            *lengths,
        )
    )
    log_report(judged)
    return judged
