"""Lock a run directory or a file: one run at a time, and a refusal that names the other one.

The lock is the operating system's, so that it ends with its process however that ends. Its file
names its holder: process id and host, a line each, as filelock's own soft locks do.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout
from safetensors import SafetensorError

from llmctl.errors import OutputError

LOCK = ".llmctl.lock"
PROBE_SECONDS = 0.2
"""Wait for a lock: `is_held` takes it for a moment."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the directory's lock for the body; raise an OutputError where another run has it."""
    with _held(path / LOCK, path, path / "status.json"):
        yield


@contextmanager
def locked_file(file: Path) -> Iterator[None]:
    """Hold a file's lock, which lies beside it; raise an OutputError where another run has it."""
    with _held(file.with_name(f".{file.name}.lock"), file, file):
        yield


@contextmanager
def _held(lock_file: Path, path: Path, record: Path) -> Iterator[None]:
    """Hold a lock; a body that fails before `record` exists leaves no lock file."""
    lock = FileLock(lock_file, timeout=PROBE_SECONDS)
    try:
        lock.acquire()
    except Timeout:
        raise in_use(path, lock_file) from None
    try:
        if not isinstance(lock, SoftFileLock):
            lock_file.write_text(f"{os.getpid()}\n{socket.gethostname()}\n")
        yield
    except BaseException:
        if not record.exists():
            lock_file.unlink(missing_ok=True)
        raise
    finally:
        lock.release()


def is_held(path: Path) -> bool:
    """Whether a live run holds the directory's lock; needs no write permission."""
    try:
        descriptor = os.open(path / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without flock: the lock proper will tell
        return False
    finally:
        os.close(descriptor)
    return False


def in_use(path: Path, lock_file: Path | None = None) -> OutputError:
    """Build the error for a lock that is held, with the process that its file names."""
    try:
        pid, host, *_ = (lock_file or path / LOCK).read_text().split("\n")
    except (OSError, ValueError):
        return OutputError("in use by another run", file=path)
    return OutputError(f"in use by another run (pid {pid} on {host})", file=path)


@contextmanager
def still_there(path: Path) -> Iterator[None]:
    """Raise OutputError where the directory was deleted while the body ran.

    The missing lock file shows it, even if some library made the directory again.
    """
    deleted = OutputError("the run directory was deleted while running", file=path)
    try:
        yield
    except (FileNotFoundError, SafetensorError):
        if not (path / LOCK).exists():
            raise deleted from None
        raise
    if not (path / LOCK).exists():
        raise deleted
