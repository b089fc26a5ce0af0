"""Resolve what `--data` names to sources, in a fixed order.

In: file names, folders, globs, Hub ids, built-in data, `-`. Out: `Source` objects, each saying how
it is read. Stdin and pipes are copied to a spool folder, since a corpus is read more than once; a
Hub data set is pinned to its commit for the same reason.
"""

import errno
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from llmctl.console import say_once
from llmctl.data.builtin import PREFERENCES, TASKS, named_tasks
from llmctl.data.kinds import (
    KNOWN,
    PACKINGS,
    REFUSED,
    SUFFIXES,
    FileKind,
    Kind,
    Packing,
    file_kind,
    kind_in_folder,
    suffix_of,
)
from llmctl.errors import DataError
from llmctl.files import sha256_file
from llmctl.models import hub
from llmctl.numbers import counted
from llmctl.runs.ownership import read_json

PYTHON_DOCS = "builtin:python-docs"
COPIES = (".bak", ".backup", ".orig", ".old", ".save", ".tmp", ".part")
"""Suffixes of copies that stand beside what they are of."""


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

    packing: Packing | None = None
    """Compression of the file."""


def find_sources(data: Sequence[str], spool: Path) -> list[Source]:
    """Resolve names to sources, each file once, folders in order of name and links followed.

    What can be read only once goes to `spool`, an existing folder.

    Raises:
        DataError: nothing there, or a kind of file that holds no text.
        NetworkError: a Hub data set that cannot be reached, told at once and not after retries.
    """
    sources = [source for name in data for source in _named(name, spool)]
    unique: dict[str, Source] = {}
    for source in sources:
        unique.setdefault(identity(source), source)
    return list(unique.values())


def file_source(path: Path, name: str | None = None) -> Source:
    """Return the source of one file; its kind is that of its `name`, by default its path.

    Raises:
        DataError: it cannot be read, or holds no text.
    """
    name = str(path) if name is None else name
    return _source_of(path, name, file_kind(path, name))


def _source_of(path: Path, name: str, found: FileKind) -> Source:
    return Source(name, found.kind, path, path.stat().st_size, packing=found.packing)


def identity(source: Source) -> str:
    """Return a key of a source that does not depend on its spelling, nor on links."""
    return source.name if source.path is None else str(source.path.resolve())


def manifest_input(role: str, source: Source, digest: Callable[[], str]) -> dict[str, Any]:
    """Record a source for the manifest: its commit on the Hub, or the hash of its file or content.

    `role` is as `data`; `digest` hashes the content (hex sha256) where it is neither on the Hub nor
    a file.
    """
    entry = {"role": role, "path": source.name, "kind": source.kind}
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
        yield file_source(path)
    elif path.is_symlink() and not path.exists():
        raise _dangling(path)
    elif path.exists():
        with path.open("rb") as stream:
            yield _spooled(name, stream, spool / f"pipe-{len(list(spool.iterdir()))}")
    elif any(c in name for c in "*?["):
        yield from map(file_source, _matching(path))
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
    is_file = Path(name).suffix.lower() in (*SUFFIXES, *PACKINGS, *REFUSED)
    looks_local = is_file or Path(name).is_symlink() or Path(owner).is_dir()
    return hub.is_hub_id(name) and bool(rest) and not looks_local


def _in_folder(folder: Path) -> Iterator[Source]:
    """Yield the files of data under a folder, without hidden ones, and say what is left out."""
    left_out: Counter[str] = Counter()
    told_by_content: list[str] = []
    is_empty = True
    for path in _files_under(folder):
        found = None if _is_copy(path) else kind_in_folder(path, str(path))
        if found is None:
            left_out[suffix_of(path) or path.name] += 1
            continue
        is_empty = False
        if suffix_of(path) not in SUFFIXES:
            told_by_content.append(str(path.relative_to(folder)))
        yield _source_of(path, str(path), found)
    most = [suffix for suffix, _ in left_out.most_common(5)]
    others = f"{counted(left_out.total(), 'file')} of other kinds ({', '.join(most)})"
    if is_empty:
        raise DataError(
            f"an empty corpus: no file of {KNOWN} in this folder"
            + (f", but {others}" if left_out else ""),
            file=folder,
            hint=REFUSED.get(most[0], f"a glob takes them as text: '{folder}/**/*'")
            if most
            else None,
        )
    if told_by_content:
        files = counted(len(told_by_content), "file")
        names = ", ".join(told_by_content[:5])
        say_once(f"{folder}: rows by what they begin as, in {files} ({names})")
    if left_out:
        say_once(f"{folder}: left out {others}; a glob takes any kind as text")


def _is_copy(path: Path) -> bool:
    """Whether a file is the copy that an editor or a download left beside the file itself."""
    if path.name.endswith("~"):
        return path.with_name(path.name[:-1]).exists()
    original = path.with_suffix("")
    is_named_so = path.suffix.lower() in COPIES
    return is_named_so and any(
        original.with_name(original.name + s).exists() for s in ("", *SUFFIXES)
    )


def _files_under(folder: Path) -> list[Path]:
    """List the files under a folder in order of name, without hidden ones.

    Of a data set that was saved to disk these are the files that hold its rows.

    Raises:
        DataError: a link to nothing: the data is not whole.
    """
    files: list[Path] = []
    for here in _folders_under(folder):
        rows = _saved_rows(here)
        for path in _entries(here) if rows is None else rows:
            if not _is_hidden(path) and _is_file(path):
                files.append(path)
    return sorted(files)


def _folders_under(folder: Path, *, hidden: bool = False) -> Iterator[Path]:
    """Yield a folder and all below it, each real one once: first those, then what links lead to."""
    root, seen = folder.resolve(), set[Path]()
    todo, linked = [folder], list[Path]()
    while todo or linked:
        here = todo.pop() if todo else linked.pop(0)
        real = here.resolve()
        if real in seen or (real != root and root.is_relative_to(real)):
            continue
        seen.add(real)
        yield here
        split = _chosen_split(here)
        for path in _entries(here) if split is None else [split]:
            if path.is_dir() and (hidden or not _is_hidden(path)):
                (linked if path.is_symlink() else todo).append(path)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", file=folder) from None


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _is_file(path: Path) -> bool:
    """Whether it is a file; raise a DataError for a link to nothing."""
    if path.is_symlink() and not path.exists():
        raise _dangling(path)
    return path.is_file()


def _dangling(link: Path) -> DataError:
    hint = f"it leads to {link.readlink()}: put that back, or remove the link"
    try:
        link.stat()
    except OSError as error:
        hint = "it leads back to itself: remove it" if error.errno == errno.ELOOP else hint
    return DataError("a link to what is not there", file=link, hint=hint)


def _saved_rows(folder: Path) -> list[Path] | None:
    """List the files of rows in a folder that `save_to_disk` of datasets wrote; None for others."""
    if (folder / "dataset_dict.json").is_file():
        return []  # they are in the folders of its splits
    if not (folder / "dataset_info.json").is_file() or not (folder / "state.json").is_file():
        return None
    state = read_json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise DataError(
            "a data set that an old version of datasets saved, with its rows in another order",
            file=folder,
            hint="save it anew: load_from_disk(FOLDER).flatten_indices().to_parquet(FILE)",
        )
    files = [folder / str(entry["filename"]) for entry in state.get("_data_files") or []]
    if lost := [path for path in files if not path.is_file()]:
        raise DataError("a file of this saved data set is missing", file=lost[0])
    return files


def _chosen_split(folder: Path) -> Path | None:
    """Return the split to read of a `DatasetDict` that was saved to disk; None for other folders.

    It is `train`, or the only one.
    """
    if not (folder / "dataset_dict.json").is_file():
        return None
    splits = read_json(folder / "dataset_dict.json").get("splits")
    names = [str(name) for name in splits] if isinstance(splits, list) else []
    if "train" not in names and len(names) != 1:
        raise DataError(
            f"a saved data set without a split `train`; there is {', '.join(names) or 'none'}",
            file=folder,
            hint=f"pass one of them: {folder}/{names[0] if names else 'NAME'}",
        )
    chosen = "train" if "train" in names else names[0]
    if others := [name for name in names if name != chosen]:
        say_once(f"{folder}: reading the split {chosen}; left out: {', '.join(others)}")
    return folder / chosen


def _matching(pattern: Path) -> list[Path]:
    """List the files that match a glob, in order of name, links followed."""
    root = Path(pattern.anchor)
    files = sorted(filter(_is_file, _expanded(root, pattern.relative_to(root).parts)))
    if not files:
        raise DataError("no file matches", file=str(pattern))
    return files


def _expanded(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Yield what matches the parts of a glob below a folder."""
    if not parts:
        yield folder
        return
    first, *rest = parts
    if first == "**":
        for inner in _folders_under(folder, hidden=True):
            yield from _expanded(inner, rest)
        return
    is_pattern = any(c in first for c in "*?[")
    for path in folder.glob(first) if is_pattern else [folder / first]:
        if path.is_dir() if rest else path.exists() or path.is_symlink():
            yield from _expanded(path, rest)


def _spooled(name: str, stream: BinaryIO, path: Path) -> Source:
    with path.open("wb") as file:
        shutil.copyfileobj(stream, file)
    return file_source(path, name)
