"""Write one split: documents in stretches of text in, token shards and their statistics out."""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from llmctl.data.encoding import RUN_CHARACTERS, Cutter, Encoder, RunTooLong
from llmctl.data.shards import ShardWriter
from llmctl.data.tokenizer import Vocabulary
from llmctl.errors import DataError

BATCH_CHARACTERS = 1 << 20

Place = tuple[str, int | None]


@dataclass(frozen=True)
class Extreme:
    """The longest or the shortest document."""

    tokens: int
    place: Place

    def __str__(self) -> str:
        """As `1,204 tokens (file.jsonl:7)`."""
        file, line = self.place
        return f"{self.tokens:,} tokens ({file}{f':{line}' if line else ''})"


class SplitWriter:
    """Encodes the documents of one split in batches and writes them to shards."""

    def __init__(
        self, folder: Path, split: str, vocabulary: Vocabulary, encoder: Encoder, dtype: str
    ) -> None:
        """Write `folder/{split}-00000.bin` and on."""
        self.vocabulary, self.encoder, self.dtype = vocabulary, encoder, dtype
        self.documents = self.bytes = 0
        self.counts = np.zeros(vocabulary.size, np.int64)
        self.longest: Extreme | None = None
        self.shortest: Extreme | None = None
        self._shards = ShardWriter(folder, split, dtype)
        self._cutter = Cutter(encoder.cuts)
        self._texts: list[str] = []
        self._ends: list[bool] = []
        self._places: list[Place] = []
        self._characters = 0
        self._is_within = False
        self._carried = 0

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return int(self.counts.sum())

    def add(self, text: str, place: str, line: int | None, is_last: bool) -> None:
        """Take the next stretch of a document.

        Raises:
            DataError: the text cannot be cut and is too long to be encoded at once.
        """
        try:
            for piece in self._cutter.feed(text, is_last):
                self._texts.append(piece)
                self._ends.append(False)
                self._characters += len(piece)
                if self._characters >= BATCH_CHARACTERS and not is_last:
                    self._flush()
        except RunTooLong:
            raise self._too_long(place, line) from None
        if is_last:
            self._ends[-1] = True
            self._places.append((place, line))
            if self._characters >= BATCH_CHARACTERS:
                self._flush()

    def _too_long(self, place: str, line: int | None) -> DataError:
        where = {
            "nowhere": "a document, which this tokenizer takes only whole,",
            "spaces": "a stretch of text without a single space between words",
        }.get(self.encoder.cuts, "a stretch of text without a space or line end between words")
        return DataError(
            f"{where} of more than {RUN_CHARACTERS:,} characters, the limit",
            file=place,
            line=line,
            hint="break it up, leave it out, or use --algorithm byte, which has no limit",
        )

    def _flush(self) -> None:
        """Encode what was gathered, put the prefix and eos around each document, and write it."""
        if not self._texts:
            return
        ids, lengths = self.encoder.encode(self._texts)
        ends = np.array(self._ends)
        starts = np.append(not self._is_within, ends[:-1])
        prefix = self.vocabulary.prefix
        stops = np.cumsum(lengths + len(prefix) * starts + ends)
        tokens = np.empty(stops[-1], self.dtype)
        is_text = np.ones(len(tokens), bool)
        last = stops[ends] - 1
        tokens[last] = self.vocabulary.eos
        is_text[last] = False
        first = np.append(0, stops[:-1])[starts]
        for offset, token in enumerate(prefix):
            tokens[first + offset] = token
            is_text[first + offset] = False
        tokens[is_text] = ids
        self._shards.write(tokens, last)
        self._count(tokens, last)
        self._texts, self._ends, self._places, self._characters = [], [], [], 0
        self._is_within = not ends[-1]

    def _count(self, tokens: NDArray[Any], last: NDArray[np.int64]) -> None:
        self.counts += np.bincount(tokens, minlength=len(self.counts))
        self.documents += len(last)
        if not len(last):
            self._carried += len(tokens)
            return
        sizes = np.diff(last, prepend=-1)
        sizes[0] += self._carried
        self._carried = len(tokens) - 1 - int(last[-1])
        most, least = int(sizes.argmax()), int(sizes.argmin())
        if self.longest is None or sizes[most] > self.longest.tokens:
            self.longest = Extreme(int(sizes[most]), self._places[most])
        if self.shortest is None or sizes[least] < self.shortest.tokens:
            self.shortest = Extreme(int(sizes[least]), self._places[least])

    def __enter__(self) -> Self:
        """Write, or leave nothing behind."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write the last batch and name the shards; on an error remove them."""
        try:
            if kind is None:
                self._flush()
        except BaseException as late:
            self._shards.__exit__(type(late), late, late.__traceback__)
            raise
        self._shards.__exit__(kind, error, trace)

    def facts(self) -> dict[str, Any]:
        """This split's part of the index."""
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            "shards": [shard.__dict__ for shard in self._shards.shards],
        }
