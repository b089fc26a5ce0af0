"""Reward rules, which score responses without a model: built-in ones, and functions of the user's.

In: the name of a rule. Out: a function from samples to scores.
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
from llmctl.numbers import counted
from llmctl.text_forms import normalize_answer, split_words

BUILT_IN = "exact, regex:PATTERN, length:WORDS, repetition, python:package.module.function"
NGRAM = 3
"""Words of the n-grams that `repetition` counts."""


@dataclass(frozen=True)
class Sample:
    """One response, as a reward sees it."""

    prompt: Any
    """Text, or a list of messages."""
    response: str
    reference: str | None
    """The right answer, where the data has one."""
    name: str
    """File and line of the prompt."""


Rule = Callable[[Sequence[Sample]], list[float]]


def find_rule(name: str) -> Rule:
    """Find the function of a rule; raise a UserError for no rule, or an invalid argument."""
    kind, _, argument = name.partition(":")
    if kind == "exact" and not argument:
        return _for_each(exact)
    if kind == "repetition" and not argument:
        return _for_each(lambda sample: repetition(sample.response))
    if kind == "regex" and argument:
        try:
            pattern = re.compile(argument)
        except re.error as error:
            raise UserError(f"--reward-rule {name}: no regular expression: {error}") from None
        return _for_each(lambda sample: float(pattern.search(sample.response) is not None))
    if kind == "length" and argument:
        if not argument.isdecimal() or not int(argument):
            raise UserError(f"--reward-rule {name}: expected a number of words, got {argument!r}")
        return _for_each(lambda sample: length(sample.response, int(argument)))
    if kind == "python" and argument:
        return _import_rule(name, argument)
    raise UserError(f"no reward rule `{name}`", hint=f"there is {BUILT_IN}")


def exact(sample: Sample) -> float:
    """1 for the right answer, but for Unicode form, case, white space and one full stop; else 0.

    Raises:
        DataError: the prompt comes without an answer.
    """
    if sample.reference is None:
        raise DataError(
            f"--reward-rule exact needs answers, and {sample.name} has none",
            hint="give the rows a column `answer`",
        )
    return float(normalize_answer(sample.response) == normalize_answer(sample.reference))


def length(response: str, words: int) -> float:
    """Minus the distance from a number of words, as a share of it; at least -1.

    Of scripts without spaces between words a letter is one: see `separate`.
    """
    return -min(1.0, abs(len(split_words(response)) - words) / words)


def repetition(response: str) -> float:
    """Minus the share of trigrams of words that stood in the response before."""
    words = split_words(response)
    ngrams = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
    return len(set(ngrams)) / len(ngrams) - 1 if ngrams else 0.0


def _for_each(score: Callable[[Sample], float]) -> Rule:
    return lambda samples: [score(sample) for sample in samples]


def _import_rule(name: str, path: str) -> Rule:
    """Import a function of the user's: prompts, completions and answers in, a score each out."""
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

    def score(samples: Sequence[Sample]) -> list[float]:
        scores = _call(function, name, samples)
        if len(scores) != len(samples):
            raise DataError(
                f"--reward-rule {name} gave {counted(len(scores), 'score')} for "
                f"{counted(len(samples), 'response')}"
            )
        return scores

    return score


def _call(function: Callable[..., Any], name: str, samples: Sequence[Sample]) -> list[float]:
    """Call a function that may raise anything, and report the texts that it failed on."""
    columns = {
        "prompts": [sample.prompt for sample in samples],
        "completions": [sample.response for sample in samples],
        "answers": [sample.reference for sample in samples],
    }
    try:
        return [float(score) for score in function(**columns)]
    except Exception as error:  # a user's function may raise anything
        raise DataError(
            f"--reward-rule {name} raised {type(error).__name__}: {error}, given {len(samples):,} "
            f"responses, the first to {samples[0].name}: {samples[0].response[:80]!r}",
            hint="it is called with prompts, completions and answers, lists of one length, by name",
        ) from error


def require_finite(source: str, scores: Sequence[float], samples: Sequence[Sample]) -> None:
    """Raise a DataError, naming source and text, for a score that is NaN or infinite."""
    for score, sample in zip(scores, samples, strict=True):
        if not math.isfinite(score):
            raise DataError(
                f"{source} gave {score} for the response to {sample.name}: "
                f"{sample.response[:80]!r}",
                hint="a score must be a finite number",
            )
