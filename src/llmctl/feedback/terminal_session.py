"""Rank in the terminal, or by lines from a pipe.

In: a session, and lines such as `2 1=3`. Out: the questions on stderr, the answers in the file.
"""

import sys

from llmctl.console import CONTROL_CHARACTERS, log
from llmctl.data.schemas import Message
from llmctl.errors import UserError
from llmctl.feedback.questions import Question
from llmctl.feedback.session import Session

HELP_TEXT = (
    "best first: 2 1=3 puts response 2 before 1 and 3, which tie; those left out share the last "
    "place\ns skips the prompt, u takes the last answer back, q leaves"
)
QUERY = "rank (? helps): "


def rank_in_terminal(session: Session) -> None:
    """Ask until all is answered or the person leaves; the end of a pipe leaves, too.

    Raises:
        UserError: stdin is closed, the answers cannot be kept, or the model cannot write.
    """
    if sys.stdin is None:
        raise UserError("nobody to ask: stdin is closed")
    shown: Question | None = None
    while True:
        if session.current() is None and session.counts().remaining:
            log.info("the model is writing …")
        question = session.wait()
        if question is not None and question is not shown:
            _print(_text(session, question))
        shown = question
        line = _read(QUERY if question else "all is answered; u takes the last back, Enter ends: ")
        if line is None or line == "q" or (question is None and line != "u"):
            return
        if message := _run_line(session, question, line):
            _print(f"{message}\n")


def _run_line(session: Session, question: Question | None, line: str) -> str | None:
    """Carry out a line; return a message about it, None where there is none."""
    if line == "u":
        return None if session.undo() else "nothing to take back"
    assert question is not None
    if line in ("", "?"):
        return HELP_TEXT
    try:
        ranks = None if line == "s" else parse_order(line, len(question.texts))
    except UserError as error:
        return f"{error}; ? helps"
    session.answer(question.key, ranks)
    return None


def parse_order(line: str, count: int) -> list[int]:
    """Parse the rank of each of so many texts, from their numbers in order of preference.

    Raises:
        UserError: no such number, one that comes twice, a tie with nothing, or another character.
    """
    groups: list[list[int]] = []
    is_tie = False
    for c in line:
        if c == "=":
            if not groups or is_tie:
                raise UserError("= stands between two numbers")
            is_tie = True
        elif c.isascii() and c.isdigit():
            number = int(c)
            if not 1 <= number <= count:
                raise UserError(f"there is no response {c}: they are 1 to {count}")
            if any(number in group for group in groups):
                raise UserError(f"response {c} comes twice")
            if is_tie:
                groups[-1].append(number)
            else:
                groups.append([number])
            is_tie = False
        elif c not in " ,>\t":
            raise UserError(f"expected numbers such as 2 1=3, got {c!r}")
    if is_tie:
        raise UserError("= stands between two numbers")
    if not groups:
        raise UserError("expected numbers such as 2 1=3")
    places = {number: rank for rank, group in enumerate(groups, start=1) for number in group}
    return [places.get(number, len(groups) + 1) for number in range(1, count + 1)]


def _text(session: Session, question: Question) -> str:
    """Return a question as it is shown."""
    counts = session.counts()
    parts = [f"\n--- {counts.settled + 1} of {counts.total} ---\n"]
    parts += [f"{role}:\n{text}\n" for role, text in turns(question.prompt)]
    for number, text in enumerate(session.shown(question), start=1):
        parts.append(f"[{number}]\n{text or '(empty)'}\n")
    return "\n".join(parts)


def turns(prompt: str | list[Message]) -> list[tuple[str, str]]:
    """Return role and text of each turn of a prompt."""
    if isinstance(prompt, str):
        return [("prompt", prompt)]
    return [(message["role"], message["content"]) for message in prompt]


def _print(text: str) -> None:
    """Print to stderr, without control characters."""
    print(text.translate(CONTROL_CHARACTERS), file=sys.stderr)


def _read(prompt: str) -> str | None:
    """Read the next line without the blank around it, None at the end."""
    print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        print(file=sys.stderr)
    return line.decode(errors="replace").strip() if line else None
