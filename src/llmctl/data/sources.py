"""Resolve what `--data` names to sources, in a fixed order.

In: file names, folders, globs, Hub ids, built-in data, `-`. Out: `Source` objects, each saying how
it is read. Stdin and pipes are copied to a spool folder, since a corpus is read more than once; a
Hub data set is pinned to its commit for the same reason.
"""

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from llmctl.console import log
from llmctl.data.builtin import PREFERENCES, TASKS, named_tasks
from llmctl.errors import DataError
from llmctl.files import sha256_file
from llmctl.models import hub
from llmctl.numbers import counted

Kind = Literal["text", "jsonl", "json", "csv", "parquet", "hub", "builtin"]

PYTHON_DOCS = "builtin:python-docs"
PACKED = (".gz", ".zst")
KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
REFUSED = (".tar", ".tgz", ".zip", ".bz2", ".xz", ".7z", ".xlsx", ".arrow")
KNOWN = "txt, md, jsonl, json, csv or parquet, also .gz or .zst"


@dataclass(frozen=True)
class Source:
    """One thing to read documents from."""

    name: str
    """In messages and in the manifest."""

    kind: Kind
    path: Path | None = None
    size: int = 0
    """Bytes on disk, compressed as they are; 0 where that is not known."""

    revision: str | None = None
    """Commit of a data set on the Hub."""


def find_sources(data: Sequence[str], spool: Path) -> list[Source]:
    """Resolve names to sources, each file once, folders in order of name.

    What can be read only once goes to `spool`, an existing folder.

    Raises:
        DataError: nothing there, or a kind of file that holds no text.
        NetworkError: a Hub data set that cannot be reached, told at once and not after retries.
    """
    sources = [source for name in data for source in _named(name, spool)]
    return list({source.path or source.name: source for source in sources}.values())


def manifest_input(role: str, source: Source, digest: Callable[[], str]) -> dict[str, Any]:
    """Record a source for the manifest: its commit on the Hub, or the hash of its file or content.

    `role` is as `data`; `digest` hashes the content (hex sha256) where it is neither on the Hub nor
    a file.
    """
    entry = {"role": role, "path": source.name}
    if source.revision is not None:
        return {**entry, "sha256": None, "revision": source.revision}
    return {**entry, "sha256": digest() if source.path is None else sha256_file(source.path)}


def split_weight(text: str) -> tuple[str, str]:
    """Split `NAME=WEIGHT` into the name and `=WEIGHT`, empty where there is none or a file has it.

    Raises nothing: what a weight may be depends on what is weighted.
    """
    name, sign, number = text.rpartition("=")
    try:
        float(number)
    except ValueError:
        return text, ""
    return (name, sign + number) if sign and not Path(text).expanduser().exists() else (text, "")


def _named(name: str, spool: Path) -> Iterator[Source]:
    path = Path(name).expanduser()
    if name == "-":
        yield _spooled("stdin", sys.stdin.buffer, spool / "stdin")
    elif name.startswith("builtin:"):
        yield _built_in(name)
    elif path.is_dir():
        yield from _in_folder(path)
    elif path.is_file():
        yield _file(path)
    elif path.exists():
        with path.open("rb") as stream:
            yield _spooled(name, stream, spool / f"pipe-{len(list(spool.iterdir()))}")
    elif any(c in name for c in "*?["):
        yield from _matching(path)
    elif _is_hub_id(name):
        yield Source(name, "hub", revision=hub.download(name, [], "dataset", DataError).name)
    else:
        raise DataError(
            "no such file",
            file=name,
            hint=f"pass a file ({KNOWN}), a folder, a glob, "
            "a Hub data set as owner/name or owner/name@revision, "
            f"{PYTHON_DOCS}, {TASKS}, {PREFERENCES}, or - for stdin",
        )


def _built_in(name: str) -> Source:
    seeded = next((d for d in (TASKS, PREFERENCES) if f"{name}:".startswith(f"{d}:")), None)
    if seeded is not None:
        named_tasks(name, seeded)
    elif name != PYTHON_DOCS:
        hint = f"there is {PYTHON_DOCS}, {TASKS} and {PREFERENCES}"
        raise DataError(f"no built-in data `{name}`", hint=hint)
    return Source(name, "builtin")


def _is_hub_id(name: str) -> bool:
    """Whether a name that is no local file can be `owner/name`, or a revision of it, on the Hub."""
    owner, _, rest = name.partition("/")
    looks_local = Path(name).suffix in (*KINDS, *PACKED, *REFUSED) or Path(owner).is_dir()
    return hub.is_hub_id(name) and bool(rest) and not looks_local


def _in_folder(folder: Path) -> Iterator[Source]:
    """Yield the files of known kinds under a folder, without hidden ones."""
    left_out: Counter[str] = Counter()
    is_empty = True
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not path.is_file():
            continue
        if _suffix(path) in KINDS:
            is_empty = False
            yield _file(path)
        else:
            left_out[_suffix(path) or path.name] += 1
    if is_empty:
        raise DataError(f"an empty corpus: no file of {KNOWN} in this folder", file=folder)
    if left_out:
        log.info(
            "%s: left out %s of other kinds (%s); a glob takes any kind as text",
            folder,
            counted(left_out.total(), "file"),
            ", ".join(sorted(left_out)[:5]),
        )


def _matching(pattern: Path) -> Iterator[Source]:
    root = Path(pattern.anchor)
    files = sorted(p for p in root.glob(str(pattern.relative_to(root))) if p.is_file())
    if not files:
        raise DataError("no file matches", file=str(pattern))
    yield from map(_file, files)


def _file(path: Path) -> Source:
    if _suffix(path) in REFUSED:
        what = f"cannot read {_suffix(path)} files"
        raise DataError(what, file=path, hint=f"unpack it to {KNOWN}")
    return Source(str(path), KINDS.get(_suffix(path), "text"), path, path.stat().st_size)


def _suffix(path: Path) -> str:
    """Return the suffix that tells the kind, the one before .gz or .zst."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in PACKED else suffix


def _spooled(name: str, stream: BinaryIO, path: Path) -> Source:
    with path.open("wb") as file:
        shutil.copyfileobj(stream, file)
    with path.open("rb") as file:
        if file.read(1) == b"{":
            log.warning("%s is read as plain text; save JSON lines to a .jsonl file", name)
    return Source(name, "text", path, path.stat().st_size)
