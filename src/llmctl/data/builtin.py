"""Built-in data: Python's documentation, tasks with known answers, learnable preferences.

`builtin:python-docs` is text of every Python installation: the language's help topics and its
library's docstrings.

`builtin:tasks` is tasks in simple English. In: a seed. Out: the same `Task` objects every time. A
problem, whatever its wording, belongs to one seed alone, so that what one seed trains on never
occurs in another's.

`builtin:preferences` prefers polite answers to rude ones. In: a seed. Out: rows of `prompt`,
`chosen` and `rejected` over the prompts of `builtin:tasks`, the same ones every time; those of two
seeds have no prompt in common. Both answers are right, and the chosen one is the longer about half
of the time: courtesy alone tells them apart.
"""

import ast
import random
import re
import sysconfig
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from hashlib import blake2b
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from llmctl.errors import DataError

SHORTEST = 200
"""Characters of a document at least; a shorter one teaches little."""

NOT_PROSE = {"__pycache__", "ensurepip", "idlelib", "lib2to3", "site-packages", "test", "tests"}

TASKS = "builtin:tasks"
SEEDS = 16
"""Seeds are 0 to 15: the hash of a problem, modulo this, is its seed."""
COUNT = 2000
ATTEMPTS = 1000
"""Draws in a row without a new problem after which a kind counts as used up."""

WORDS = re.findall(
    r"\w+",
    """
    apple arm baby back bag ball bank bath bear bed bee bell bird blue boat body bone book box boy
    bread brown bus cake camp car card cat chair child city clay clock cloud coat cold cow cup dark
    day deep desk dish dog door dress drum duck ear earth egg eye face farm field fire fish flag
    floor flower foot forest fox friend frog fruit game garden girl glass goat gold grass green hall
    hand hat heart hill home honey horse house ice ink island jam jar key king kite lake lamp leaf
    lemon letter light lion lip map milk mill moon mouse mouth music nail name nest night nose nut
    oak oil old orange owl page paint paper park path pen piano pig plant pond pot queen rain red
    rice ring river road rock roof room root rope rose salt sand school sea seed sheep ship shoe
    silk sister sky small snow soap song spoon star stone storm street sugar summer sun table tail
    tall tea tent tiger tree uncle valley violin voice wall warm water wave wind window winter wolf
    wood yard yellow young zebra
""",
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PLACES = {"first": 0, "second": 1, "last": -1}

Draw = random.Random

PREFERENCES = "builtin:preferences"

OPENINGS = (
    "Gladly!",
    "Of course!",
    "With pleasure.",
    "Thank you for asking.",
    "What a good question!",
    "I am happy to help.",
    "Sure, let me help you.",
    "It is nice of you to ask me.",
)
CLOSINGS = (
    "Have a nice day!",
    "You are welcome.",
    "I hope that helps.",
    "Please ask me again.",
    "Let me know if that helps.",
)
RUDE_OPENINGS = (
    "Ugh, obviously.",
    "Are you serious?",
    "Do it yourself.",
    "Not you again.",
    "What a stupid question!",
    "Why do you bother me with that?",
    "Anyone with a brain knows that.",
)
RUDE_CLOSINGS = (
    "Now go away.",
    "Stop wasting my time.",
    "How dumb can you be?",
    "I am sick of your questions.",
    "Do not dare to ask me again.",
)


@cache
def python_docs() -> tuple[str, ...]:
    """List help topics by name, then the docstrings of each module, none of them imported."""
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if not NOT_PROSE & {*p.relative_to(root).parts})
    documents = [topics[name] for name in sorted(topics)] + [_docstrings(path) for path in files]
    return tuple(text for text in documents if len(text) >= SHORTEST)


def _docstrings(path: Path) -> str:
    """Join a module's docstrings, outermost first, with a blank line after each."""
    with warnings.catch_warnings(action="ignore"):
        tree = ast.parse(path.read_bytes())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return "".join(f"{text}\n\n" for text in texts if text)


class Kind(NamedTuple):
    """Problems of one sort."""

    wordings: tuple[str, ...]
    """Templates of the prompt; each `{}` stands for one argument."""
    arguments: Callable[[Draw], list[Any]]
    answer: Callable[..., str]
    """Computes the answer from the arguments as text."""


class Task(NamedTuple):
    """A problem in words."""

    kind: str
    prompt: str
    answer: str

    def messages(self) -> list[dict[str, str]]:
        """The task as a conversation."""
        return [
            {"role": "user", "content": self.prompt},
            {"role": "assistant", "content": self.answer},
        ]


def _numbers(count: int) -> Callable[[Draw], list[Any]]:
    return lambda draw: draw.sample(range(100), count)


def _words(count: int) -> Callable[[Draw], list[Any]]:
    return lambda draw: draw.sample(WORDS, count)


def _spelling(draw: Draw) -> list[Any]:
    """Draw a letter, most often one of the first word, and two words."""
    word = draw.choice(WORDS)
    return [draw.choice(word * 3 + LETTERS), word, draw.choice(WORDS)]


def _member(draw: Draw) -> list[Any]:
    """Draw a word and three others, among which it is half of the time."""
    words = draw.sample(WORDS, 4)
    return [draw.choice([words[0], draw.choice(words[1:])]), *words[1:]]


def _steps(draw: Draw) -> list[Any]:
    start, step = draw.randrange(100), draw.randint(1, 20)
    return [start, start + step, start + 2 * step]


KINDS: dict[str, Kind] = {
    "add": Kind(
        ("What is {} + {}?", "Add {} and {}.", "How much is {} plus {}?"),
        _numbers(2),
        lambda a, b: str(int(a) + int(b)),
    ),
    "subtract": Kind(
        ("What is {} - {}?", "How much is {} minus {}?"),
        lambda draw: sorted(draw.sample(range(100), 2), reverse=True),
        lambda a, b: str(int(a) - int(b)),
    ),
    "larger": Kind(
        ("Which number is larger, {} or {}?", "What is more, {} or {}?"),
        _numbers(2),
        lambda a, b: str(max(int(a), int(b))),
    ),
    "smaller": Kind(
        ("Which number is smaller, {} or {}?", "What is less, {} or {}?"),
        _numbers(2),
        lambda a, b: str(min(int(a), int(b))),
    ),
    "next": Kind(
        ("What number comes next: {}, {}, {}?", "Count on: {}, {}, {}."),
        _steps,
        lambda _, b, c: str(2 * int(c) - int(b)),
    ),
    "sort numbers": Kind(
        ("Sort these numbers: {}, {}, {}.", "Put {}, {} and {} in order, smallest first."),
        _numbers(3),
        lambda *numbers: ", ".join(sorted(numbers, key=int)),
    ),
    "sort words": Kind(
        ("Sort these words by the alphabet: {}, {}, {}.", "Put in order from A to Z: {}, {}, {}."),
        _words(3),
        lambda *words: ", ".join(sorted(words)),
    ),
    "copy": Kind(
        ("Say this again: {} {} {}.", "Repeat the words {} {} {}."),
        _words(3),
        lambda *words: " ".join(words),
    ),
    "reverse": Kind(
        ("Say these words backwards: {} {} {}.", "Turn around the order: {} {} {}."),
        _words(3),
        lambda *words: " ".join(reversed(words)),
    ),
    "reverse letters": Kind(
        ("Write the letters {} {} {} backwards.", "Turn the letters {} {} {} around."),
        lambda draw: draw.sample(LETTERS, 3),
        lambda *letters: " ".join(reversed(letters)),
    ),
    "pick": Kind(
        ("What is the {} word of {} {} {}?", "Say the {} of these words: {} {} {}."),
        lambda draw: [draw.choice(list(PLACES)), *draw.sample(WORDS, 3)],
        lambda place, *words: words[PLACES[place]],
    ),
    "initials": Kind(
        ("With which letters do {} {} {} begin?", "Write the first letters of {} {} {}."),
        _words(3),
        lambda *words: " ".join(map(itemgetter(0), words)),
    ),
    "endings": Kind(
        ("With which letters do {} {} {} end?", "Write the last letters of {} {} {}."),
        _words(3),
        lambda *words: " ".join(map(itemgetter(-1), words)),
    ),
    "count": Kind(
        ("How often is the letter {} in {} {}?", "Count the letter {} in the words {} {}."),
        _spelling,
        lambda letter, *words: str("".join(words).count(letter)),
    ),
    "member": Kind(
        ("Is the word {} one of {}, {}, {}?", "Look for {} in this list: {}, {}, {}. Is it there?"),
        _member,
        lambda word, *words: "yes" if word in words else "no",
    ),
}


def tasks(seed: int = 0, count: int = COUNT, kinds: Sequence[str] = ()) -> tuple[Task, ...]:
    """Make different tasks of all kinds in turn, none of them a task of another seed.

    Of some `kinds` only there may be fewer than `count`.

    Raises:
        DataError: another seed, or more tasks than there are of a seed.
    """
    if not 0 <= seed < SEEDS:
        raise DataError(f"no tasks of seed {seed}", hint=f"seeds of {TASKS} are 0 to {SEEDS - 1}")
    made = _tasks(seed, count, tuple(kinds) or tuple(KINDS))
    if len(made) < count and not kinds:
        raise DataError(f"{count:,} tasks asked for, but seed {seed} has {len(made):,}")
    return made


def named_tasks(name: str, data: str = TASKS) -> tuple[int, tuple[Task, ...]]:
    """Make the tasks of `builtin:tasks`, `…:SEED` or `…:SEED:KIND+KIND`; return the seed, too.

    A space in the name of a kind is written `-`; `data` is what stands before the seed.

    Raises:
        DataError: no such seed or kind.
    """
    text, _, kinds_text = name.removeprefix(data).removeprefix(":").partition(":")
    kinds = [kind.replace("-", " ") for kind in kinds_text.split("+") if kinds_text]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        known = ", ".join(kind.replace(" ", "-") for kind in KINDS)
        raise DataError(f"no kind of tasks `{unknown[0]}`", hint=f"kinds are {known}")
    text = text or "0"
    if not re.fullmatch(r"\d{1,9}", text) or int(text) >= SEEDS:
        hint = f"type {data}:SEED with a seed from 0 to {SEEDS - 1}"
        stem = f"{data}:{text}" if kinds else name
        raise DataError(f"no built-in data `{stem}`", hint=hint)
    seed = int(text)
    return seed, tasks(seed, kinds=kinds)


@cache
def _tasks(seed: int, count: int, kinds: tuple[str, ...]) -> tuple[Task, ...]:
    draw = random.Random(seed)
    left, used, made = list(kinds), set[tuple[str, ...]](), list[Task]()
    while len(made) < count and left:
        name = left[len(made) % len(left)]
        problem = _draw_problem(name, draw, seed, used)
        if problem is None:
            left.remove(name)
            continue
        used.add(problem)
        kind = KINDS[name]
        prompt = draw.choice(kind.wordings).format(*problem[1:])
        made.append(Task(name, prompt, kind.answer(*problem[1:])))
    return tuple(made)


def _draw_problem(
    name: str, draw: Draw, seed: int, used: set[tuple[str, ...]]
) -> tuple[str, ...] | None:
    """Draw a new problem of a kind that belongs to a seed; None where none seems to be left."""
    for _ in range(ATTEMPTS):
        problem = (name, *map(str, KINDS[name].arguments(draw)))
        digest = blake2b(" ".join(problem).encode(), digest_size=8).digest()
        if int.from_bytes(digest, "little") % SEEDS == seed and problem not in used:
            return problem
    return None


def named_preferences(name: str) -> tuple[dict[str, str], ...]:
    """Make those of `builtin:preferences`, `…:SEED` or `…:SEED:KIND+KIND`; see `named_tasks`."""
    seed, named = named_tasks(name, PREFERENCES)
    return _preferences(named, seed)


@cache
def _preferences(named: tuple[Task, ...], seed: int) -> tuple[dict[str, str], ...]:
    draw = random.Random(seed)
    return tuple(
        {
            "prompt": task.prompt,
            "chosen": _word(draw, task.answer, OPENINGS, CLOSINGS, bare=0.0),
            "rejected": _word(draw, task.answer, RUDE_OPENINGS, RUDE_CLOSINGS, bare=0.1),
        }
        for task in named
    )


def _word(
    draw: random.Random,
    answer: str,
    openings: tuple[str, ...],
    closings: tuple[str, ...],
    *,
    bare: float,
) -> str:
    """Word the answer with an opening and a closing, one of them, or bare."""
    sentence = f"{answer}." if draw.random() < 0.5 else f"The answer is {answer}."
    opening, closing = draw.choice(openings), draw.choice(closings)
    form = draw.random()
    if form < bare:
        return answer
    if form < bare + 0.4 * (1 - bare):
        return f"{opening} {sentence}"
    if form < bare + 0.6 * (1 - bare):
        return f"{sentence} {closing}"
    return f"{opening} {sentence} {closing}"
