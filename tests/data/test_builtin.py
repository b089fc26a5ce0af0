import re
from collections import Counter

import pytest

from llmctl.data import builtin
from llmctl.data.builtin import KINDS, SEEDS, named_tasks, tasks
from llmctl.data.documents import read_pieces
from llmctl.data.sources import find_sources
from llmctl.errors import DataError

BY_HAND = [
    ("What is 3 + 77?", "80"),
    ("How much is 39 minus 12?", "27"),
    ("What is more, 9 or 10?", "10"),
    ("Which number is smaller, 81 or 9?", "9"),
    ("What number comes next: 95, 98, 101?", "104"),
    ("Put 53, 8 and 10 in order, smallest first.", "8, 10, 53"),
    ("Sort these words by the alphabet: tail, key, child.", "child, key, tail"),
    ("Repeat the words child wind pot.", "child wind pot"),
    ("Turn around the order: ring hall old.", "old hall ring"),
    ("Write the letters k b q backwards.", "q b k"),
    ("Say the last of these words: hand wood window.", "window"),
    ("What is the second word of hand wood window?", "wood"),
    ("With which letters do bear sheep cake begin?", "b s c"),
    ("Write the last letters of dark kite music.", "k e c"),
    ("How often is the letter e in bee tree?", "4"),
    ("Is the word kite one of box, clay, lake?", "no"),
    ("Look for clay in this list: box, clay, lake. Is it there?", "yes"),
]


@pytest.mark.parametrize(("prompt", "answer"), BY_HAND)
def test_answers_are_those_worked_out_by_hand(prompt, answer):
    patterns = {
        re.escape(wording).replace(r"\{\}", r"(\w+)"): kind
        for kind in KINDS.values()
        for wording in kind.wordings
    }
    ((kind, match),) = [
        (kind, match) for text, kind in patterns.items() if (match := re.fullmatch(text, prompt))
    ]
    assert kind.answer(*match.groups()) == answer


def test_every_kind_comes_as_often_as_the_others():
    kinds = Counter(task.kind for task in tasks())
    assert kinds.keys() == KINDS.keys()
    assert len(kinds) >= 8
    assert min(kinds.values()) > 50


def test_the_same_seed_gives_the_same_tasks_and_no_two_share_one():
    every = [tasks(seed, 300) for seed in range(SEEDS)]
    assert every[3] == tasks(3, 600)[:300]
    prompts = [task.prompt for part in every for task in part]
    assert len(set(prompts)) == len(prompts) == 300 * SEEDS


def test_a_problem_is_of_one_seed_in_every_wording():
    """Whoever trains on `Add 2 and 3.` must not be asked `What is 2 + 3?` elsewhere."""
    wordings = {"What is ": " + ", "Add ": " and ", "How much is ": " plus "}
    found = {}
    for seed in range(SEEDS):
        for task in tasks(seed):
            if task.kind == "add":
                start = next(word for word in wordings if task.prompt.startswith(word))
                pair = task.prompt[len(start) : -1].split(wordings[start])
                assert found.setdefault(tuple(pair), seed) == seed
    assert len(found) > 1000


def test_another_seed_is_refused():
    with pytest.raises(DataError, match="no tasks of seed 16"):
        tasks(16)


def test_more_tasks_than_a_seed_has_are_refused(monkeypatch):
    monkeypatch.setattr("llmctl.data.builtin.KINDS", {"subtract": KINDS["subtract"]})
    with pytest.raises(DataError, match=r"5,001 tasks asked for, but seed 0 has \d{3}"):
        tasks(0, 5001)


@pytest.mark.parametrize("name", ["builtin:tasks:16", "builtin:tasks:x", "builtin:tasks:-1"])
def test_another_seed_in_a_name_is_refused(tmp_path, name):
    with pytest.raises(DataError, match=f"no built-in data `{name}`") as caught:
        find_sources([name], tmp_path)
    assert "a seed from 0 to 15" in caught.value.hint


def test_names_of_seeds():
    names = ("builtin:tasks", "builtin:tasks:0", "builtin:tasks:7")
    assert [named_tasks(name)[0] for name in names] == [0, 0, 7]


def test_tasks_are_documents_too(tmp_path):
    (source,) = find_sources(["builtin:tasks:2"], tmp_path)
    pieces = list(read_pieces(source, "text"))
    assert len(pieces) == 2000
    first = tasks(2)[0]
    assert pieces[0].text == f"{first.prompt}\n{first.answer}\n"


def test_kinds_in_a_name_choose_tasks_that_no_other_seed_has():
    seed, found = named_tasks("builtin:tasks:4:reverse-letters+pick")
    assert seed == 4
    assert {task.kind for task in found} == {"reverse letters", "pick"}
    _, other = named_tasks("builtin:tasks:5:reverse-letters+pick")
    assert not {task.prompt for task in found} & {task.prompt for task in other}
    assert named_tasks("builtin:tasks:4") == (4, tasks(4))


def test_a_kind_with_few_tasks_gives_those_there_are():
    _, found = named_tasks("builtin:tasks:0:subtract")
    assert 100 < len(found) < 1000


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(DataError, match="no kind of tasks `juggle`") as caught:
        find_sources(["builtin:tasks:0:juggle"], tmp_path)
    assert "reverse-letters" in caught.value.hint


def test_preferences_have_kinds_too():
    asked = {task.prompt for task in named_tasks("builtin:tasks:2:copy")[1]}
    rows = builtin.named_preferences("builtin:preferences:2:copy")
    assert {row["prompt"] for row in rows} == asked
