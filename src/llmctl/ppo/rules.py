"""Rules that score responses without a model: built-in ones, and functions of the user's.

In: the name of a rule. Out: a function from prompts, responses and right answers to scores.
"""

import importlib
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.errors import DataError, UserError

BUILT_IN = "exact, regex:PATTERN, length:WORDS, repetition, python:package.module.function"
GRAM = 3
"""Words in a row that count as one for `repetition`."""


@dataclass(frozen=True)
class Told:
    """What a rule is told of one response."""

    prompt: Any
    """Text, or a list of messages."""
    response: str
    answer: str | None
    """What is right, where the data says it."""
    name: str
    """Where the prompt stands."""


Rule = Callable[[Sequence[Told]], list[float]]


def find_rule(name: str) -> Rule:
    """The function of a rule.

    Raises:
        UserError: no such rule, or an argument that makes no sense.
    """
    kind, _, argument = name.partition(":")
    if kind == "exact" and not argument:
        return _each(exact)
    if kind == "repetition" and not argument:
        return _each(lambda told: repetition(told.response))
    if kind == "regex" and argument:
        try:
            pattern = re.compile(argument)
        except re.error as error:
            raise UserError(f"--reward-rule {name}: no regular expression: {error}") from None
        return _each(lambda told: float(pattern.search(told.response) is not None))
    if kind == "length" and argument:
        if not argument.isdecimal() or not int(argument):
            raise UserError(f"--reward-rule {name}: expected a number of words, got {argument!r}")
        return _each(lambda told: length(told.response, int(argument)))
    if kind == "python" and argument:
        return _python(name, argument)
    raise UserError(f"no reward rule `{name}`", hint=f"there is {BUILT_IN}")


def exact(told: Told) -> float:
    """1 for the right answer, but for case, white space and one full stop; else 0.

    Raises:
        DataError: the prompt comes without an answer.
    """
    if told.answer is None:
        raise DataError(
            f"--reward-rule exact needs answers, and {told.name} has none",
            hint="give the rows a column `answer`",
        )
    return float(plain(told.response) == plain(told.answer))


def length(response: str, words: int) -> float:
    """Minus how far a response is from so many words, as a share of them; -1 at the least."""
    return -min(1.0, abs(len(response.split()) - words) / words)


def repetition(response: str) -> float:
    """Minus the share of runs of three words that stood in the response before."""
    said = response.split()
    grams = [tuple(said[i : i + GRAM]) for i in range(len(said) - GRAM + 1)]
    return len(set(grams)) / len(grams) - 1 if grams else 0.0


def plain(text: str) -> str:
    """A text without case, superfluous white space and a full stop at its end."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def _each(score: Callable[[Told], float]) -> Rule:
    return lambda told: [score(one) for one in told]


def _python(name: str, path: str) -> Rule:
    """A function of the user's: prompts, completions and answers in, a score each out."""
    module_name, _, function_name = path.rpartition(".")
    if not module_name:
        raise UserError(
            f"--reward-rule {name}: expected python:package.module.function",
            hint="a file rules.py here with a function `polite` is python:rules.polite",
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # as below: the user's module may raise anything
        raise UserError(f"--reward-rule {name}: {type(error).__name__}: {error}") from error
    function = vars(module).get(function_name)
    if function is None:
        raise UserError(f"--reward-rule {name}: {module_name} has no {function_name}")
    if not callable(function):
        raise UserError(f"--reward-rule {name}: {path} is no function")

    def score(told: Sequence[Told]) -> list[float]:
        found = _call(function, name, told)
        if len(found) != len(told):
            raise DataError(
                f"--reward-rule {name} gave {len(found):,} scores for {len(told):,} responses"
            )
        return found

    return score


def _call(function: Callable[..., Any], name: str, told: Sequence[Told]) -> list[float]:
    """Call code that may fail in any way, and say at which texts it did."""
    columns = {
        "prompts": [one.prompt for one in told],
        "completions": [one.response for one in told],
        "answers": [one.answer for one in told],
    }
    try:
        return [float(score) for score in function(**columns)]
    except Exception as error:  # a user's function may raise anything
        raise DataError(
            f"--reward-rule {name} raised {type(error).__name__}: {error}, given {len(told):,} "
            f"responses, the first to {told[0].name}: {told[0].response[:80]!r}",
            hint="it is called with prompts, completions and answers, lists of one length, by name",
        ) from error


def require_finite(source: str, scores: Sequence[float], told: Sequence[Told]) -> None:
    """Refuse a score that is no number.

    Raises:
        DataError: naming the source and the text.
    """
    for score, one in zip(scores, told, strict=True):
        if not math.isfinite(score):
            raise DataError(
                f"{source} gave {score} for the response to {one.name}: {one.response[:80]!r}",
                hint="a score must be a finite number",
            )
