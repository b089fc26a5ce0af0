"""Checks of a model before it trains: no token sees what comes after it, or a packed neighbour."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmctl.errors import ModelError
from llmctl.training.state import evaluating

if TYPE_CHECKING:
    from llmctl.training.batches import SequenceRows

TOLERANCE = 1e-5
"""Largest change of a logit, relative to the largest one: where nothing leaks there is none."""
CAUSAL_TOKENS = 12
LONGEST = 64
"""Tokens of each sequence that the test looks at."""


@torch.no_grad()
def require_isolated(model: Any, rows: "SequenceRows", vocabulary: int) -> float:
    """Change the first sequence of a packed row: the logits of the others must stay.

    Models differ in how they make their masks, and one that ignores positions would train every
    sequence on the text of strangers, unseen in the loss. Ids below `vocabulary` are the model's.
    Returns the largest relative change.

    Raises:
        ModelError: they change.
    """
    contents = (rows.row(number) for number in range(len(rows)))
    crowded = next((row for row in contents if len(row) > 1), None)
    if crowded is None:
        return 0.0
    parts = [
        torch.from_numpy(rows.data.sequence(n)[0][:LONGEST].astype("int64")) for n in crowded[:3]
    ]
    first = len(parts[0])
    tokens = torch.cat(parts)[None].to(model.device)
    positions = torch.cat([torch.arange(len(part)) for part in parts])[None].to(model.device)
    other = tokens.clone()
    other[0, :first] = (
        other[0, :first] + 1 + torch.arange(first, device=tokens.device)
    ) % vocabulary
    changes = _changes(model, tokens, other, position_ids=positions)
    change = float(changes[first:].max())
    if change > TOLERANCE or not changes[:first].any():
        raise ModelError(
            f"--packing leaks: changing one sequence moves the logits of another by {change:.1%}",
            hint="this architecture does not keep packed sequences apart: drop --packing",
        )
    return change


@torch.no_grad()
def require_causal(model: Any, vocabulary: int, length: int = CAUSAL_TOKENS) -> None:
    """Change the last token of a sequence: the logits before it must stay.

    A configuration tells of most models (`require_causal_config`), the model itself of all.

    Ids below `vocabulary` are the model's.

    Raises:
        ModelError: a token sees what comes after it.
    """
    tokens = (torch.arange(length, device=model.device) * 7 + 1)[None] % vocabulary
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % vocabulary
    change = float(_changes(model, tokens, other)[:-1].max())
    if not change <= TOLERANCE:
        raise ModelError(
            f"{model.config.model_type} is not a causal language model: a later token moves "
            f"earlier logits by {change:.1%}, so it sees the answers that it is to give",
            hint="use a decoder, or --task classify",
        )


def _changes(model: Any, tokens: Tensor, other: Tensor, **inputs: Tensor) -> Tensor:
    """(L,) largest change of a logit at each place, relative to the largest logit of all.

    Virtual tokens, where there are any, come first.
    """
    with evaluating(model):
        before, after = (
            model(input_ids=ids, use_cache=False, **inputs).logits.float()
            for ids in (tokens, other)
        )
    changes: Tensor = (before - after)[0].abs().amax(-1) / before.abs().max()
    return changes
