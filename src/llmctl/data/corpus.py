"""Turn a corpus into token shards: find its sources, split off validation, encode.

    with open_corpus(config) as corpus:         # finds the sources, reads them once, checks all
        texts = corpus.sample(10**9)            # to train a tokenizer on
        metrics = corpus.write(folder, vocabulary)

Documents are streamed three times at most (checked, sampled, encoded), so memory stays bounded. A
`SplitWriter` writes one split: documents in stretches of text in, shards and their statistics out.
"""

import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmctl.config.sections import Corpus
from llmctl.console import ProgressBar, log
from llmctl.data.bad_rows import BadRows
from llmctl.data.documents import Piece, hash_text, text_input
from llmctl.data.scan import PROGRESS_BYTES, Scan, SplitPlan, plan_split, read_documents, scan
from llmctl.data.shards import ShardWriter, shard_writer
from llmctl.data.sources import Source, find_sources
from llmctl.data.tokenizer.encode import (
    RUN_CHARACTERS,
    Cutter,
    Mismatch,
    RunTooLong,
    TokenizerEncoder,
    fastest_encoder,
)
from llmctl.data.tokenizer.load import Vocabulary, load_vocabulary
from llmctl.data.tokenizer.lost import MOST_LOST, LostCharacters
from llmctl.data.tokenizer.train import fingerprint
from llmctl.errors import DataError, ModelError
from llmctl.files import write_json

BATCH_CHARACTERS = 1 << 20
EARLY_CHARACTERS = 1 << 20
"""Characters after which a tokenizer that loses too many is refused without reading on."""

Place = tuple[str, int | None]

TRAIN_CHARACTERS = 1 << 11


class Extreme(NamedTuple):
    """The longest or the shortest document, as results have it."""

    tokens: int
    file: str
    line: int | None


class SplitWriter:
    """Encodes the documents of one split in batches and writes them to shards."""

    def __init__(
        self, vocabulary: Vocabulary, encoder: TokenizerEncoder, shards: ShardWriter
    ) -> None:
        """Begin without documents."""
        self.vocabulary, self.encoder, self._shards = vocabulary, encoder, shards
        self.documents = self.bytes = 0
        self.counts = np.zeros(vocabulary.size, np.int64)
        self.longest: Extreme | None = None
        self.shortest: Extreme | None = None
        self._cutter = Cutter(encoder.cuts)
        self._texts: list[str] = []
        self._ends: list[bool] = []
        self._places: list[Place] = []
        self._origins: list[Place] = []
        self._characters = 0
        self._is_within = False
        self._carried = 0
        self.lost = LostCharacters(vocabulary.tokenizer)
        self.first_lost: tuple[str | None, int | None] = None, None

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return int(self.counts.sum())

    def add(self, text: str, place: str, line: int | None, is_last: bool) -> None:
        """Add the next stretch of a document.

        Raises:
            DataError: the text cannot be cut and is too long to be encoded at once.
        """
        try:
            for piece in self._cutter.feed(text, is_last):
                self._texts.append(piece)
                self._origins.append((place, line))
                self._ends.append(False)
                self._characters += len(piece)
                if self._characters >= BATCH_CHARACTERS and not is_last:
                    self.flush()
        except RunTooLong:
            raise self._too_long(place, line) from None
        if is_last:
            self._ends[-1] = True
            self._places.append((place, line))
            if self._characters >= BATCH_CHARACTERS:
                self.flush()

    def _too_long(self, place: str, line: int | None) -> DataError:
        spaces = "a stretch of text without a single space between words"
        where = {
            "nowhere": "a document, which this tokenizer takes only whole,",
            "spaces": spaces,
            "marks": spaces,
        }.get(self.encoder.cuts, "a stretch of text without a space or line end between words")
        return DataError(
            f"{where} of more than {RUN_CHARACTERS:,} characters, the limit",
            file=place,
            line=line,
            hint="break it up or leave it out; a tokenizer of --algorithm byte has no limit",
        )

    def flush(self) -> None:
        """Encode the batch, put the prefix and EOS around each document, and write it."""
        if not self._texts:
            return
        self._count_lost()
        ids, lengths = self.encoder.encode(self._texts)
        ends = np.array(self._ends)
        starts = np.append(not self._is_within, ends[:-1])
        prefix = self.vocabulary.prefix
        stops = np.cumsum(lengths + len(prefix) * starts + ends)
        tokens = np.empty(stops[-1], self._shards.dtype)
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
        self._origins = []
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
            self.longest = Extreme(int(sizes[most]), *self._places[most])
        if self.shortest is None or sizes[least] < self.shortest.tokens:
            self.shortest = Extreme(int(sizes[least]), *self._places[least])

    def _count_lost(self) -> None:
        """Count what the tokenizer loses of the batch; refuse at once where it is most."""
        first = self.lost.add_all(self._texts)
        if first is not None and self.first_lost[0] is None:
            self.first_lost = self._origins[first]
        if self.lost.characters > EARLY_CHARACTERS:
            self.lost.refuse(MOST_LOST, *self.first_lost)

    def check_lost(self) -> None:
        """Warn of characters that the tokenizer loses; raise a DataError where they are many."""
        self.lost.refuse(MOST_LOST, *self.first_lost)
        if self.lost.lost:
            place, line = self.first_lost
            where = place if line is None else f"{place}:{line}"
            log.warning("%s: %s", where, self.lost.message())

    def index_entry(self) -> dict[str, Any]:
        """Return this split's entry in the index."""
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            "shards": [shard.__dict__ for shard in self._shards.shards],
        }


@dataclass(frozen=True)
class CheckedCorpus:
    """Documents that were read once and checked."""

    sources: tuple[Source, ...]
    val_sources: tuple[Source, ...]
    column: str
    scan: Scan
    val_scan: Scan | None
    plan: SplitPlan
    skip_bad_rows: int = 0

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of all text."""
        return self.scan.bytes + (self.val_scan.bytes if self.val_scan else 0)

    def sample(self, train_bytes: int) -> Iterator[str]:
        """Sample about `train_bytes` of the text: one piece at random of every so many in a row."""
        stride = max(1.0, self.scan.bytes / train_bytes)
        draw = random.Random(0)
        with ProgressBar("train the tokenizer", min(self.scan.bytes, train_bytes), "B") as progress:
            taken, drawn, wanted = 0, 0, 0
            for number, text in enumerate(_pieces(self.sources, self.column, self.skip_bad_rows)):
                if number == wanted:
                    while wanted <= number:
                        drawn += 1
                        wanted = int((drawn + draw.random()) * stride) if stride > 1 else drawn
                    taken += len(text)
                    progress.update(taken)
                    yield text

    def inputs(self) -> list[dict[str, Any]]:
        """Return the manifest's record of the sources."""
        roles = {"data": self.sources, "val-data": self.val_sources}
        return [
            text_input(role, source, self.column, self.skip_bad_rows)
            for role, sources in roles.items()
            for source in sources
        ]

    def write(self, folder: Path, vocabulary: Vocabulary) -> dict[str, Any]:
        """Encode every document into shards under `folder`, the index last; return its metrics.

        Raises:
            DataError: text that cannot be encoded, or that changed since it was first read.
        """
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return self._write(folder, vocabulary, plain=False)
        except Mismatch as mismatch:
            log.warning("fastokens disagrees with tokenizers on %.60r: not used", str(mismatch))
            return self._write(folder, vocabulary, plain=True)

    def _write(self, folder: Path, vocabulary: Vocabulary, *, plain: bool) -> dict[str, Any]:
        started = time.monotonic()
        coder = fastest_encoder(vocabulary.tokenizer, sample=self.scan.opening, plain=plain)
        dtype = "<u2" if vocabulary.size <= 1 << 16 else "<u4"
        has_val = self.val_scan is not None or self.plan.fraction > 0
        with ExitStack() as stack:
            train, *rest = (
                stack.enter_context(_split_writer(folder, name, vocabulary, coder, dtype))
                for name in (("train", "val") if has_val else ("train",))
            )
            val = rest[0] if rest else None
            progress = stack.enter_context(ProgressBar("encode", self.bytes, "B"))
            self._route(train, val, progress)
        seconds = time.monotonic() - started
        _check_sizes(train, val, self.bytes)
        for side in (train, *rest):
            side.check_lost()
        splits = {"train": train.index_entry(), **({"val": val.index_entry()} if val else {})}
        write_json(
            folder / "index.json",
            {
                "dtype": dtype,
                "vocab_size": vocabulary.size,
                "eos_token_id": vocabulary.eos,
                "bos_token_id": vocabulary.bos,
                "tokenizer_sha256": fingerprint(vocabulary.tokenizer),
                "splits": splits,
            },
        )
        documents = self.scan.documents + (self.val_scan.documents if self.val_scan else 0)
        return {"documents": documents, **_metrics([train, *rest], vocabulary, seconds)}

    def _documents(self, sources: tuple[Source, ...]) -> Iterator[Piece]:
        """Read them once more; the same rows are left out each time."""
        return read_documents(sources, self.column, BadRows(self.skip_bad_rows))

    def _route(self, train: SplitWriter, val: SplitWriter | None, progress: ProgressBar) -> None:
        """Write every document to its split."""
        long_hashes = iter(self.scan.long_hashes)
        side, is_within, done, shown, characters = train, False, 0, 0, 0
        cut = self.plan.train_characters
        for text, place, line, is_last in self._documents(self.sources):
            raw = text.encode()
            if cut is not None and val is not None:
                for part, to, ends in _halves(text, cut - characters, is_last):
                    to_side = (train, val)[to]
                    to_side.bytes += len(part.encode())
                    to_side.add(part, place, line, ends)
                characters += len(text)
            else:
                if not is_within and val is not None:
                    number = hash_text(raw) if is_last else next(long_hashes, 0)
                    side = val if number < self.plan.hash_below else train
                side.bytes += len(raw)
                side.add(text, place, line, is_last)
            is_within = not is_last
            done += len(raw)
            if done >= shown:
                progress.update(done)
                shown = done + PROGRESS_BYTES
        if val is not None:
            for text, place, line, is_last in self._documents(self.val_sources):
                val.bytes += len(text.encode())
                val.add(text, place, line, is_last)


@contextmanager
def open_corpus(config: Corpus) -> Iterator[CheckedCorpus]:
    """Find, read and check all documents, and choose those that validate.

    Raises:
        DataError: no documents, unsound ones, or an empty split.
        NetworkError: a Hub data set that cannot be reached.
    """
    with tempfile.TemporaryDirectory(prefix="llmctl-") as spool:
        sources = tuple(find_sources(config.data, Path(spool)))
        val_sources = tuple(find_sources(config.val_data, Path(spool)))
        bad = BadRows(config.skip_bad_rows)
        val_scan = (
            scan(val_sources, config.text_column, bad, all_hashes=True) if val_sources else None
        )
        kept = frozenset(val_scan.hashes.tolist()) if val_scan else frozenset()
        scanned = scan(sources, config.text_column, bad, refused=kept)
        bad.report()
        plan = SplitPlan(0.0) if val_scan else plan_split(scanned, config.val_fraction)
        yield CheckedCorpus(
            sources,
            val_sources,
            config.text_column,
            scanned,
            val_scan,
            plan,
            config.skip_bad_rows,
        )


@contextmanager
def _split_writer(
    folder: Path, split: str, vocabulary: Vocabulary, encoder: TokenizerEncoder, dtype: str
) -> Iterator[SplitWriter]:
    """Write `folder/{split}-00000.bin` and on; an error removes them all."""
    with shard_writer(folder, split, dtype) as shards:
        writer = SplitWriter(vocabulary, encoder, shards)
        yield writer
        writer.flush()


def _pieces(sources: tuple[Source, ...], column: str, skip_bad_rows: int) -> Iterator[str]:
    """Cut text into short pieces to train on: time grows with the square of a word's length."""
    cutter = Cutter("softly", TRAIN_CHARACTERS)
    for text, _, _, is_last in read_documents(sources, column, BadRows(skip_bad_rows)):
        yield from cutter.feed(text, is_last)


def _halves(text: str, cut: int, is_last: bool) -> Iterator[tuple[str, int, bool]]:
    """Yield the part before the cut (split 0) and the part after it (split 1) of a piece."""
    if cut > 0:
        yield text[:cut], 0, cut <= len(text)
    if cut < len(text):
        yield text[max(cut, 0) :], 1, is_last


def _check_sizes(train: SplitWriter, val: SplitWriter | None, expected: int) -> None:
    total = train.bytes + (val.bytes if val else 0)
    if total != expected:
        raise DataError(
            f"the data changed while it was read: {expected:,} bytes at first, then {total:,}"
        )
    for name, side in (("training", train), ("validation", val)):
        if side is not None and side.documents == 0:
            raise DataError(
                f"no document fell to the {name} split",
                hint="pass --val-data FILE, or another --val-fraction",
            )
    if val is not None and val.bytes > train.bytes:
        log.warning(
            "validation holds more text than training (%.1f MB of %.1f): documents differ much in "
            "length; --val-data FILE chooses better",
            val.bytes / 1e6,
            total / 1e6,
        )


def _metrics(sides: list[SplitWriter], vocabulary: Vocabulary, seconds: float) -> dict[str, Any]:
    """Compute the metrics of the whole corpus."""
    counts = np.sum([side.counts for side in sides], axis=0)
    tokens, size = int(counts.sum()), sum(side.bytes for side in sides)
    unknown = 0 if vocabulary.unknown is None else int(counts[vocabulary.unknown])
    # GPT-2's tokenizers call eos unknown, too: the frames of documents are no text
    unknown -= sum(side.documents for side in sides) * vocabulary.frame.count(vocabulary.unknown)
    longest = [side.longest for side in sides if side.longest]
    shortest = [side.shortest for side in sides if side.shortest]
    return {
        "tokens": tokens,
        "train_tokens": sides[0].tokens,
        "val_tokens": tokens - sides[0].tokens,
        "bytes": size,
        "bytes_per_token": size / tokens,
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "unknown_rate": unknown / tokens,
        "lost_characters": sum(side.lost.lost for side in sides),
        "vocab_size": vocabulary.size,
        "vocab_used": int((counts > 0).sum()) / vocabulary.size,
        "longest_document": max(longest, key=lambda e: e.tokens)._asdict(),
        "shortest_document": min(shortest, key=lambda e: e.tokens)._asdict(),
    }


def tokenize_once(
    config: Corpus, tokenizer: str, folder: Path, written: dict[str, Any] | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Tokenize a run's text into `folder`, or check that the tokens there are of the same text.

    `written` is the identity that this function returned when the run began, None if it did not.

    Returns:
        Inputs for the manifest, and the identity: all that the tokens depend on.

    Raises:
        ModelError: the run began with other text, another tokenizer or another split.
    """
    with open_corpus(config) as corpus:
        inputs = corpus.inputs()
        vocabulary, save_tokenizer = load_vocabulary(tokenizer)
        identity = {
            "data": [entry["sha256"] or entry.get("revision") for entry in inputs],
            "text_column": config.text_column,
            "val_fraction": config.val_fraction,
            "tokenizer": fingerprint(vocabulary.tokenizer),
        }
        if written is None:
            save_tokenizer(folder / "tokenizer")
            corpus.write(folder / "tokens", vocabulary)
        elif changed := [name for name in identity if identity[name] != written[name]]:
            what = ", ".join(f"{name}: {written[name]} -> {identity[name]}" for name in changed)
            raise ModelError(f"the run began with other data ({what})", file=folder)
    return inputs, identity
