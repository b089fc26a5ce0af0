"""Write files atomically, hash them, and turn the disk's errors into messages."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llmctl.errors import OutputError, ResourceError
from llmctl.redact import redact, redacted

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""What a file begins with that git-lfs has not fetched."""
FETCH_LFS = "fetch the files of that repository, in its folder: git lfs pull"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's errors into errors that name the directory.

    Raises:
        OutputError: read-only, not permitted, or in the way of a file.
        ResourceError: no space left, with the numbers; a file too large; a disk that fails.
    """
    try:
        yield
    except SafetensorError as error:
        match = re.search(r"os error (\d+)", str(error))
        if refusal := _refusal(int(match[1]), path) if match else None:
            raise refusal from None
        raise
    except OSError as error:
        if refusal := _refusal(error.errno, path):
            raise refusal from None
        raise


def check_out(out: Path | None, *, overwrite: bool) -> None:
    """Refuse a place that cannot take a file, before anything is done for it.

    Raises:
        OutputError: a directory, a file that must not be replaced, or a place not to be written.
        ResourceError: the disk is full.
    """
    if out is None:
        return
    if out.is_dir():
        raise OutputError("a directory is in the way of the output file", file=out)
    if out.exists() and not out.is_file():
        raise OutputError("not a regular file", file=out)
    if out.exists() and not overwrite:
        raise OutputError("the output file exists", file=out, hint="choose another, or --overwrite")
    if not out.absolute().parent.is_dir():
        raise OutputError("no such directory", file=out.parent)
    with writing(out):
        staged(out).touch()
        staged(out).unlink()


def _refusal(number: int | None, path: Path) -> OutputError | ResourceError | None:
    """Return the error for an operating system's errno, None for one not of the disk."""
    if number in (errno.ENOSPC, errno.EDQUOT):
        return no_space(path)
    if number == errno.EFBIG:
        return ResourceError(
            "a file grew beyond the size that is allowed",
            file=path,
            hint="raise the limit (ulimit -f) or choose another file system for --out",
        )
    if number == errno.EIO:
        return ResourceError(
            "the disk failed (input/output error)",
            file=path,
            hint="check the disk and its connection, or choose another --out",
        )
    refused = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG)
    if number in refused:
        return OutputError(f"cannot write here: {os.strerror(number)}", file=path)
    return None


def no_space(path: Path, needed: int | None = None) -> ResourceError:
    """Return the error for a full disk, with the bytes needed and free."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    want = "" if needed is None else f"{needed:,} bytes needed, "
    return ResourceError(
        f"no space left on the disk: {want}{free:,} bytes free",
        file=path,
        hint="free some space or choose another --out",
    )


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file stands for one that git-lfs has not fetched."""
    with file.open("rb") as opened:
        return opened.read(len(LFS_POINTER)) == LFS_POINTER


def sha256_file(path: Path) -> str:
    """Return the hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_folder(folder: Path) -> str:
    """Return the hex digest of names and contents of a folder's files, in order of name."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file atomically, without secrets and non-finite numbers."""
    shown = finite(redacted(value))
    text = json.dumps(shown, indent=2, default=lambda item: redact(str(item)), allow_nan=False)
    replace_file(path, f"{text}\n".encode())


def json_line(value: Any, *, sort_keys: bool = False) -> str:
    """Return JSON on one line, characters as they are.

    Half a surrogate pair, which UTF-8 cannot hold, is escaped as JSON escapes it.
    """
    text = json.dumps(value, ensure_ascii=False, sort_keys=sort_keys)
    return text.encode(errors="backslashreplace").decode()


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file atomically: a reader sees the old or the new one, also after a power cut."""
    temporary = staged(path)
    temporary.write_bytes(content)
    fsync(temporary)
    temporary.replace(path)


@contextmanager
def filled_folder(folder: Path) -> Iterator[Path]:
    """Have the body fill a sibling of a folder, which then takes its place."""
    staging = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    follow_umask(staging)
    replace_folder(staging, folder)


def replace_folder(staging: Path, folder: Path) -> None:
    """Rename a filled staging folder once all of it is on the disk."""
    for path in (*staging.rglob("*"), staging):
        fsync(path)
    if folder.exists():  # of a run that was killed before it could say that it was complete
        shutil.rmtree(folder)
    staging.rename(folder)
    fsync(folder.parent)


def fsync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def staged(path: Path) -> Path:
    """Return the temporary path of a file."""
    return path.with_name(f".{path.name}.tmp")


def finite(value: Any) -> Any:
    """Put None for every float that JSON cannot hold, also in mappings and lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def follow_umask(folder: Path) -> None:
    """Give files the mode of the umask (safetensors writes 0600)."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~umask)
