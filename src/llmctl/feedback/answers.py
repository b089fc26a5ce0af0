"""The two files of a ranking: the answers of people, and the responses that a model has written.

In: a journal's rows. Out: which questions a person has answered, and which prompts have responses.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmctl.data.append_log import AppendLog, Row, open_append_log, read_append_log
from llmctl.errors import OutputError
from llmctl.feedback.questions import Question, are_ranks, canonical
from llmctl.runs.lock import locked_file


class Answers:
    """What people have answered, one of whom is answering now."""

    def __init__(self, journal: AppendLog, annotator: str) -> None:
        """Take the rows of everybody, and the name of who is asked."""
        self._journal, self._annotator = journal, annotator
        self._keys = [key_of(row) for row in journal.rows]
        self.mine = settled(journal.rows, annotator)
        """Question's key -> whether it was skipped."""

    def add(self, question: Question, ranks: Sequence[int] | None) -> None:
        """Append an answer; without ranks the question is skipped.

        Raises:
            OutputError: another program has changed the file.
            ResourceError: the disk is full or fails.
        """
        row = {
            "prompt": question.prompt,
            "responses": list(question.responses),
            "ranks": None if ranks is None else list(ranks),
            "annotator": self._annotator,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._journal.append(row)
        self._keys.append(question.key)
        self.mine[question.key] = ranks is None

    def last(self) -> str | None:
        """The key of the file's last answer, if it is this person's."""
        rows = self._journal.rows
        return self._keys[-1] if rows and rows[-1]["annotator"] == self._annotator else None

    def take_back(self) -> None:
        """Remove the last answer, which is this person's.

        Raises:
            OutputError: another program has changed the file.
            ResourceError: the disk fails.
        """
        self._journal.drop_last()
        self._keys.pop()
        self.mine = settled(self._journal.rows, self._annotator)


@dataclass(frozen=True)
class Written:
    """The responses that a model has written so far."""

    journal: AppendLog
    settings: Mapping[str, Any]
    """What they depend on, beside the prompt."""

    def add(self, question: Question) -> None:
        """Keep the responses to a prompt.

        Raises:
            OutputError: another program has changed the file.
            ResourceError: the disk is full or fails.
        """
        self.journal.append(
            {
                "prompt": question.prompt,
                "responses": list(question.responses),
                "settings": dict(self.settings),
            }
        )

    def by_prompt(self) -> dict[str, tuple[str, ...]]:
        """The responses to each prompt, by its canonical JSON."""
        return by_prompt(self.journal.rows)


@contextmanager
def open_answers(out: Path, annotator: str) -> Iterator[Answers]:
    """The file of answers, locked.

    Raises:
        OutputError: in use by another run, not a file of answers, or not to be written.
        ResourceError: the disk is full or fails.
    """
    with locked_file(out), open_append_log(out, check_answer) as journal:
        yield Answers(journal, annotator)


@contextmanager
def open_written(out: Path, settings: Mapping[str, Any]) -> Iterator[Written]:
    """The file of responses beside the answers, which locks it.

    Raises:
        OutputError: it holds something else, or responses of other settings.
        ResourceError: the disk is full or fails.
    """
    path = written_path(out)
    with open_append_log(path, check_written) as journal:
        require_settings(journal.rows, settings, path)
        yield Written(journal, settings)


def read_answers(out: Path, annotator: str) -> dict[str, bool]:
    """What a person has answered so far, as `Answers.mine`; nothing is written.

    Raises:
        OutputError: not a file of answers.
    """
    return settled(read_append_log(out, check_answer).rows, annotator)


def read_written(out: Path, settings: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """What a model has written so far, as `Written.by_prompt`; nothing is written.

    Raises:
        OutputError: it holds something else, or responses of other settings.
    """
    rows = read_append_log(written_path(out), check_written).rows
    require_settings(rows, settings, written_path(out))
    return by_prompt(rows)


def written_path(out: Path) -> Path:
    """Where the responses are kept: `feedback.responses.jsonl` beside `feedback.jsonl`."""
    return out.with_name(f"{out.stem}.responses.jsonl")


def settled(rows: Sequence[Row], annotator: str) -> dict[str, bool]:
    """Key -> whether it was skipped, of every question that a person has answered."""
    return {key_of(row): row["ranks"] is None for row in rows if row["annotator"] == annotator}


def by_prompt(rows: Sequence[Row]) -> dict[str, tuple[str, ...]]:
    """Canonical prompt -> responses."""
    return {canonical(row["prompt"]): tuple(row["responses"]) for row in rows}


def key_of(row: Row) -> str:
    """The key of the question that a row answers."""
    return Question(row["prompt"], tuple(row["responses"])).key


def check_answer(row: Row) -> str | None:
    """What keeps a row from being an answer."""
    if wrong := _check_question(row):
        return wrong
    ranks = row.get("ranks", ())
    if ranks is not None and not are_ranks(ranks, len(row["responses"])):
        return "holds a row without `ranks`: not a file of answers"
    if not isinstance(row.get("annotator"), str):
        return "holds a row without `annotator`: not a file of answers"
    return None


def check_written(row: Row) -> str | None:
    """What keeps a row from being responses that a model wrote for a ranking."""
    if not isinstance(row.get("settings"), dict):
        return "holds a row without `settings`: not llmctl's responses"
    return _check_question(row)


def _check_question(row: Row) -> str | None:
    if not isinstance(row.get("prompt"), str | list):
        return "holds a row without `prompt`"
    texts = row.get("responses")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return "holds a row without `responses`"
    return None


def require_settings(rows: Sequence[Row], settings: Mapping[str, Any], path: Path) -> None:
    """Refuse to mix responses of two models, or of two ways to sample.

    Raises:
        OutputError: naming what differs.
    """
    for line, row in enumerate(rows, start=1):
        for name, value in settings.items():
            if row["settings"].get(name) != value:
                raise OutputError(
                    f"responses of another `{name}`: {row['settings'].get(name)!r}, not {value!r}",
                    file=path,
                    line=line,
                    hint="give the settings of before, or choose another --out",
                )
