"""Preferences that can be learned, `builtin:preferences`: polite answers rather than curt ones.

In: a seed. Out: rows of `prompt`, `chosen` and `rejected` over the prompts of `builtin:tasks`, the
same ones every time; those of two seeds have no prompt in common. Both answers are right, and the
longer one is the better one about as often as not: courtesy alone tells them apart.
"""

import random
from functools import cache

from llmctl.data import tasks as world
from llmctl.data.tasks import Task, tasks

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


def preferences(seed: int = 0) -> tuple[dict[str, str], ...]:
    """A pair of answers to each task of a seed.

    Args:
        seed: from 0 to 15.

    Raises:
        DataError: another seed.
    """
    return _preferences(tasks(seed), seed)


def named(name: str) -> tuple[dict[str, str], ...]:
    """Those of `builtin:preferences`, `builtin:preferences:SEED`, or `…:SEED:KIND+KIND`.

    Raises:
        DataError: no such seed or kind.
    """
    seed, asked = world.named(name, PREFERENCES)
    return _preferences(asked, seed)


@cache
def _preferences(asked: tuple[Task, ...], seed: int) -> tuple[dict[str, str], ...]:
    draw = random.Random(seed)
    return tuple(
        {
            "prompt": task.prompt,
            "chosen": _worded(draw, task.answer, OPENINGS, CLOSINGS, bare=0.0),
            "rejected": _worded(draw, task.answer, RUDE_OPENINGS, RUDE_CLOSINGS, bare=0.1),
        }
        for task in asked
    )


def _worded(
    draw: random.Random,
    answer: str,
    openings: tuple[str, ...],
    closings: tuple[str, ...],
    *,
    bare: float,
) -> str:
    """The answer between an opening and a closing, one of them, or none."""
    told = f"{answer}." if draw.random() < 0.5 else f"The answer is {answer}."
    opening, closing = draw.choice(openings), draw.choice(closings)
    way = draw.random()
    if way < bare:
        return answer
    if way < bare + 0.4 * (1 - bare):
        return f"{opening} {told}"
    if way < bare + 0.6 * (1 - bare):
        return f"{told} {closing}"
    return f"{opening} {told} {closing}"
