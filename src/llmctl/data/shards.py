"""Write and read token shards: flat arrays on disk with an index.

    tokens/index.json         dtype, vocabulary, hashes, and for each split its shards and counts
    tokens/train-00000.bin    little-endian uint16 or uint32, nothing else
    tokens/val-00000.bin

A `TokenSplit` reads any window of tokens, across shards, through memory maps.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.errors import DataError

SHARD_TOKENS = 1 << 28


@dataclass(frozen=True)
class Shard:
    """One file of tokens."""

    file: str
    tokens: int
    documents: int
    sha256: str


@dataclass(frozen=True)
class TokenSplit:
    """The tokens of one split, in order."""

    folder: Path
    dtype: str
    tokens: int
    documents: int
    bytes: int
    """UTF-8 bytes of the text that was tokenized."""
    shards: tuple[Shard, ...]

    def windows(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Read tokens `start … start + length` for each start: (B, length)."""
        rows = np.empty((len(starts), length), np.int64)
        for row, start in zip(rows, starts.tolist(), strict=True):
            self._copy(start, row)
        return rows

    def window(self, start: int, length: int) -> NDArray[np.int64]:
        """Read tokens `start … start + length`: (length,)."""
        row = np.empty(length, np.int64)
        self._copy(start, row)
        return row

    def _copy(self, start: int, row: NDArray[np.int64]) -> None:
        if start < 0 or start + len(row) > self.tokens:
            raise IndexError(f"tokens {start} to {start + len(row)} of {self.tokens}")
        done = 0
        while done < len(row):
            number = bisect_right(self._begins, start + done) - 1
            begin = start + done - self._begins[number]
            part = self._maps[number][begin : begin + len(row) - done]
            row[done : done + len(part)] = part
            done += len(part)

    @cached_property
    def _begins(self) -> list[int]:
        return [0, *accumulate(shard.tokens for shard in self.shards)][:-1]

    @cached_property
    def _maps(self) -> list[NDArray[Any]]:
        """Map the shards; plain views slice faster than np.memmap does."""
        return [
            np.memmap(self.folder / shard.file, self.dtype, mode="r").view(np.ndarray)
            for shard in self.shards
        ]


@dataclass(frozen=True)
class TokenIndex:
    """Content of a folder of token shards."""

    folder: Path
    dtype: str
    vocab_size: int
    eos_token_id: int
    bos_token_id: int | None
    tokenizer_sha256: str
    train: TokenSplit
    val: TokenSplit | None


def open_tokens(folder: Path) -> TokenIndex:
    """Open the shards of a tokenize run, or of its tokens/ folder, checked against their index.

    Raises:
        DataError: no index, a shard that is missing, or one of another size.
    """
    inner = folder / "tokens"
    folder = inner if inner.is_dir() else folder
    path = folder / "index.json"
    try:
        index = json.loads(path.read_bytes())
        splits = {name: _split(folder, index["dtype"], s) for name, s in index["splits"].items()}
        fields = {name: index[name] for name in _FIELDS}
        train = splits["train"]
    except FileNotFoundError:
        raise DataError(
            "no token shards here (no index.json)",
            file=folder,
            hint="pass the directory of a finished `llmctl tokenize` run",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not an index of token shards: {error!r}", file=path) from None
    return TokenIndex(folder=folder, train=train, val=splits.get("val"), **fields)


_FIELDS = ("dtype", "vocab_size", "eos_token_id", "bos_token_id", "tokenizer_sha256")


def _split(folder: Path, dtype: str, entry: Mapping[str, Any]) -> TokenSplit:
    """Build a split from its entry in the index, and check the sizes of its shards."""
    shards = tuple(Shard(**shard) for shard in entry["shards"])
    for shard in shards:
        path, wanted = folder / shard.file, shard.tokens * np.dtype(dtype).itemsize
        if not path.is_file():
            raise DataError("a token shard is missing", file=path)
        if path.stat().st_size != wanted:
            raise DataError(
                f"{path.stat().st_size:,} bytes, but the index says {wanted:,}",
                file=path,
                hint="tokenize again: the file was cut short or changed",
            )
    counts = {name: int(entry[name]) for name in ("tokens", "documents", "bytes")}
    return TokenSplit(folder, dtype, shards=shards, **counts)


class ShardWriter:
    """Writes one split's tokens; see `shard_writer`."""

    def __init__(self, folder: Path, split: str, dtype: str, limit: int) -> None:
        """Write to `folder`, starting a new file every `limit` tokens."""
        self.folder, self.split, self.dtype, self.limit = folder, split, dtype, limit
        self.shards: list[Shard] = []
        self._open_next()

    def write(self, tokens: NDArray[Any], ends: NDArray[np.int64]) -> None:
        """Append tokens; `ends` are the positions of the documents' last tokens, in order."""
        while len(tokens):
            room = self.limit - self._tokens
            part, tokens = tokens[:room], tokens[room:]
            raw = part.astype(self.dtype, copy=False).tobytes()
            self._file.write(raw)
            self._hash.update(raw)
            inside = int(np.searchsorted(ends, len(part)))
            self._tokens += len(part)
            self._documents += inside
            ends = ends[inside:] - len(part)
            if self._tokens == self.limit:
                self._close()
                self._open_next()

    def finish(self, *, keeps: bool) -> None:
        """Name the files, or remove them."""
        if keeps and self._tokens:
            self._close()
        else:
            self._file.close()
            self._path(len(self.shards)).unlink()
        for number, shard in enumerate(self.shards):
            if keeps:
                self._path(number).replace(self.folder / shard.file)
            else:
                self._path(number).unlink()

    def _open_next(self) -> None:
        self._file = self._path(len(self.shards)).open("wb")
        self._hash = hashlib.sha256()
        self._tokens = self._documents = 0

    def _close(self) -> None:
        self._file.close()
        name = f"{self.split}-{len(self.shards):05d}.bin"
        self.shards.append(Shard(name, self._tokens, self._documents, self._hash.hexdigest()))

    def _path(self, number: int) -> Path:
        return self.folder / f".{self.split}-{number:05d}.bin.tmp"


@contextmanager
def shard_writer(
    folder: Path, split: str, dtype: str, limit: int = SHARD_TOKENS
) -> Iterator[ShardWriter]:
    """Write shards that get their names when the body is done, and are removed if it fails."""
    writer = ShardWriter(folder, split, dtype, limit)
    try:
        yield writer
    except BaseException:
        writer.finish(keeps=False)
        raise
    writer.finish(keeps=True)
