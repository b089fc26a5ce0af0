"""Input of a conversation: messages of one line or many, slash commands, and Ctrl-C.

In: a terminal, edited with readline, or a pipe. Out: one `UserInput` at a time.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from types import FrameType
from typing import BinaryIO, Self

from llmctl.console import CONTROL_CHARACTERS, log
from llmctl.data.rows import read_lines
from llmctl.errors import DataError, UserError

QUOTES = '"""'
PROMPT, MORE = "> ", ". "
NextLine = Callable[[str], str]
"""Shows a prompt and returns the next line without its end; raises EOFError at the end."""


class ReplyInterrupt(KeyboardInterrupt):
    """Ctrl-C that ends a reply or a line, and not the program."""


@dataclass(frozen=True)
class UserInput:
    """One message or slash command."""

    text: str
    """The message, or the argument of a command."""
    command: str | None = None
    """With its slash."""


def read_input(next_line: NextLine) -> UserInput | None:
    """Read the next input; None at the end.

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
    """Input from a pipe or a file."""

    is_terminal = False

    def __init__(self, stream: BinaryIO) -> None:
        """Read the stream's lines as they come."""
        self._lines = read_lines(stream, "stdin")

    def read(self) -> UserInput | None:
        """Read the next input; None at the end.

        Raises:
            DataError: text that is not UTF-8, or a block that does not end.
        """
        return read_input(self._line)

    def interruptible(self) -> AbstractContextManager[None]:
        """Do nothing: Ctrl-C ends the program."""
        return nullcontext()

    def visible(self, text: str) -> str:
        """Return the model's text as it is."""
        return text

    def _line(self, _: str) -> str:
        for _number, line in self._lines:
            return line.rstrip("\r\n")
        raise EOFError


class Terminal:
    """Input typed at a terminal, with editing and history; as a context, it handles Ctrl-C."""

    is_terminal = True

    def __init__(self, commands: Iterable[str] = ()) -> None:
        """Complete these commands; without a terminal as stdout there is no editing."""
        self._commands = tuple(commands)
        self._line_buffer: Callable[[], str] = str
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
                readline.set_completer_delims(" ")
                readline.set_completer(self._complete)
                readline.parse_and_bind("tab: complete")
                self._line_buffer = readline.get_line_buffer
        self._previous_handler = signal.getsignal(signal.SIGINT)
        if self._previous_handler is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Give SIGINT back."""
        signal.signal(signal.SIGINT, self._previous_handler)

    def read(self) -> UserInput | None:
        """Read the next input; None at Ctrl-D.

        Raises:
            ReplyInterrupt: Ctrl-C was pressed twice on an empty line.
        """
        was_hinted = False
        while True:
            self._lines, self._was_pressed = 0, False
            try:
                with self.interruptible():
                    user_input = read_input(self._line)
            except ReplyInterrupt:
                print(file=sys.stderr)
                was_empty = self._lines == 1 and not self._line_buffer()
                if was_empty and was_hinted:
                    raise
                if was_empty:
                    print("(Ctrl-C again, Ctrl-D or /exit to leave)", file=sys.stderr)
                was_hinted = was_empty
            except DataError as error:
                log.error("%s", error)
            else:
                if user_input is None:
                    print(file=sys.stderr)
                return user_input

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Have Ctrl-C end the body by a `ReplyInterrupt`; outside, it waits for the next body.

        Repeated presses are one `ReplyInterrupt` until the next input is read.
        """
        if self._was_pressed:
            raise ReplyInterrupt
        self._is_armed = True
        try:
            yield
        finally:
            self._is_armed = False

    def visible(self, text: str) -> str:
        """Return the model's text without control characters."""
        return text.translate(CONTROL_CHARACTERS)

    def _handle(self, _: int, __: FrameType | None) -> None:
        self._was_pressed = True
        if self._is_armed:
            self._is_armed = False
            raise ReplyInterrupt

    def _complete(self, text: str, state: int) -> str | None:
        """The command number `state` that begins with a text, as readline asks for them."""
        matches = [name for name in self._commands if text and name.startswith(text)]
        return matches[state] if state < len(matches) else None

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
def open_input(commands: Iterable[str] = ()) -> Iterator[Terminal | Pipe]:
    """Open stdin as a terminal or a pipe.

    Raises:
        UserError: stdin is closed.
    """
    if sys.stdin is None:
        raise UserError("nobody to talk with: stdin is closed")
    if not sys.stdin.isatty():
        yield Pipe(sys.stdin.buffer)
        return
    with Terminal(commands) as terminal:
        yield terminal
