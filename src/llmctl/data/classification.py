"""Load labelled texts for sequence classification.

In: the names of `--data`. Out: `ClassificationData`, encoded texts with the numbers of their
labels, which are the model's own or those of the data. A text becomes the tokens of
`tokenizer(text)`, special ones included, since users of the classifier will encode so; but text
that spells a special token is text.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from llmctl.config.commands.sft import SftConfig
from llmctl.console import log
from llmctl.data.audit.rules import RowRules
from llmctl.data.bad_rows import BadRows
from llmctl.data.examples import Example
from llmctl.data.split import (
    Split,
    count_duplicates,
    count_shared_prompts,
    find_overlap,
    read_split,
)
from llmctl.data.tokenized import FlatTokens, resolve_max_length
from llmctl.data.tokenizer.train import PAD
from llmctl.errors import DataError, ModelError
from llmctl.models.classifiers import classifier_labels
from llmctl.models.loading import load_config, load_tokenizer
from llmctl.numbers import counted

SHOWN = 8
"""Labels that a line names."""
IMBALANCED = 10
"""Ratio of the largest class to the smallest above which a warning is due."""
BATCH = 1000
"""Texts that the tokenizer gets at a time."""


def resolve_labels(
    train: Sequence[Example], val: Sequence[Example], shape: PreTrainedConfig
) -> tuple[str, ...]:
    """Number the labels: the model's own, or those of training, sorted (whole numbers by value).

    Raises:
        DataError: a single class, or one that does not train.
        ModelError: a classifier that does not know a label.
    """
    first = {_label(example): example for example in reversed(train)}
    if len(first) < 2:
        raise DataError(
            f"every text has the label `{next(iter(first))}`: there is nothing to tell apart",
            file=train[0].place,
            hint="two labels are the least",
        )
    for example in val:
        if _label(example) not in first:
            raise DataError(
                f"label `{_label(example)}` is in the validation data, and not in training",
                file=example.place,
                line=example.line,
                hint="add texts that have it, or leave them out; --val-size 0 holds out none",
            )
    known = classifier_labels(shape)
    if known is None:
        numeric = all(label.removeprefix("-").isdecimal() for label in first)
        return tuple(sorted(first, key=int)) if numeric else tuple(sorted(first))
    for label, example in first.items():
        if label not in known:
            raise ModelError(
                f"label `{label}` ({example.name}) is none of the model's: {list_labels(known)}",
                hint="rename the labels of the data, or start from a model without a classifier",
            )
    return known


def _label(example: Example) -> str:
    assert example.label is not None
    return example.label


def list_labels(names: Sequence[str]) -> str:
    """List labels in a line, the first few of many."""
    rest = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest


@dataclass(frozen=True)
class EncodedTexts(FlatTokens):
    """Texts and their classes."""

    classes: NDArray[np.int64]
    """(N,) label number of each text."""
    cut: int
    """Texts that lost their end."""

    def text(self, number: int) -> NDArray[np.int32]:
        """Tokens of one text."""
        return self.tokens[self.starts[number] : self.starts[number + 1]]

    def digest(self) -> str:
        """Hex sha256 of all that training depends on."""
        parts = (self.tokens, self.starts, self.classes)
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


@dataclass(frozen=True)
class ClassificationData:
    """Labelled texts, encoded for one model."""

    train: EncodedTexts
    val: EncodedTexts | None
    labels: tuple[str, ...]
    """Labels by number."""
    tokenizer: PreTrainedTokenizerBase
    """With a padding token that no text holds."""
    max_length: int
    split: Split[Example]
    dropped: int
    """Texts left out for their length."""
    bad: BadRows
    """Rows left out for their errors."""

    def statistics(self) -> dict[str, Any]:
        """Statistics for the manifest."""
        counts = np.bincount(self.train.classes, minlength=len(self.labels))
        examples = [*self.split.train, *self.split.val]
        labels = Counter(
            text for text, _ in {(example.text, example.label) for example in examples}
        )
        return {
            "rows": len(examples),
            "train_rows": len(self.train),
            "classes": dict(zip(self.labels, counts.tolist(), strict=True)),
            "tokens_median": float(np.median(self.train.lengths)),
            "tokens_max": int(self.train.lengths.max()),
            "truncated": self.train.cut / len(self.train),
            "dropped": self.dropped,
            "skipped": self.bad.count,
            "duplicates": count_duplicates(examples),
            "ambiguous": sum(count > 1 for count in labels.values()),
            "shared_texts": count_shared_prompts(self.split.train, self.split.val),
        }


def load_classification_data(config: SftConfig) -> ClassificationData:
    """Read, split, check and encode the texts.

    Raises:
        DataError: rows that are broken, a single class, a label that is in the validation data
            only, a text that both train and validate, or tokens that the model does not have.
        ModelError: no tokenizer, or a classifier whose own labels are others.
        UserError: more positions asked for than the model has.
    """
    shape, tokenizer = load_config(config.model), load_tokenizer(config.model)
    max_length = resolve_max_length(config.max_length, shape, tokenizer=tokenizer)
    configure_padding(tokenizer, max_length)
    bad = BadRows(config.skip_bad_rows)
    split = read_split(config, config.data, config.seed, bad, "classify")
    bad.report()
    _require_apart(split)
    drop = config.truncation == "drop"
    train, dropped = _encode(tokenizer, split.train, max_length, drop=drop)
    val, _ = _encode(tokenizer, split.val, max_length, drop=drop)
    rules = RowRules(tokenizer)
    for example, tokens, _ in (*train, *val):
        rules.see([example.text or ""], example.place, example.line, [tokens])
    rules.enforce()
    _require_embeddings([*train, *val], int(shape.get_text_config().vocab_size))
    labels = resolve_labels([example for example, _, _ in train], split.val, shape)
    return ClassificationData(
        _collect(train, labels),
        _collect(val, labels) if val else None,
        labels,
        tokenizer,
        max_length,
        split,
        dropped,
        bad,
    )


def configure_padding(tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Give the tokenizer a padding token of its own, and cut and pad at the end.

    Decoders classify at the last token that is not padding, without a look at the mask: where a
    text ends with the padding token, they would classify at another.
    """
    names = ("eos_token", "bos_token", "unk_token", "sep_token", "cls_token")
    others = {getattr(tokenizer, name) for name in names}
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if tokenizer.pad_token in others or tokenizer.pad_token not in special:
        tokenizer.add_special_tokens({"pad_token": PAD})
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = max_length


def log_classification_data(data: ClassificationData) -> None:
    """Log size and lengths in two lines, and warn of oddities."""
    statistics = data.statistics()
    counts: Counter[str] = Counter(statistics["classes"])
    log.info(
        "%s in %s to train on: %s; %s to validate",
        counted(len(data.train), "text"),
        counted(len(counts), "class", "classes"),
        list_labels([f"{label} {count:,}" for label, count in counts.most_common()]),
        f"{0 if data.val is None else len(data.val):,}",
    )
    log.info(
        "tokens: median %g, longest %s; %.1f %% cut at %s, %s left out; %s",
        statistics["tokens_median"],
        f"{statistics['tokens_max']:,}",
        100 * statistics["truncated"],
        f"{data.max_length:,}",
        f"{data.dropped:,}",
        counted(statistics["duplicates"], "duplicate"),
    )
    present = Counter({label: count for label, count in counts.items() if count})
    (most, many), (least, few) = present.most_common()[0], present.most_common()[-1]
    single = [label for label, count in present.items() if count == 1]
    if single:
        log.warning("a single text to learn from: label %s", list_labels(single))
    if many >= IMBALANCED * few:
        log.warning(
            "label `%s` has %s and `%s` %s: accuracy says little, look at val_macro_f1",
            *(most, counted(many, "text"), least, f"{few:,}"),
        )
    if ambiguous := statistics["ambiguous"]:
        log.warning("%s with several labels", counted(ambiguous, "text stands", "texts stand"))
    if shared := statistics["shared_texts"]:
        texts = counted(shared, "validation text is", "validation texts are")
        log.warning("%s trained on with another label", texts)


def _require_apart(split: Split[Example]) -> None:
    both = find_overlap(split.train, split.val)
    if both:
        ours, theirs = both[0]
        raise DataError(
            f"this text also validates ({theirs.name}), one of {counted(len(both), 'such text')}",
            file=ours.place,
            line=ours.line,
            hint="a validation set must be new to the model: take them out of one of the two",
        )


def _encode(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int, *, drop: bool
) -> tuple[list[tuple[Example, list[int], bool]], int]:
    """Encode texts to (example, tokens, whether they were cut); count those left out instead."""
    options: dict[str, Any] = {"split_special_tokens": True, "return_attention_mask": False}
    kept: list[tuple[Example, list[int], bool]] = []
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        encoded = tokenizer([example.text for example in batch], **options)["input_ids"]
        for example, tokens in zip(batch, encoded, strict=True):
            is_long = len(tokens) > max_length
            if is_long and drop:
                continue
            if is_long:
                shorter = tokenizer(example.text, **options, truncation=True, max_length=max_length)
                tokens = shorter["input_ids"]
            if not tokens or tokenizer.pad_token_id in tokens:
                what = (
                    "has no tokens" if not tokens else f"holds {tokenizer.pad_token}, the padding"
                )
                raise DataError(f"this text {what}", file=example.place, line=example.line)
            kept.append((example, tokens, is_long))
    if examples and not kept:
        raise DataError(
            f"every text has more than {max_length:,} tokens, and --truncation drop leaves none",
            hint="raise --max-length, or use --truncation cut",
        )
    return kept, len(examples) - len(kept)


def _require_embeddings(encoded: list[tuple[Example, list[int], bool]], rows: int) -> None:
    for example, tokens, _ in encoded:
        if max(tokens) >= rows:
            raise DataError(
                f"a token id of {max(tokens):,}, and the model has only {rows:,} embeddings: the "
                "tokenizer is another model's",
                file=example.place,
                line=example.line,
                hint="put the model's own tokenizer into its folder",
            )


def _collect(encoded: list[tuple[Example, list[int], bool]], labels: Sequence[str]) -> EncodedTexts:
    number = {label: place for place, label in enumerate(labels)}
    lengths = [len(tokens) for _, tokens, _ in encoded]
    return EncodedTexts(
        np.concatenate([np.asarray(tokens, np.int32) for _, tokens, _ in encoded]),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.array([number[_label(example)] for example, _, _ in encoded], np.int64),
        sum(is_cut for _, _, is_cut in encoded),
    )
