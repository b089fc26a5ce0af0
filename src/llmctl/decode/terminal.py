"""What a user types in a conversation: messages of one line or many, commands, and Ctrl-C.

In: a terminal, edited with readline, or a pipe. Out: turns, one at a time.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from types import FrameType
from typing import BinaryIO, Self

from llmctl.console import SEEN, log
from llmctl.data.rows import read_lines
from llmctl.errors import DataError, UserError

QUOTES = '"""'
PROMPT, MORE = "> ", ". "
NextLine = Callable[[str], str]
"""Gives the next line, without its end, after showing a prompt; raises EOFError at the end."""


class ReplyInterrupt(KeyboardInterrupt):
    """Ctrl-C where it ends what the program does, and not the program."""


@dataclass(frozen=True)
class UserInput:
    """One thing that the user said."""

    text: str
    """The message, or what follows a command."""
    command: str | None = None
    """With its slash."""


def read_input(next_line: NextLine) -> UserInput | None:
    """The next turn, None at the end.

    A line that ends in a backslash goes on in the next, a block between triple quotes is always a
    message, and two slashes begin a message with one.

    Raises:
        DataError: a block that does not end.
    """
    try:
        line = next_line(PROMPT)
    except EOFError:
        return None
    if line.lstrip().startswith(QUOTES):
        return UserInput(_read_block(line.lstrip().removeprefix(QUOTES), next_line))
    while line.endswith("\\"):
        try:
            line = f"{line[:-1]}\n{next_line(MORE)}"
        except EOFError:
            line = line[:-1]
    if line.startswith("//") or not line.startswith("/"):
        return UserInput(line[1:] if line.startswith("//") else line)
    command, *rest = line.split(maxsplit=1)
    return UserInput(rest[0].rstrip() if rest else "", command)


def _read_block(text: str, next_line: NextLine) -> str:
    while not text.rstrip().endswith(QUOTES):
        try:
            text += f"\n{next_line(MORE)}"
        except EOFError:
            raise DataError(
                f"a block that begins with {QUOTES} does not end: it was dropped",
                hint=f"end it with {QUOTES}",
            ) from None
    return text.rstrip().removesuffix(QUOTES).removeprefix("\n").removesuffix("\n")


class Pipe:
    """Turns from a pipe or a file."""

    is_terminal = False

    def __init__(self, stream: BinaryIO) -> None:
        """Read the stream's lines as they come."""
        self._lines = read_lines(stream, "stdin")

    def read(self) -> UserInput | None:
        """The next turn, None at the end.

        Raises:
            DataError: what is not UTF-8, or a block that does not end.
        """
        return read_input(self._line)

    def stoppable(self) -> AbstractContextManager[None]:
        """Nothing to do around a reply: Ctrl-C ends the program."""
        return nullcontext()

    def visible(self, text: str) -> str:
        """The model's text as it is."""
        return text

    def _line(self, _: str) -> str:
        for _number, line in self._lines:
            return line.rstrip("\r\n")
        raise EOFError


class Terminal:
    """Turns typed at a terminal, with editing and history; used as a context, it minds Ctrl-C."""

    is_terminal = True

    def __init__(self) -> None:
        """Without a terminal to write to, the prompt goes to stderr and nothing can be edited."""
        self._typed: Callable[[], str] = str
        self._is_edited = sys.stdout.isatty()
        self._lines = 0
        self._is_armed = self._was_pressed = False

    def __enter__(self) -> Self:
        """Take SIGINT, unless it is ignored; make a paste of many lines one message."""
        if self._is_edited:
            with suppress(ImportError):
                import readline

                if os.environ.get("TERM") != "dumb":
                    readline.parse_and_bind("set enable-bracketed-paste on")
                self._typed = readline.get_line_buffer
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Give SIGINT back."""
        signal.signal(signal.SIGINT, self._before)

    def read(self) -> UserInput | None:
        """The next turn, None at Ctrl-D.

        Raises:
            ReplyInterrupt: Ctrl-C was pressed twice where nothing was typed.
        """
        was_hinted = False
        while True:
            self._lines, self._was_pressed = 0, False
            try:
                with self.stoppable():
                    turn = read_input(self._line)
            except ReplyInterrupt:
                print(file=sys.stderr)
                was_empty = self._lines == 1 and not self._typed()
                if was_empty and was_hinted:
                    raise
                if was_empty:
                    print("(Ctrl-C again, Ctrl-D or /exit to leave)", file=sys.stderr)
                was_hinted = was_empty
            except DataError as error:
                log.error("%s", error)
            else:
                if turn is None:
                    print(file=sys.stderr)
                return turn

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """While the body runs, Ctrl-C ends it by a `ReplyInterrupt`; elsewhere it waits for the next body.

        A press is one `ReplyInterrupt`, however often it is repeated until the user is asked again.
        """
        if self._was_pressed:
            raise ReplyInterrupt
        self._is_armed = True
        try:
            yield
        finally:
            self._is_armed = False

    def visible(self, text: str) -> str:
        """The model's text, with no control characters in it."""
        return text.translate(SEEN)

    def _handle(self, _: int, __: FrameType | None) -> None:
        self._was_pressed = True
        if self._is_armed:
            self._is_armed = False
            raise ReplyInterrupt

    def _line(self, prompt: str) -> str:
        self._lines += 1
        try:
            if self._is_edited:
                line = input(prompt)
            else:
                print(prompt, end="", file=sys.stderr, flush=True)
                line = sys.stdin.readline()
                if not line:
                    raise EOFError
            line.encode()
        except UnicodeError:
            raise DataError("what was typed is not UTF-8: it was dropped") from None
        return line.rstrip("\r\n")


@contextmanager
def open_input() -> Iterator[Terminal | Pipe]:
    """Where the user's turns come from.

    Raises:
        UserError: stdin is closed.
    """
    if sys.stdin is None:
        raise UserError("nobody to talk with: stdin is closed")
    if not sys.stdin.isatty():
        yield Pipe(sys.stdin.buffer)
        return
    with Terminal() as terminal:
        yield terminal
