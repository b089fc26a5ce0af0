"""The two files of a ranking: the answers of people, and the responses of a model.

In: rows of an append log. Out: which questions a person has answered, and which prompts have
responses.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmctl.config.commands.rank import normal_name
from llmctl.data.append_log import AppendLog, Row, open_append_log, read_append_log
from llmctl.errors import OutputError
from llmctl.feedback.questions import Question, is_ranking, prompt_key
from llmctl.runs.lock import locked_file


class AnswerFile:
    """The answers of all people, one of whom is answering now."""

    def __init__(self, log: AppendLog, annotator: str) -> None:
        """Take the answers of everybody, and the name of this person."""
        self._log, self._annotator = log, annotator
        self._keys = [key_of(row) for row in log.rows]
        self.mine = answered_by(log.rows, annotator)
        """Key -> whether it was skipped, of the questions that this person has answered."""

    def add(self, question: Question, ranks: Sequence[int] | None) -> None:
        """Append an answer; without ranks the question is skipped.

        Raises:
            OutputError: another program has changed the file.
            ResourceError: the disk is full or fails.
        """
        row = {
            **question.row(),
            "ranks": None if ranks is None else list(ranks),
            "annotator": self._annotator,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._log.append(row)
        self._keys.append(question.key)
        self.mine[question.key] = ranks is None

    def last(self) -> str | None:
        """Return the key of the file's last answer, if it is this person's."""
        rows = self._log.rows
        return self._keys[-1] if rows and _is_of(rows[-1], self._annotator) else None

    def remove_last(self) -> None:
        """Remove the last answer, which is this person's.

        Raises:
            OutputError: another program has changed the file.
            ResourceError: the disk fails.
        """
        self._log.drop_last()
        self._keys.pop()
        self.mine = answered_by(self._log.rows, self._annotator)


@dataclass(frozen=True)
class ResponseFile:
    """The responses that a model has generated so far."""

    log: AppendLog
    settings: Mapping[str, Any]
    """Settings that they depend on, beside the prompt."""

    def add(self, question: Question) -> None:
        """Append the responses to a prompt.

        Raises:
            OutputError: another program has changed the file.
            ResourceError: the disk is full or fails.
        """
        self.log.append({**question.row(), "settings": dict(self.settings)})

    def by_prompt(self) -> dict[str, tuple[str, ...]]:
        """Return the responses to each prompt, by its canonical JSON."""
        return by_prompt(self.log.rows)


@contextmanager
def open_answers(out: Path, annotator: str) -> Iterator[AnswerFile]:
    """Open the file of answers, locked.

    Raises:
        OutputError: in use by another run, not a file of answers, or not to be written.
        ResourceError: the disk is full or fails.
    """
    with locked_file(out), open_append_log(out, check_answer_row) as log:
        yield AnswerFile(log, annotator)


@contextmanager
def open_responses(out: Path, settings: Mapping[str, Any]) -> Iterator[ResponseFile]:
    """Open the file of responses beside the answers, whose lock guards it.

    Raises:
        OutputError: it holds something else, or responses of other settings.
        ResourceError: the disk is full or fails.
    """
    path = responses_path(out)
    with open_append_log(path, check_response_row) as log:
        require_settings(log.rows, settings, path)
        yield ResponseFile(log, settings)


def read_answers(out: Path, annotator: str) -> dict[str, bool]:
    """Read what a person has answered so far, as `AnswerFile.mine`.

    Raises:
        OutputError: not a file of answers.
    """
    return answered_by(read_append_log(out, check_answer_row).rows, annotator)


def read_responses(out: Path, settings: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Read what a model has generated so far, as `ResponseFile.by_prompt`.

    Raises:
        OutputError: it holds something else, or responses of other settings.
    """
    rows = read_append_log(responses_path(out), check_response_row).rows
    require_settings(rows, settings, responses_path(out))
    return by_prompt(rows)


def responses_path(out: Path) -> Path:
    """Return the file of responses: `feedback.responses.jsonl` beside `feedback.jsonl`."""
    return out.with_name(f"{out.stem}.responses.jsonl")


def answered_by(rows: Sequence[Row], annotator: str) -> dict[str, bool]:
    """Return key -> whether it was skipped, of every question that a person has answered."""
    return {key_of(row): row["ranks"] is None for row in rows if _is_of(row, annotator)}


def _is_of(row: Row, annotator: str) -> bool:
    """Whether a person gave an answer, whatever form of Unicode the name has in the row."""
    return normal_name(row["annotator"]) == annotator


def by_prompt(rows: Sequence[Row]) -> dict[str, tuple[str, ...]]:
    """Return canonical prompt -> responses."""
    return {prompt_key(row["prompt"], row.get("tools")): tuple(row["responses"]) for row in rows}


def key_of(row: Row) -> str:
    """Return the key of the question that a row answers."""
    return Question(row["prompt"], tuple(row["responses"]), row.get("tools")).key


def check_answer_row(row: Row) -> str | None:
    """Return what is wrong with a row of answers, None where nothing is."""
    if wrong := _check_question(row):
        return wrong
    ranks = row.get("ranks", ())
    if ranks is not None and not is_ranking(ranks, len(row["responses"])):
        return "holds a row without `ranks`: not a file of answers"
    if not isinstance(row.get("annotator"), str):
        return "holds a row without `annotator`: not a file of answers"
    return None


def check_response_row(row: Row) -> str | None:
    """Return what is wrong with a row of responses, None where nothing is."""
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
