"""Read preferences, and part those that train from those that validate.

In: what `--data` names. Out: pairs of conversations (or plain texts) of which one is preferred, no
prompt of which is on both sides.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

from llmctl.config.supervised import Preferred
from llmctl.data.holdout import conversation_hash, fingerprint
from llmctl.data.layouts import choose_layouts
from llmctl.data.preference_rows import EQUAL, UNDECIDED, Preference, preferences_of
from llmctl.data.sets import ItemSet, read_sets
from llmctl.data.splits import Split, split
from llmctl.errors import DataError


@dataclass(frozen=True)
class Preferences:
    """All preferences of a run."""

    split: Split[Preference]
    dropped: dict[str, int]
    """Rows left out that are sound: responses that are the same, rankings without a verdict."""

    @property
    def train(self) -> list[Preference]:
        """What to learn from."""
        return self.split.train

    @property
    def val(self) -> list[Preference]:
        """What validates; none of its prompts trains, unless it comes from elsewhere."""
        return self.split.val

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        trained = set(map(prompt_hash, self.train))
        both = Counter(_pair_hash(pair) for pair in (*self.train, *self.val))
        return {
            "pairs": len(self.train) + len(self.val),
            "train_pairs": len(self.train),
            "val_pairs": len(self.val),
            "prompts": len(trained | set(map(prompt_hash, self.val))),
            "margins": sum(pair.margin is not None for pair in self.train),
            **{f"dropped_{why}": count for why, count in self.dropped.items()},
            "skipped": self.split.skipped,
            "duplicates": both.total() - len(both),
            "contradictions": sum(found[::-1] in both for found in both) // 2,
            "shared_prompts": sum(prompt_hash(pair) in trained for pair in self.val),
        }


def read_preferences(config: Preferred, data: list[str], seed: int) -> Preferences:
    """Read everything, and hold out what validates: whole prompts with all their pairs.

    Args:
        config: says how to read, and what to hold out.
        data: names of the preferences, with weights or none.
        seed: chooses pairs, where weights leave some out.

    Raises:
        DataError: rows that are no preferences, nothing left on one of the sides, or a pair that
            both trains and validates.
        NetworkError: a Hub data set that cannot be reached.
        UserError: weights or columns that make no sense.
    """
    layouts = choose_layouts(config.columns, "preferences")
    dropped = Counter({EQUAL: 0, UNDECIDED: 0})

    def read(names: list[str], role: str) -> list[ItemSet[Preference]]:
        make = partial(preferences_of, dropped=dropped)
        return read_sets(names, layouts, make, skip_bad_rows=config.skip_bad_rows, role=role)

    found = split(config, data, seed, read, prompt_hash)
    if not found.train:
        raise DataError(
            f"no preference to learn from: {dropped[EQUAL]:,} rows have equal responses, "
            f"{dropped[UNDECIDED]:,} no verdict",
            file=data[0],
        )
    _require_apart(found)
    return Preferences(found, dict(dropped))


def prompt_hash(pair: Preference) -> int:
    """What tells prompts apart, but for case, white space and sentence marks."""
    return conversation_hash(pair.prompt) if pair.shared else fingerprint(pair.chosen)


def _pair_hash(pair: Preference) -> tuple[int, int]:
    return fingerprint(pair.chosen), fingerprint(pair.rejected)


def _require_apart(found: Split[Preference]) -> None:
    known = {_pair_hash(pair): pair for pair in found.val}
    both = [pair for pair in found.train if known and _pair_hash(pair) in known]
    if both:
        first = both[0].chosen
        raise DataError(
            f"this pair also validates ({known[_pair_hash(both[0])].name}), and so do "
            f"{len(both) - 1:,} others",
            file=first.place,
            line=first.line,
            hint="a validation set must be new to the model: take them out of one of the two",
        )
