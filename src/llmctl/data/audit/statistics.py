"""Count what an audit needs to know of training sequences.

In: `Tokenized` arrays, and the special tokens of their model. Out: counts and shares, and masks of
the tokens or sequences that they count.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from llmctl.data.audit.rules import unknown_token
from llmctl.data.chat.render import special_token_ids
from llmctl.data.tokenized import Tokenized

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class TokenRoles:
    """Ids of the tokens that an audit looks for."""

    stops: frozenset[int]
    """Tokens at which generation stops."""
    special: frozenset[int]
    bos: int | None
    unknown: int | None
    """Stands for characters that the tokenizer cannot write, and for nothing else."""
    added: frozenset[int]
    """Tokens for which the model is yet to get embeddings."""
    embedding_rows: int | None


@dataclass(frozen=True)
class SequenceStatistics:
    """Counts and shares over N sequences, made of some rows."""

    rows: int
    sequences: int
    tokens: int
    tokens_min: int
    """Fewest in a sequence; the next three are of one, too."""
    tokens_median: float
    tokens_p95: int
    tokens_max: int
    full_max: int
    """Tokens of the longest before any cut."""
    trained_tokens: int
    trained_share: float
    untrained_rows: int
    """Rows without a token that counts in the loss."""
    truncated_rows: int
    """Rows that lost their end."""
    truncated: float
    """Their share."""
    ended_rows: int
    """Rows whose end is trained on, and stops generation."""
    ended_share: float | None
    """Their share of the uncut rows that train; None where there are none."""
    double_bos: int
    """Sequences that begin with BOS twice."""
    unknown_tokens: int
    unknown_share: float
    beyond_embedding: int
    """Tokens that the model has no embedding for."""
    short: int
    """Sequences of a single token or none, in which nothing is predicted."""


@dataclass(frozen=True)
class TurnStatistics:
    """How trained turns end, cut ones left out."""

    total: int
    open: int
    """Turns that end with no special token."""
    foreign: int
    """Turns that end with a special token at which generation does not stop."""
    foreign_token: int | None
    """One of these tokens."""
    foreign_sequence: int | None
    """Number of the first sequence that has it."""


def token_roles(
    tokenizer: PreTrainedTokenizerBase,
    stops: frozenset[int],
    added_tokens: tuple[str, ...],
    embedding_rows: int | None,
) -> TokenRoles:
    """Look up the roles of a tokenizer's tokens."""
    added = tokenizer.convert_tokens_to_ids(list(added_tokens))
    return TokenRoles(
        stops,
        special_token_ids(tokenizer),
        tokenizer.bos_token_id,
        unknown_token(tokenizer, stops),
        frozenset(map(int, added)),
        embedding_rows,
    )


def sequence_statistics(data: Tokenized, roles: TokenRoles) -> SequenceStatistics:
    """Count everything; all counts are 0 where there are no sequences."""
    rows, tokens = _count(data.rows), len(data.tokens)
    lengths = data.lengths if len(data) else np.zeros(1, np.int64)
    counts, cut = data.trained_counts, data.cut
    whole = ~cut & (counts > 0)
    ended = _count(data.rows[whole & data.ends & _trains_stop(data, roles)])
    endable, truncated = _count(data.rows[whole]), _count(data.rows[cut])
    unknown = int((data.tokens == roles.unknown).sum()) if roles.unknown is not None else 0
    return SequenceStatistics(
        rows=rows,
        sequences=len(data),
        tokens=tokens,
        tokens_min=int(lengths.min()),
        tokens_median=float(np.median(lengths)),
        tokens_p95=int(np.percentile(lengths, 95, method="inverted_cdf")),
        tokens_max=int(lengths.max()),
        full_max=int(data.full_lengths.max(initial=0)),
        trained_tokens=int(counts.sum()),
        trained_share=int(counts.sum()) / max(1, tokens),
        untrained_rows=rows - _count(data.rows[counts > 0]),
        truncated_rows=truncated,
        truncated=truncated / max(1, rows),
        ended_rows=ended,
        ended_share=ended / endable if endable else None,
        double_bos=int(has_double_bos(data, roles).sum()),
        unknown_tokens=unknown,
        unknown_share=unknown / max(1, tokens),
        beyond_embedding=int(lacks_embedding(data, roles).sum()),
        short=int((data.full_lengths < 2).sum()),
    )


def has_double_bos(data: Tokenized, roles: TokenRoles) -> Mask:
    """(N,) whether a sequence begins with BOS twice."""
    doubled = np.zeros(len(data), np.bool_)
    if roles.bos is not None:
        (long_enough,) = np.nonzero(data.lengths >= 2)
        first = data.starts[long_enough]
        is_bos = data.tokens == roles.bos
        doubled[long_enough] = is_bos[first] & is_bos[first + 1]
    return doubled


def lacks_embedding(data: Tokenized, roles: TokenRoles) -> Mask:
    """(T,) whether a token has no embedding, and is not about to get one."""
    if roles.embedding_rows is None:
        return np.zeros(len(data.tokens), np.bool_)
    return (data.tokens >= roles.embedding_rows) & ~is_in(data.tokens, roles.added)


def turn_statistics(data: Tokenized, roles: TokenRoles) -> TurnStatistics:
    """Count the ends of trained turns: the last token of every run of trained ones."""
    goes_on = np.append(data.trained[1:], False)  # the first of a sequence is never trained
    is_end = data.trained & ~goes_on
    is_end[data.starts[1:][data.cut] - 1] = False
    (places,) = np.nonzero(is_end)
    tokens = data.tokens[places]
    special, stopping = is_in(tokens, roles.special), is_in(tokens, roles.stops)
    foreign = places[special & ~stopping]
    first = int(foreign[0]) if len(foreign) else None
    return TurnStatistics(
        total=len(places),
        open=int((~special & ~stopping).sum()),
        foreign=len(foreign),
        foreign_token=None if first is None else int(data.tokens[first]),
        foreign_sequence=None if first is None else data.sequence_of(first),
    )


def _trains_stop(data: Tokenized, roles: TokenRoles) -> Mask:
    """(N,) whether a token at which generation stops is trained on."""
    stops = is_in(data.tokens, roles.stops) & data.trained
    total = np.concatenate([[0], np.cumsum(stops)])
    stopping: Mask = total[data.starts[1:]] > total[data.starts[:-1]]
    return stopping


def is_in(tokens: NDArray[np.int32], ids: frozenset[int]) -> Mask:
    """(T,) whether a token is one of `ids`."""
    return np.isin(tokens, np.array(sorted(ids), np.int64))


def _count(rows: NDArray[np.int64]) -> int:
    return len(np.unique(rows))
