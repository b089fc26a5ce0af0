"""Which labels there are, and the number of each: the model's own, or those of the data."""

from collections.abc import Sequence

from transformers import PreTrainedConfig

from llmctl.data.examples import Example
from llmctl.errors import DataError, ModelError

SHOWN = 8
"""Labels that a line names."""


def own_labels(shape: PreTrainedConfig) -> tuple[str, ...] | None:
    """Labels by number of a model that is a classifier already; None for others."""
    names = shape.architectures or []
    if not any(name.endswith("ForSequenceClassification") for name in names):
        return None
    return tuple(str(shape.id2label[number]) for number in sorted(shape.id2label))


def labels_of(
    train: Sequence[Example], val: Sequence[Example], shape: PreTrainedConfig
) -> tuple[str, ...]:
    """The labels by number: the model's own, or those that train, sorted (whole numbers by value).

    Raises:
        DataError: a single class, or one that does not train.
        ModelError: a classifier that does not know a label.
    """
    first = {label_of(example): example for example in reversed(train)}
    if len(first) < 2:
        raise DataError(
            f"every text has the label `{next(iter(first))}`: there is nothing to tell apart",
            file=train[0].place,
            hint="two labels are the least",
        )
    for example in val:
        if label_of(example) not in first:
            raise DataError(
                f"label `{label_of(example)}` is in the validation data, and not in training",
                file=example.place,
                line=example.line,
                hint="add texts that have it, or leave them out; --val-size 0 holds out none",
            )
    known = own_labels(shape)
    if known is None:
        numeric = all(label.removeprefix("-").isdecimal() for label in first)
        return tuple(sorted(first, key=int)) if numeric else tuple(sorted(first))
    for label, example in first.items():
        if label not in known:
            raise ModelError(
                f"label `{label}` ({example.name}) is none of the model's: {listed(known)}",
                hint="rename the labels of the data, or start from a model without a classifier",
            )
    return known


def label_of(example: Example) -> str:
    """The label of an example, which has one."""
    assert example.label is not None
    return example.label


def listed(names: Sequence[str]) -> str:
    """Names in a line, the first few of many."""
    rest = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest
