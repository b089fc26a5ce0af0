"""What the browser gets: the page, which carries all it needs, and the state that it shows.

In: a session. Out: HTML, and the state as JSON has it.
"""

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmctl.feedback.session import Session
from llmctl.feedback.terminal import turns

_FOLDER = Path(__file__).with_name("web")


@dataclass(frozen=True)
class Texts:
    """What the page says besides the questions."""

    out: str
    """The file of answers."""
    command: str
    """What to do with it."""


def next_command(out: Path, model: str | None) -> str:
    """The command that learns from the answers, with a model that wrote them to start from."""
    start = shlex.quote(model) if model else "MODEL"
    return f"llmctl reward --model {start} --data {shlex.quote(str(out))} -o runs/reward"


def state(session: Session, texts: Texts) -> dict[str, Any]:
    """All that the page shows: what is asked, and how far it is."""
    question, counts = session.current(), session.counts()
    shown: dict[str, Any] = {
        "phase": "ask" if question else "wait" if counts.remaining else "done",
        "annotator": session.annotator,
        "can_undo": session.can_undo(),
        **asdict(texts),
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
    """The page, whose script and style are let in by the nonce."""
    text = (_FOLDER / "rank.html").read_text(encoding="utf-8")
    for name in ("rank.css", "rank.js"):
        text = text.replace(f"{{{{{name}}}}}", (_FOLDER / name).read_text(encoding="utf-8"))
    return text.replace("{{nonce}}", nonce)
