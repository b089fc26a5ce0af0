"""Score responses with a reward model: a run, a folder or a Hub id in, one number a response out.

The score is the logit at the last token of a text (at the first one for encoders such as BERT) and
depends on nothing else: not on padding, not on what shares a batch. Decoders look for the last
token that is not padding, so a text that holds the padding token is refused. A conversation ends
with its last turn, or with what the chat template writes after it: see `_score_at`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from llmctl.config.sections import ScoreAt
from llmctl.console import log
from llmctl.data.chat.responses import ResponseFormat
from llmctl.data.examples import Example
from llmctl.data.schemas import Message
from llmctl.data.tokenized import EncodedSequence
from llmctl.errors import DataError, ModelError
from llmctl.models.adapters import is_adapter
from llmctl.models.classifiers import (
    SCORE,
    classifier_labels,
    learned_positions,
    load_tuned_classifier,
    logits_of,
    pad_right,
    probe_padding,
)
from llmctl.models.loading import context_size, load_config, load_tokenizer, local_folder
from llmctl.models.vetting import read_object
from llmctl.runs.directory import resolve_model
from llmctl.runs.ownership import MANIFEST, read_json

LONGEST = 2048
"""Tokens of a text at most, where neither the model nor its tokenizer has a limit."""


@dataclass(frozen=True)
class PromptResponse:
    """A prompt and a response to it."""

    prompt: str | list[Message]
    """A text goes on as text; messages go through the chat template."""
    response: str
    ended: bool = True
    """False where the response was cut off: no end-of-turn or EOS token stands after it."""
    tools: list[Any] | None = None
    """JSON schemas of what the assistant may call."""


@dataclass(frozen=True)
class RewardModel:
    """A reward model, and how it reads a prompt and a response."""

    reference: str
    """Run, folder or Hub id, as the user named it."""
    folder: Path
    model: Any
    """PreTrainedModel or PeftModel, in eval mode, on its device."""
    tokenizer: PreTrainedTokenizerBase
    response_format: ResponseFormat
    pad: int
    """Id of the padding token, which no text may hold."""
    max_length: int
    """Tokens that the model was trained on at most, and has positions for."""
    embedding_rows: int
    """Ids below this are the model's."""
    uses_token_types: bool
    """Whether the model is told which tokens are the response's (BERT's token types)."""

    @property
    def score_at(self) -> ScoreAt:
        """Last token of a conversation."""
        return self.response_format.score_at

    @property
    def has_turns(self) -> bool:
        """Whether a prompt that is text was a user's turn in training."""
        return self.tokenizer.chat_template is not None or self.response_format.is_pair

    def encode(self, sample: PromptResponse | Example) -> EncodedSequence:
        """Encode by this model's own tokenizer; `trained` marks the response.

        An example is a whole text, or a conversation whose last message is the response.

        Where it is longer than the model was trained on, the prompt loses its beginning.

        Raises:
            DataError: the response is too long by itself, or holds the padding token.
            ModelError: the chat template refuses the messages.
        """
        if isinstance(sample, Example):
            messages = sample.messages
            response = sample.text or "" if messages is None else str(messages[-1]["content"])
            whole = self.response_format.encode_example(sample, len(messages or ()) - 1)
        else:
            response = sample.response
            whole = self._encode_response(sample)
        encoded = self.response_format.truncate_prompt(whole, len(whole.tokens) - self.max_length)
        text = repr(response[:40])
        if encoded is None:
            raise DataError(
                f"the response {text} has more tokens than the {self.max_length:,} that the "
                f"reward model {self.reference} reads"
            )
        if encoded.tokens and max(encoded.tokens) >= self.embedding_rows:
            raise DataError(
                f"the response {text} has a token id of {max(encoded.tokens):,}, and the reward "
                f"model {self.reference} has only {self.embedding_rows:,} embeddings"
            )
        if not encoded.tokens or self.pad in encoded.tokens:
            what = "the padding token in it" if encoded.tokens else "no tokens"
            raise DataError(f"the response {text} has {what}: it cannot be scored")
        return encoded

    def _encode_response(self, sample: PromptResponse) -> EncodedSequence:
        """Encode a prompt and a response, of whatever length."""
        if isinstance(sample.prompt, str):
            return self.response_format.encode_text(
                sample.prompt, sample.response, ended=sample.ended
            )
        message = {"role": "assistant", "content": sample.response}
        messages = [*sample.prompt, message]
        return self.response_format.encode_conversation(
            messages, len(sample.prompt), sample.tools, ended=sample.ended
        )

    def score(self, samples: Sequence[PromptResponse], *, batch_size: int = 32) -> Tensor:
        """Scores (N,), float32 on the CPU, in the order of the samples.

        Raises:
            DataError: as `encode`.
            ModelError: a score that is not finite.
        """
        texts = [self.encode(sample) for sample in samples]
        return self.score_encoded(texts, batch_size=batch_size)

    def score_encoded(self, texts: Sequence[EncodedSequence], *, batch_size: int = 32) -> Tensor:
        """Score encoded texts; raise a ModelError for a score that is not finite."""
        scores = score_encoded(self.model, texts, self.pad, self.uses_token_types, batch_size)
        if not torch.isfinite(scores).all():
            raise ModelError("this reward model gives a score that is not finite", file=self.folder)
        return scores


def load_reward_model(
    reference: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    base: Any | None = None,
    score_at: ScoreAt | None = None,
) -> RewardModel:
    """The reward model of a run (full or adapter), a folder or a Hub id, in eval mode.

    The `base` below an adapter, where it is loaded already, is not checked again. `score_at` is
    where the score of a conversation stands; None for what the folder records.

    Raises:
        ModelError: no reward model: another head or none, several labels; pickles, tensors that
            are missing, misshapen or not finite; no padding token of its own; or one whose score
            padding changes.
        NetworkError: a Hub id that cannot be had.
    """
    folder = local_folder(resolve_model(reference))
    tokenizer = load_tokenizer(reference)
    if is_adapter(folder):
        _require_score_of_adapter(folder)
        model = load_tuned_classifier(folder, SCORE, dtype, base)
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    else:
        _require_score(load_config(str(folder)), folder)
        model = load_tuned_classifier(folder, SCORE, dtype)
    model = model.to(device).eval()
    shape = model.config
    pad = _padding(tokenizer, shape, folder)
    shape.get_text_config().pad_token_id = pad
    rows = int(model.get_input_embeddings().weight.shape[0])
    if pad >= rows:
        raise ModelError(
            f"the padding token has the id {pad:,}, and the model only {rows:,} embeddings: the "
            "tokenizer is another model's"
        )
    probe_padding(model, pad)
    plain_format = ResponseFormat(tokenizer, shape)
    score_at = score_at or _score_at(folder, plain_format, reference)
    response_format = ResponseFormat(tokenizer, shape, score_at=score_at)
    limits = (context_size(shape), learned_positions(model), int(tokenizer.model_max_length))
    room = min(limit for limit in (*limits, 1 << 40) if limit is not None)
    return RewardModel(
        reference=reference,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        response_format=response_format,
        pad=pad,
        max_length=room if room < 1 << 40 else LONGEST,
        embedding_rows=rows,
        uses_token_types=needs_token_types(shape, response_format),
    )


@torch.no_grad()
def score_encoded(
    model: Any,
    texts: Sequence[EncodedSequence],
    pad: int,
    uses_token_types: bool,
    batch_size: int = 32,
) -> Tensor:
    """Scores (N,) of texts by a model in eval mode, float32 on the CPU, in their order."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index].tokens))
    scores = torch.zeros(len(texts))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = score_batch([texts[index] for index in indices], pad, uses_token_types)
        scores[indices] = logits_of(model, batch)[:, 0].cpu()
    return scores


def score_batch(
    texts: Sequence[EncodedSequence], pad: int, uses_token_types: bool
) -> dict[str, Tensor]:
    """The batch of a reward model: ids and mask (B, L), and token types where it uses them."""
    batch = pad_right([text.tokens for text in texts], pad)
    if uses_token_types:
        batch["token_type_ids"] = pad_right([text.trained for text in texts], 0)["input_ids"].long()
    return batch


def needs_token_types(shape: PreTrainedConfig, response_format: ResponseFormat) -> bool:
    """Whether a model tells two texts apart by their token types."""
    return response_format.is_pair and int(shape.to_dict().get("type_vocab_size") or 0) > 1


def _score_at(folder: Path, response_format: ResponseFormat, reference: str) -> ScoreAt:
    """Where the score of a conversation stands: what the folder records, else the end of the turn.

    A template that writes more after the last turn leaves it open where the model was trained,
    unless llmctl trained it: earlier versions left the template as it was.
    """
    file = folder / "config.json"
    recorded: Any = read_object(file).get("score_at") if file.exists() else None
    if recorded in get_args(ScoreAt):
        return recorded  # type: ignore[no-any-return]
    is_ours = read_json(folder.parent / MANIFEST).get("stage") in ("reward", "merge")
    if not is_ours and (after := response_format.after_turn):
        log.warning(
            "the chat template of %s writes %r after the end of a turn, and nothing says whether "
            "the score stands there: it is read at the end of the turn, as llmctl trains it; for a "
            "model of TRL pass --score-at last-token",
            reference,
            after,
        )
    return "end-of-turn"


def _require_score(shape: PreTrainedConfig, folder: Path) -> None:
    """Raise a ModelError for a model that is no reward model; say what it is."""
    labels = classifier_labels(shape)
    hint = "train one: llmctl reward --model BASE --data preferences.jsonl -o runs/reward"
    if labels is None:
        kind = (shape.architectures or [shape.model_type])[0]
        raise ModelError(f"no reward model: {kind} has no head that scores", file=folder, hint=hint)
    if len(labels) != 1:
        raise ModelError(
            f"no reward model: it tells {len(labels)} labels apart ({', '.join(labels[:4])})",
            file=folder,
            hint=hint,
        )


def _require_score_of_adapter(folder: Path) -> None:
    """Check the model's configuration beside an adapter, where there is one."""
    if (folder / "config.json").exists():
        shape = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if classifier_labels(shape) is not None:
            _require_score(shape, folder)


def _padding(tokenizer: PreTrainedTokenizerBase, shape: PreTrainedConfig, folder: Path) -> int:
    """The padding token that the model was trained with.

    Raises:
        ModelError: there is none, or it also ends texts: they would be scored before their end.
    """
    text = shape.get_text_config()
    pad = tokenizer.pad_token_id if text.pad_token_id is None else text.pad_token_id
    if pad is None:
        raise ModelError("no padding token: texts of several lengths cannot be scored", file=folder)
    ends = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
    if pad in (tokenizer.eos_token_id, *ends):
        name = tokenizer.convert_ids_to_tokens(pad)
        raise ModelError(
            f"the padding token {name} also ends texts: their ends would not be scored",
            file=folder,
            hint="give it a padding token of its own, or train it with llmctl reward",
        )
    return int(pad)
