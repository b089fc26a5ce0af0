"""Split examples into training and validation, and mix several sets.

In: names of data, and functions that read and hash examples. Out: a `Split`. Read, split, then mix:
no held-out example ever trains. Which ones are held out follows from the hashes of their text, so
that the same examples give the same split in any order, and near-equal ones are never in both.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray

from llmctl.config.finetuning import Examples
from llmctl.console import log
from llmctl.data.bad_rows import BadRows
from llmctl.data.documents import hash_text
from llmctl.data.examples import Example, read_examples
from llmctl.data.rendered import prompt_of_text
from llmctl.data.schemas import Message, Task
from llmctl.data.sets import Item, ItemSet
from llmctl.errors import DataError
from llmctl.numbers import counted

Key = Callable[[Any], int]
"""Hash of an item; near-equal ones have the same."""
VAL_SIZE, VAL_FRACTION = 500, 0.1
FEWEST = 20
"""Examples below which none are held out by default."""

_LOOSE = re.compile(
    r"[.,:](?!\d)|[\s!?;'\"`()\[\]{}"
    r"\u00a1\u00ab\u00b4\u00bb\u00bf\u2010-\u2027\u3001-\u3011\uff01\uff08\uff09\uff0c\uff1a\uff1b\uff1f]+"
)
"""White space and sentence marks. Other marks make a difference: 5 - 0 is not 5 * 0."""


@dataclass(frozen=True)
class Split(Generic[Item]):
    """All examples of a run, split."""

    train: list[Item]
    val: list[Item]
    sets: list[ItemSet[Item]]
    """The sets that they come from."""

    @property
    def inputs(self) -> list[dict[str, Any]]:
        """Files and their hashes, for the manifest."""
        return [entry for item_set in self.sets for entry in item_set.inputs]


def read_split(
    config: Examples, data: list[str], seed: int, bad: BadRows, task: Task = "chat"
) -> Split[Example]:
    """Read all examples, and hold some out for validation.

    Where weights leave some examples out, `seed` chooses them; `bad` counts rows left out.

    Raises:
        DataError: rows that are no examples, or an empty split.
        NetworkError: a Hub data set that cannot be reached.
        UserError: weights or columns that make no sense.
    """

    def read(names: list[str], role: str) -> list[ItemSet[Example]]:
        return read_examples(
            names,
            columns=config.columns,
            bad=bad,
            task=task,
            role=role,
        )

    return split(config, data, seed, read, fingerprint)


def split(
    config: Examples,
    data: list[str],
    seed: int,
    read: Callable[[list[str], str], list[ItemSet[Item]]],
    key: Key,
) -> Split[Item]:
    """Read all examples by `read`, from names and a role, and hold some out for validation.

    Examples that `key` gives one hash are never in both; `seed` as in `read_split`.

    Raises:
        DataError: as `read`, or an empty split.
    """
    sets = read(data, "data")
    if config.val_data:
        val_sets = read(config.val_data, "validation")
        val = [example for item_set in val_sets for example in item_set.examples]
        train = _mixed(sets, [item_set.examples for item_set in sets], seed, key)
        return Split(train, val, [*sets, *val_sets])
    pool = [example for item_set in sets for example in item_set.examples]
    kept, held = hold_out(pool, size=config.val_size, fraction=config.val_fraction, key=key)
    ends = np.cumsum([len(item_set.examples) for item_set in sets])
    parts: list[list[Item]] = [[] for _ in sets]
    for number, owner in zip(kept, np.searchsorted(ends, kept, side="right"), strict=True):
        parts[owner].append(pool[number])
    return Split(_mixed(sets, parts, seed, key), [pool[number] for number in held], sets)


def _mixed(sets: list[ItemSet[Item]], parts: list[list[Item]], seed: int, key: Key) -> list[Item]:
    """Return all examples, or of each set the share that its weight gives it."""
    weights = [item_set.weight for item_set in sets if item_set.weight is not None]
    if len(weights) < len(sets):
        return [example for part in parts for example in part]
    counts = mixture_counts([len(part) for part in parts], weights)
    for item_set, part, count in zip(sets, parts, counts, strict=True):
        log.info("%s: %s of %s", item_set.name, f"{count:,}", counted(len(part), "example"))
    return [
        part[number]
        for part, count in zip(parts, counts, strict=True)
        for number in sample_numbers(part, count, seed, key)
    ]


def fingerprint(example: Example) -> int:
    """Hash all text of an example, but for case, white space and sentence marks."""
    if example.messages is None:
        return _hash([example.text or "", example.label or ""])
    return conversation_hash(example.messages)


def conversation_hash(messages: Iterable[Message]) -> int:
    """Hash all text of these messages, likewise."""
    return _hash(_words(messages))


def count_duplicates(examples: Sequence[Example]) -> int:
    """Count the examples that are near-equal to an earlier one."""
    return len(examples) - len(set(map(fingerprint, examples)))


def hold_out(
    examples: Sequence[Item],
    *,
    size: int | None,
    fraction: float | None,
    key: Key = fingerprint,
    most: int = VAL_SIZE,
    noun: str = "examples",
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split in two: the examples with the smallest hashes validate, near-equal ones together.

    `size` validate, a few less where near-equal ones would be parted; else a `fraction`, by default
    a tenth, at most `most`, and none where there are few or all say the same. Errors call them
    `noun`.

    Returns:
        Numbers of those that train and of those that validate, each in order.

    Raises:
        DataError: a split would be empty.
    """
    count = len(examples)
    if size is None and fraction is None:
        wanted = 0 if count < FEWEST else min(most, int(VAL_FRACTION * count))
    else:
        wanted = size if size is not None else max(1, round((fraction or 0) * count))
    if wanted >= count and wanted > 0:
        raise DataError(
            f"{wanted:,} {noun} to hold out, but there are only {count:,}",
            hint="pass a smaller --val-size, or --val-data FILE",
        )
    if wanted == 0:
        return np.arange(count), np.arange(0)
    hashes = np.array([key(example) for example in examples], np.uint64)
    ordered = np.sort(hashes)
    held = hashes < ordered[wanted]
    if not held.any():
        held = hashes == ordered[0]
    if held.all() and size is None and fraction is None:
        return np.arange(count), np.arange(0)
    if held.all():
        raise DataError(
            f"{counted(count, 'example')}, all the same: there is nothing to hold out",
            hint="pass --val-size 0 to go without validation, or --val-data FILE",
        )
    return np.flatnonzero(~held), np.flatnonzero(held)


def find_overlap(train: Sequence[Example], val: Sequence[Example]) -> list[tuple[Example, Example]]:
    """List training examples that are near-equal to a validation example, each with that one."""
    known = {fingerprint(example): example for example in val}
    pairs = ((example, known.get(fingerprint(example))) for example in train if known)
    return [(example, twin) for example, twin in pairs if twin is not None]


def count_shared_prompts(train: Sequence[Example], val: Sequence[Example]) -> int:
    """Count validation examples whose prompt has other answers, and only others, in training."""
    answers: defaultdict[int, set[int]] = defaultdict(set)
    wanted = {prompt for prompt in map(_prompt, val) if prompt is not None}
    for example in train:
        prompt = _prompt(example)
        if prompt is not None and prompt in wanted:
            answers[prompt].add(fingerprint(example))
    return sum(
        prompt in answers and fingerprint(example) not in answers[prompt]
        for example in val
        if (prompt := _prompt(example)) is not None
    )


def mixture_counts(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Compute how many examples of each set an epoch takes: the first set used up ends it.

    No example is taken twice; the weights are of any sum.

    Raises:
        DataError: a set without examples.
    """
    if 0 in sizes:
        raise DataError(
            f"set {list(sizes).index(0) + 1} of the mixture has no example to train on",
            hint="leave it out, or hold out less: --val-size N, or --val-data FILE",
        )
    rounds = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    return [
        min(size, max(1, round(rounds * weight)))
        for size, weight in zip(sizes, weights, strict=True)
    ]


def sample_numbers(
    examples: Sequence[Item], count: int, seed: int, key: Key = fingerprint
) -> list[int]:
    """Choose `count` examples by their hashes and the seed; return their numbers in order."""
    if count >= len(examples):
        return list(range(len(examples)))
    hashes = [hash_text(f"{seed} {key(example)}".encode()) for example in examples]
    return sorted(np.argsort(np.array(hashes, np.uint64), kind="stable")[:count].tolist())


def _prompt(example: Example) -> int | None:
    """Hash all messages before the last answer; None for plain text without a mark of one."""
    if example.messages is None:
        text = example.text or ""
        prompt = text if example.label is not None else prompt_of_text(text)
        return None if prompt is None else _hash([prompt])
    roles = [message["role"] for message in example.messages]
    last = len(roles) - 1 - roles[::-1].index("assistant")
    return conversation_hash(example.messages[:last])


def _words(messages: Iterable[Message]) -> list[str]:
    """List all text of a conversation, and its roles."""
    return [
        text
        for message in messages
        for text in (message["role"], message["content"], str(message.get("tool_calls") or ""))
    ]


def _hash(texts: Iterable[str]) -> int:
    return hash_text("\0".join(map(_plain, texts)).encode())


def _plain(text: str) -> str:
    """Strip case, white space and sentence marks; a text of nothing else stays as it is."""
    folded = text if text.isascii() else unicodedata.normalize("NFC", text)
    return _LOOSE.sub("", folded.casefold()) or text
