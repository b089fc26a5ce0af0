"""Read a corpus once: check it, count it, and choose the validation documents.

In: sources. Out: a `Scan` with counts and hashes, and a `SplitPlan`. A document's split follows
from the hash of its text alone, so equal documents are never in both.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from llmctl.console import ProgressBar
from llmctl.data.bad_rows import BadRows
from llmctl.data.documents import Piece, hash_text, read_pieces
from llmctl.data.sources import Source
from llmctl.data.tokenizer.encode import PIECE_CHARACTERS
from llmctl.errors import DataError
from llmctl.numbers import counted

SMALL_BYTES = 64 << 20
PROGRESS_BYTES = 1 << 18
VAL_BYTES = 10_000_000
VAL_FRACTION = 0.1
HASHES = 1 << 64
"""Number of hashes."""


@dataclass(frozen=True)
class Scan:
    """Counts and hashes of the sources."""

    documents: int
    bytes: int
    characters: int
    hashes: NDArray[np.uint64]
    """Hashes of all documents, in order; none of a large corpus, unless they are needed."""
    long_hashes: tuple[int, ...]
    """Hashes of the documents that come in several pieces, in order."""
    opening: str
    """First characters of the corpus."""


@dataclass(frozen=True)
class SplitPlan:
    """Validation documents: those with a hash below a bound, or the end of the only document."""

    fraction: float
    hash_below: int = 0
    train_characters: int | None = None
    """Characters of a single document that train."""


def scan(
    sources: tuple[Source, ...],
    column: str,
    bad: BadRows,
    *,
    all_hashes: bool = False,
    refused: frozenset[int] = frozenset(),
) -> Scan:
    """Read everything once: check it, count it, hash each document.

    `bad` counts the rows that are left out for their errors.

    Raises:
        DataError: an unsound document, one whose hash is in `refused`, or no text at all.
    """
    hashes = array("Q")
    long_hashes: list[int] = []
    digest, documents, size, characters, shown, opening, is_blank = None, 0, 0, 0, 0, "", True
    with ProgressBar("check the data", sum(source.size for source in sources), "B") as progress:
        for text, place, line, is_last in read_documents(sources, column, bad):
            raw = text.encode()
            size += len(raw)
            characters += len(text)
            if size >= shown:
                progress.update(size)
                shown = size + PROGRESS_BYTES
            if is_blank:
                opening += text[:PIECE_CHARACTERS]
                is_blank = not text.strip()
            if not is_last or digest is not None:
                digest = digest or blake2b(digest_size=8)
                digest.update(raw)
                if not is_last:
                    continue
            number = hash_text(raw) if digest is None else int.from_bytes(digest.digest(), "little")
            if digest is not None:
                long_hashes.append(number)
                digest = None
            documents += 1
            if number in refused:
                raise DataError("this document is in --val-data too", file=place, line=line)
            if all_hashes or size <= SMALL_BYTES:
                hashes.append(number)
            elif hashes:
                hashes = array("Q")
    if is_blank:
        names = ", ".join(source.name for source in sources[:3])
        raise DataError("an empty corpus: there is no text in it", file=names)
    every = np.frombuffer(hashes, np.uint64)
    return Scan(documents, size, characters, every, tuple(long_hashes), opening)


def plan_split(scanned: Scan, fraction: float | None) -> SplitPlan:
    """Choose about `fraction` of all documents by hash; raise a DataError for an empty side."""
    if fraction is None:
        fraction = min(VAL_FRACTION, VAL_BYTES / scanned.bytes)
    if fraction == 0:
        return SplitPlan(0.0)
    if scanned.documents == 1:
        cut = int(scanned.characters * (1 - fraction))
        if not 0 < cut < scanned.characters:
            raise _too_small(scanned.documents, fraction)
        return SplitPlan(fraction, train_characters=cut)
    if not len(scanned.hashes):
        return SplitPlan(fraction, hash_below=int(fraction * HASHES))
    ordered = np.sort(scanned.hashes)
    below = int(ordered[max(round(fraction * len(ordered)), 1) - 1]) + 1
    if int(ordered[-1]) < below:
        raise _too_small(scanned.documents, fraction)
    return SplitPlan(fraction, hash_below=below)


def _too_small(documents: int, fraction: float) -> DataError:
    return DataError(
        f"{counted(documents, 'document')} cannot be split in two different sides at "
        f"--val-fraction {fraction:g}",
        hint="pass --val-data FILE, or --val-fraction 0 to go without validation",
    )


def read_documents(sources: tuple[Source, ...], column: str, bad: BadRows) -> Iterator[Piece]:
    """Read all pieces of all documents that are not empty; `bad` counts rows left out."""
    return (p for s in sources for p in read_pieces(s, column, bad) if p.text or not p.is_last)
