import random

import pytest

from llmctl.data.examples import Example
from llmctl.data.split import (
    count_duplicates,
    count_shared_prompts,
    find_overlap,
    fingerprint,
    hold_out,
    mixture_counts,
    sample_numbers,
)
from llmctl.errors import DataError


def chat(prompt, answer, line=1):
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    return Example(messages, None, None, None, "a.jsonl", line)


def labelled(text, label):
    return Example(None, text, label, None, "a.jsonl", 1)


def chats(count):
    return [chat(f"What is {n}?", f"It is {n}.", n) for n in range(count)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (chat("What is it?", "A cat."), chat("what is it", " A CAT!\n")),
        (chat("Größe", "1.5"), chat("GRÖSSE", "1.5.")),
        (chat("Cafe\u0301", "yes"), chat("caf\u00e9", "Yes")),
    ],
)
def test_near_equal_examples_agree(one, other):
    assert fingerprint(one) == fingerprint(other)
    assert count_duplicates([one, other, one, chat("a", "b")]) == 2
    assert find_overlap([chat("a", "b"), one], [other]) == [(one, other)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (chat("5 - 0", "5"), chat("5 * 0", "5")),
        (chat("a", "1.5"), chat("a", "15")),
        (chat("ab", "c"), chat("a", "bc")),
        (chat("a", "!"), chat("a", "?")),
        (chat("a", "\u0915\u093f"), chat("a", "\u0915\u0940")),
        (labelled("a", "yes"), labelled("a", "no")),
        (labelled("ab", "c"), labelled("a", "bc")),
    ],
)
def test_other_examples_do_not(one, other):
    assert fingerprint(one) != fingerprint(other)
    assert find_overlap([one], [other]) == []


def test_the_call_of_a_tool_counts():
    calls = [({"function": {"name": "f", "arguments": {"a": n}}},) for n in (1, 2)]
    one, other = (
        Example(({"role": "assistant", "content": "", "tool_calls": c},), None, None, None, "a", 1)
        for c in calls
    )
    assert fingerprint(one) != fingerprint(other)


def test_the_smallest_hashes_are_held_out_whatever_the_order():
    examples = chats(200)
    train, val = hold_out(examples, size=30, fraction=None)
    assert sorted([*train, *val]) == list(range(200))
    assert (list(train), list(val)) == (sorted(train), sorted(val))
    hashes = [fingerprint(example) for example in examples]
    assert {hashes[n] for n in val} == set(sorted(hashes)[:30])
    mixed = random.Random(0).sample(examples, 200)
    _, again = hold_out(mixed, size=30, fraction=None)
    assert {examples[n].line for n in val} == {mixed[n].line for n in again}


@pytest.mark.parametrize(
    ("count", "size", "fraction", "held"),
    [
        (19, None, None, 0),
        (20, None, None, 2),
        (200, None, None, 20),
        (6000, None, None, 500),
        (200, 0, None, 0),
        (200, 7, None, 7),
        (200, None, 0.25, 50),
        (5, None, 0.01, 1),
        (0, None, None, 0),
    ],
)
def test_how_many_are_held_out(count, size, fraction, held):
    train, val = hold_out(chats(count), size=size, fraction=fraction)
    assert (len(train), len(val)) == (count - held, held)


@pytest.mark.parametrize("copies", [2, 3, 7])
def test_near_equal_examples_stay_together(copies):
    examples = [example for example in chats(40) for _ in range(copies)]
    for size in range(1, len(examples)):
        train, val = hold_out(examples, size=size, fraction=None)
        parts = [[examples[n] for n in side] for side in (train, val)]
        assert find_overlap(*parts) == []
        assert len(val) % copies == 0
        assert 0 < len(val) <= max(size, copies)


def test_a_split_that_cannot_be_is_refused():
    with pytest.raises(DataError, match="50 examples to hold out, but there are only 50"):
        hold_out(chats(50), size=50, fraction=None)
    same = [chat("a", "b")] * 50
    with pytest.raises(DataError, match="50 examples, all the same"):
        hold_out(same, size=5, fraction=None)
    assert len(hold_out(same, size=None, fraction=None)[1]) == 0


def test_prompts_with_another_answer_are_counted():
    train = [chat("What is 2?", "A number."), chat("Who?", "I."), labelled("a", "yes")]
    val = [
        chat("what is 2", "A digit."),
        chat("Who?", "I"),
        chat("New?", "Yes."),
        labelled("a", "no"),
    ]
    assert count_shared_prompts(train, val) == 2
    assert count_shared_prompts(train, []) == count_shared_prompts([], val) == 0
    text = Example(None, "a", None, None, "a", 1)
    assert count_shared_prompts([text], [text]) == 0


def test_prompts_of_rendered_texts_are_counted_too():
    def rendered(said, answer):
        text = f"### Instruction:\n{said}\n\n### Response:\n{answer}"
        return Example(None, text, None, None, "a.jsonl", 1)

    train = [rendered("Add 1", "2"), rendered("Add 2", "3"), rendered("Add 3", "4")]
    val = [rendered("Add 1", "Two"), rendered("Add 2", "3"), rendered("Add 9", "Ten")]
    assert count_shared_prompts(train, val) == 1


@pytest.mark.parametrize(
    ("sizes", "weights", "counts"),
    [
        ([100, 100], [1, 1], [100, 100]),
        ([100, 100], [0.7, 0.3], [100, 43]),
        ([1000, 10], [7, 3], [23, 10]),
        ([10, 1000], [1, 0.0001], [10, 1]),
        ([49, 49, 49], [0.1, 0.2, 0.3], [16, 33, 49]),
    ],
)
def test_a_mixture_ends_with_the_first_set_that_is_used_up(sizes, weights, counts):
    assert mixture_counts(sizes, weights) == counts


def test_a_mixture_with_an_empty_set_is_refused():
    with pytest.raises(DataError, match="set 2 of the mixture has no example"):
        mixture_counts([5, 0], [1, 1])


def test_a_sample_follows_from_hashes_and_seed():
    examples = chats(100)
    first = sample_numbers(examples, 40, seed=1)
    assert first == sorted(set(first)) == sample_numbers(examples, 40, seed=1)
    assert len(first) == 40
    assert first != sample_numbers(examples, 40, seed=2)
    assert set(first[:5]) <= set(range(100))
    backwards = sample_numbers(examples[::-1], 40, seed=1)
    assert {examples[::-1][n].line for n in backwards} == {examples[n].line for n in first}
    assert sample_numbers(examples, 100, seed=1) == list(range(100))
