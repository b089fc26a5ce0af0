"""Ranking on a page in the browser.

In: a session, and a socket to serve the page on. Out: the page's address on stderr, answers in the
file.
"""

import os
import socket
import subprocess
import sys

from llmctl.feedback.page import Texts
from llmctl.feedback.server import serving
from llmctl.feedback.session import Session


def ask_on_page(
    session: Session, listening: socket.socket, texts: Texts, *, browser: bool | None
) -> None:
    """Serve the page until the person leaves; its address is said also when quiet.

    Args:
        session: what to ask.
        listening: the socket.
        texts: what the page says besides the questions.
        browser: whether to open it; None where a person can be expected to see it.

    Raises:
        UserError: what kept the model from writing.
    """
    with serving(listening, session, texts) as url:
        print(f"rank as {session.annotator}: {url}", file=sys.stderr, flush=True)
        if browser or (browser is None and sys.stderr.isatty() and _has_display()):
            _open(url)
        session.wait_until_finished()


def _has_display() -> bool:
    return sys.platform == "darwin" or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())


def _open(url: str) -> None:
    """Open it from a process of its own: browsers write to stdout, which is the result's."""
    subprocess.Popen(
        [sys.executable, "-m", "webbrowser", url],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
