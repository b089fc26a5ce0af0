"""Score responses with a reward model: a run, a folder or a Hub id in, one number a response out.

The score is the logit at the last token of a text (at the first one for encoders such as BERT) and
depends on nothing else: not on padding, not on what shares a batch. Decoders look for the last
token that is not padding, so a text that holds the padding token is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from llmctl.data.chat.responses import ResponseFormat
from llmctl.data.schemas import Message
from llmctl.data.tokenized import EncodedSequence
from llmctl.errors import DataError, ModelError
from llmctl.models.adapters import is_adapter, put_adapter, read_adapter, require_base
from llmctl.models.classifiers import (
    SCORE,
    classifier_labels,
    learned_positions,
    load_classifier,
    logits_of,
    pad_right,
    require_padding_unseen,
)
from llmctl.models.loading import context_size, find_base, load_config, load_tokenizer, local_folder
from llmctl.runs.directory import resolve_model

LONGEST = 2048
"""Tokens of a text at most, where neither the model nor its tokenizer has a limit."""
PROBE_LENGTHS = (3, 8)
"""Tokens of the texts on which padding is seen to change nothing."""


@dataclass(frozen=True)
class Exchange:
    """A prompt and a response to it."""

    prompt: str | list[Message]
    """A text goes on as text; messages go through the chat template."""
    response: str
    ended: bool = True
    """False where the response was cut off: no end-of-turn or EOS token stands after it."""


@dataclass(frozen=True)
class RewardModel:
    """A model that gives an exchange one number, and how it reads it."""

    reference: str
    """As it was given."""
    folder: Path
    model: Any
    """PreTrainedModel or PeftModel, in eval mode, on its device."""
    tokenizer: PreTrainedTokenizerBase
    written: ResponseFormat
    pad: int
    """Id of the padding token, which no text may hold."""
    max_length: int
    """Tokens that the model was trained on at most, and has positions for."""
    embedding_rows: int
    """Ids below this are the model's."""
    takes_types: bool
    """Whether the model is told which tokens are the response's (BERT's token types)."""

    @property
    def has_turns(self) -> bool:
        """Whether a prompt that is text was a user's turn in training."""
        return self.tokenizer.chat_template is not None or self.written.is_pair

    def encode(self, exchange: Exchange) -> list[int]:
        """Tokens of an exchange by this model's own tokenizer.

        Where it is longer than the model was trained on, the prompt loses its beginning.

        Raises:
            DataError: the response is too long by itself, or holds the padding token.
            ModelError: the chat template refuses the messages.
        """
        return self.encoded(exchange).tokens

    def score(self, exchanges: Sequence[Exchange], *, batch_size: int = 32) -> Tensor:
        """Scores (N,), float32 on the CPU, in the order of the exchanges.

        Raises:
            DataError: as `encode`.
            ModelError: a score that is not finite.
        """
        texts = [self.encoded(exchange) for exchange in exchanges]
        return self.score_encoded(texts, batch_size=batch_size)

    def score_encoded(self, texts: Sequence[EncodedSequence], *, batch_size: int = 32) -> Tensor:
        """The same for texts that are encoded already.

        Raises:
            ModelError: a score that is not finite.
        """
        scores = score_encoded(self.model, texts, self.pad, self.takes_types, batch_size)
        if not torch.isfinite(scores).all():
            raise ModelError("this reward model gives a score that is not finite", file=self.folder)
        return scores

    def encoded(self, exchange: Exchange) -> EncodedSequence:
        """The same with where the response stands."""
        if isinstance(exchange.prompt, str):
            whole = self.written.encode_text(
                exchange.prompt, exchange.response, ended=exchange.ended
            )
        else:
            said = {"role": "assistant", "content": exchange.response}
            whole = self.written.encode_conversation(
                [*exchange.prompt, said], len(exchange.prompt), ended=exchange.ended
            )
        found = self.written.truncate_prompt(whole, len(whole.tokens) - self.max_length)
        shown = repr(exchange.response[:40])
        if found is None:
            raise DataError(
                f"the response {shown} has more tokens than the {self.max_length:,} that the "
                f"reward model {self.reference} reads"
            )
        if found.tokens and max(found.tokens) >= self.embedding_rows:
            raise DataError(
                f"the response {shown} has a token id of {max(found.tokens):,}, and the reward "
                f"model {self.reference} has only {self.embedding_rows:,} embeddings"
            )
        if not found.tokens or self.pad in found.tokens:
            what = "the padding token in it" if found.tokens else "no tokens"
            raise DataError(f"the response {shown} has {what}: it cannot be scored")
        return found


def load_reward_model(
    reference: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    under: Any | None = None,
) -> RewardModel:
    """The reward model of a run (full or adapter), a folder or a Hub id, in eval mode.

    Args:
        reference: which one.
        device: where to.
        dtype: of its weights.
        under: the classifier below an adapter, where it is loaded already; it is checked by nobody.

    Raises:
        ModelError: no reward model: another head or none, several labels; pickles, tensors that
            are missing, misshapen or not finite; no padding token of its own; or one whose score
            padding changes.
        NetworkError: a Hub id that cannot be had.
    """
    folder = local_folder(resolve_model(reference))
    tokenizer = load_tokenizer(reference)
    model: Any
    if is_adapter(folder):
        adapter = read_adapter(folder)
        if under is None:
            below = find_base(adapter)
            require_base(adapter, below)
            under = load_classifier(str(below), SCORE, dtype).model
        _require_score_of_adapter(folder)
        under.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        model = put_adapter(under, adapter, "SEQ_CLS")
    else:
        _require_score(load_config(str(folder)), folder)
        model = load_classifier(str(folder), SCORE, dtype).model
    model = model.to(device).eval()
    shape = model.config
    pad = _padding(tokenizer, shape, folder)
    shape.get_text_config().pad_token_id = pad
    rows = int(model.get_input_embeddings().weight.shape[0])
    _check_padding(model, pad, rows)
    written = ResponseFormat(tokenizer, shape)
    limits = (context_size(shape), learned_positions(model), int(tokenizer.model_max_length))
    room = min(limit for limit in (*limits, 1 << 40) if limit is not None)
    return RewardModel(
        reference=reference,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        written=written,
        pad=pad,
        max_length=room if room < 1 << 40 else LONGEST,
        embedding_rows=rows,
        takes_types=has_types(shape, written),
    )


@torch.no_grad()
def score_encoded(
    model: Any, texts: Sequence[EncodedSequence], pad: int, takes_types: bool, batch_size: int = 32
) -> Tensor:
    """Scores (N,) of texts by a model in eval mode, float32 on the CPU, in their order."""
    order = sorted(range(len(texts)), key=lambda place: len(texts[place].tokens))
    scores = torch.zeros(len(texts))
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        batch = score_batch([texts[place] for place in some], pad, takes_types)
        scores[some] = logits_of(model, batch)[:, 0].cpu()
    return scores


def score_batch(texts: Sequence[EncodedSequence], pad: int, takes_types: bool) -> dict[str, Tensor]:
    """What a reward model is given: ids and mask (B, L), and token types where it takes them."""
    batch = pad_right([text.tokens for text in texts], pad)
    if takes_types:
        batch["token_type_ids"] = pad_right([text.trained for text in texts], 0)["input_ids"].long()
    return batch


def has_types(shape: PreTrainedConfig, written: ResponseFormat) -> bool:
    """Whether a model tells two texts apart by their token types."""
    return written.is_pair and int(shape.to_dict().get("type_vocab_size") or 0) > 1


def _require_score(shape: PreTrainedConfig, folder: Path) -> None:
    """Refuse a model that is no reward model.

    Raises:
        ModelError: saying what it is.
    """
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
    """The same for an adapter, whose model's configuration may stand beside it."""
    if (folder / "config.json").exists():
        shape = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if classifier_labels(shape) is not None:
            _require_score(shape, folder)


def _padding(tokenizer: PreTrainedTokenizerBase, shape: PreTrainedConfig, folder: Path) -> int:
    """The padding token that was decided on in training.

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


def _check_padding(model: Any, pad: int, rows: int) -> None:
    if pad >= rows:
        raise ModelError(
            f"the padding token has the id {pad:,}, and the model only {rows:,} embeddings: the "
            "tokenizer is another model's"
        )
    tokens = [number for number in range(min(rows, 2 * max(PROBE_LENGTHS) + 2)) if number != pad]
    short, long = (tokens[-length:] for length in PROBE_LENGTHS)
    require_padding_unseen(model, short, long, pad)
