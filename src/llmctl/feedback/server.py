"""Rank on a page in the browser, served on 127.0.0.1 to one person.

In: a session, and requests of a browser. Out: one page that needs nothing else, the state of the
session as JSON, and answers in the file. The address holds a token that works once; it is exchanged
for a cookie that no script and no other site can use.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from llmctl.console import log
from llmctl.errors import UserError
from llmctl.feedback.session import Session
from llmctl.feedback.terminal_session import turns

WEB = Path(__file__).with_name("web")
HOST = "127.0.0.1"
HOSTS = {HOST, "localhost"}
"""Names under which the page may be asked for; another one is a site that points here."""
Texts = Mapping[str, str]
"""`out`, the file of answers, and `command`, which trains on them, for the page."""
BODY_BYTES = 4096
"""More than the ranks of a question need."""


def state(session: Session, texts: Texts) -> dict[str, Any]:
    """Return the state that the page shows, as JSON."""
    question, counts = session.current(), session.counts()
    shown: dict[str, Any] = {
        "phase": "ask" if question else "wait" if counts.remaining else "done",
        "annotator": session.annotator,
        "can_undo": session.can_undo(),
        **texts,
        **asdict(counts),
        "settled": counts.settled,
        "total": counts.total,
    }
    if question is not None:
        shown["key"] = question.key
        shown["prompt"] = turns(question.prompt)
        shown["responses"] = session.shown(question)
    return shown


def page(nonce: str) -> str:
    """Return the page, whose script and style the nonce lets in."""
    text = (WEB / "rank.html").read_text(encoding="utf-8")
    for name in ("rank.css", "rank.js"):
        text = text.replace(f"{{{{{name}}}}}", (WEB / name).read_text(encoding="utf-8"))
    return text.replace("{{nonce}}", nonce)


def listen(port: int) -> socket.socket:
    """Open a socket on 127.0.0.1; port 0 is a free one.

    Raises:
        UserError: the port is in use, or not to be had.
    """
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        raise UserError(
            f"--port {port}: {(error.strerror or str(error)).lower()}",
            hint="choose another port, or leave it out for a free one",
        ) from None


class _Server(ThreadingHTTPServer):
    """Serves one session to the first browser that has the token."""

    def __init__(self, listening: socket.socket, session: Session, texts: Texts) -> None:
        address = listening.getsockname()
        super().__init__(address, _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.session, self.texts = session, texts
        self.cookie_name = f"llmctl-rank-{address[1]}"  # browsers keep no ports apart
        self.cookie = secrets.token_urlsafe(32)
        self._token: str | None = secrets.token_urlsafe(32)
        self._lock = threading.Lock()
        self.url = f"http://{HOST}:{address[1]}/?token={self._token}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of a request is no bug."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def redeem(self, token: str) -> bool:
        """Whether this is the token, and its first use."""
        with self._lock:
            if self._token is None or not _equal(token, self._token):
                return False
            self._token = None
            return True


@contextmanager
def serving(listening: socket.socket, session: Session, texts: Texts) -> Iterator[str]:
    """Serve while the body runs; yield the address to open."""
    with _Server(listening, session, texts) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="llmctl-page")
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()


class _Refusal(Exception):
    """A request that is not served."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    """AnswerFile one request; whatever is not allowed is refused before anything is read."""

    server: _Server
    timeout = 30
    server_version, sys_version = "llmctl", ""

    def do_GET(self) -> None:
        """Send the page, or the state."""
        self._respond(self._get)

    def do_POST(self) -> None:
        """Take an answer, or another action."""
        self._respond(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a line for each request would hide what matters, and show the token."""

    def _respond(self, serve: Callable[[], None]) -> None:
        try:
            self._require_own_name()
            serve()
        except _Refusal as refusal:
            self._send(refusal.status, "text/plain; charset=utf-8", f"{refusal}\n".encode(), {})

    def _get(self) -> None:
        path, _, query = self.path.partition("?")
        token = parse_qs(query).get("token", [""])[0]
        if path == "/" and token and self.server.redeem(token):
            log.info("the page is open; its address does not work a second time")
            cookie = f"{self.server.cookie_name}={self.server.cookie}"
            self._send_page({"Set-Cookie": f"{cookie}; Path=/; HttpOnly; SameSite=Strict"})
            return
        self._require_cookie()
        if path == "/":
            self._send_page({})
        elif path == "/state":
            self._send_json(HTTPStatus.OK, state(self.server.session, self.server.texts))
        else:
            raise _Refusal(HTTPStatus.NOT_FOUND, "no such page")

    def _post(self) -> None:
        """Carry out an action and send the new state; 409 where it came too late."""
        self._require_cookie()
        if self.headers.get("Origin") != f"http://{self.headers['Host']}":
            raise _Refusal(HTTPStatus.FORBIDDEN, "a request of another site")
        if self.headers.get_content_type() != "application/json":
            raise _Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "not JSON")
        try:
            is_done = self._act(self._body())
        except UserError as error:
            if type(error) is UserError:
                raise _Refusal(HTTPStatus.BAD_REQUEST, str(error)) from None
            log.error("%s", error)
            raise _Refusal(HTTPStatus.INSUFFICIENT_STORAGE, str(error)) from None
        shown = state(self.server.session, self.server.texts)
        if self.path == "/finish":
            shown["phase"] = "stopped"
        self._send_json(HTTPStatus.OK if is_done else HTTPStatus.CONFLICT, shown)
        if self.path == "/finish":
            self.server.session.finish()

    def _act(self, body: dict[str, Any]) -> bool:
        """Carry out the action that the path names; return whether it could be done."""
        session, key = self.server.session, str(body.get("key"))
        match self.path:
            case "/answer":
                return session.answer(key, body.get("ranks") or [])
            case "/skip":
                return session.answer(key, None)
            case "/undo":
                return session.undo()
            case "/finish":
                return True
        raise _Refusal(HTTPStatus.NOT_FOUND, "no such action")

    def _require_own_name(self) -> None:
        """Refuse a request by another host name: a site whose name was made to lead here."""
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or hosts[0].partition(":")[0].lower() not in HOSTS:
            raise _Refusal(HTTPStatus.MISDIRECTED_REQUEST, "this page is on 127.0.0.1 only")

    def _require_cookie(self) -> None:
        """Refuse a browser that did not come with the token."""
        for pair in ";".join(self.headers.get_all("Cookie", [])).split(";"):
            name, _, value = pair.strip().partition("=")
            if name == self.server.cookie_name and _equal(value, self.server.cookie):
                return
        raise _Refusal(
            HTTPStatus.FORBIDDEN,
            "This is not the address that llmctl rank gave, or it was used before: it works once.\n"
            "Start llmctl rank again for a new one; all answers are kept.",
        )

    def _body(self) -> dict[str, Any]:
        """Return the object that was sent."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise _Refusal(HTTPStatus.LENGTH_REQUIRED, "no length")
        if len(length) > len(str(BODY_BYTES)) or int(length) > BODY_BYTES:
            raise _Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"over {BODY_BYTES} bytes")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise _Refusal(HTTPStatus.BAD_REQUEST, "not a JSON object")
        return body

    def _send_page(self, headers: dict[str, str]) -> None:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )
        self._send(
            HTTPStatus.OK,
            "text/html; charset=utf-8",
            page(nonce).encode(),
            {**headers, "Content-Security-Policy": policy},
        )

    def _send_json(self, status: HTTPStatus, value: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(value).encode(), {})

    def _send(self, status: HTTPStatus, kind: str, content: bytes, headers: dict[str, str]) -> None:
        always = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        try:
            self.send_response(status)
            for name, value in {**always, **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        except ConnectionError:
            log.debug("the browser went away")


def _equal(one: str, other: str) -> bool:
    """Whether two secrets are the same, in a time that does not tell how much of them is."""
    return secrets.compare_digest(one.encode(), other.encode())


def rank_on_page(
    session: Session, listening: socket.socket, texts: Texts, *, browser: bool | None
) -> None:
    """Serve the page until the person leaves; its address is printed also when quiet.

    A browser is opened as asked; by default where a person can be expected to see it.

    Raises:
        UserError: the error that ended generation.
    """
    with serving(listening, session, texts) as url:
        print(f"rank as {session.annotator}: {url}", file=sys.stderr, flush=True)
        has_display = sys.platform == "darwin" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
        if browser or (browser is None and sys.stderr.isatty() and has_display):
            subprocess.Popen(  # a process of its own: browsers write to stdout, the result's
                [sys.executable, "-m", "webbrowser", url],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        session.wait_until_finished()
