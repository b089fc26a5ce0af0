"""llmctl in processes of its own: run to its end, started and watched, shown on a terminal."""

import contextlib
import os
import pty
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

LLMCTL = (sys.executable, "-m", "llmctl")


def run_llmctl(
    *arguments: object, seconds: float = 300, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with these environment variables."""
    return subprocess.run(
        [*LLMCTL, *map(str, arguments)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def spawn(
    *arguments: object, launcher: Sequence[str] = LLMCTL[1:], **options: Any
) -> subprocess.Popen[str]:
    """Start a command, and let it go on."""
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait until a process that runs has made a folder, or has written to a file."""
    limit = time.monotonic() + seconds
    while not (path.exists() and (path.is_dir() or path.stat().st_size)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.02)


def shown_on_a_terminal(
    *arguments: object, stderr: int | IO[Any] | None = None, **variables: str
) -> str:
    """What a command that ends well writes to a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*LLMCTL, *map(str, arguments)],
        stdout=theirs,
        stderr=stderr,
        env={**os.environ, **variables},
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed, as Linux says it
        while block := os.read(ours, 65536):
            shown += block
    assert process.wait() == 0
    os.close(ours)
    return shown.decode()


def call_llmctl(arguments: Sequence[str]) -> int:
    """Run a command in this process; its exit code."""
    from llmctl.cli import main

    sys.argv = ["llmctl", *arguments]
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
