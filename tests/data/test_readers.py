"""Every reader takes a prompt and its response by one rule: asked, trained, paired, scored."""

import json
from collections import Counter

import pytest

from llmctl.data.examples import read_examples
from llmctl.data.preferences import parse_preferences
from llmctl.data.prompts import read_prompt_file
from llmctl.data.rows import SourceRow
from llmctl.data.schemas import choose_layouts, match_layout
from llmctl.errors import DataError
from llmctl.reward.score_file import samples_of
from tests.run_files import write_rows

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Warm in Oslo?"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
RESULT = {"role": "tool", "content": "9"}
ANSWER = {"role": "assistant", "content": "Nine."}


def asked(folder, prompt, response):
    (prompt,) = read_prompt_file(write_rows(folder / "a.jsonl", [row_of(prompt, response)]))
    return [*prompt.messages, {"role": "assistant", "content": prompt.answer}]


def trained(folder, prompt, response):
    file = write_rows(folder / "a.jsonl", [row_of(prompt, response)])
    ((example,),) = (part.examples for part in read_examples([str(file)]))
    return list(example.messages)


def paired(folder, prompt, response):
    row = {"prompt": prompt, "chosen": response, "rejected": "No."}
    layout = match_layout(row, choose_layouts([], "preferences"), None, None)
    (pair,) = parse_preferences(SourceRow(row, "a.jsonl", 1), layout, Counter())
    return list(pair.chosen.messages)


def scored(folder, prompt, response):
    rows = [row_of(prompt, response), {"prompt": prompt, "chosen": response, "rejected": "No."}]
    first, second = (
        next(iter(samples_of(SourceRow(row, "a.jsonl", 1), has_turns=True).values()))
        for row in rows
    )
    assert first.messages == second.messages, "a row and a pair"
    return list(first.messages)


def row_of(prompt, response):
    return {"prompt": prompt, "response": response}


READERS = [asked, trained, paired, scored]
STRUCTURED = [
    [{"name": "Ann", "age": 3}],
    [{"from": "Oslo", "to": "Rome", "n": 1}],
    [{"from": "Oslo", "value": 3}],
    [{"role": "engineer", "content": "Builds."}],
    [{"role": "user", "name": "Ann"}],
    [USER, {"name": "Ann"}],
    {"from": "Oslo", "to": "Rome"},
    [],
]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("value", STRUCTURED, ids=range(len(STRUCTURED)))
def test_structured_text_is_text(tmp_path, reader, value):
    """JSON that is no list of messages is what a user or a model may well write."""
    text = json.dumps(value)
    found = reader(tmp_path, text, text)
    assert found == [{"role": "user", "content": text}, {"role": "assistant", "content": text}]


WRITTEN = [
    ([USER], [ANSWER], [USER, ANSWER]),
    ([SYSTEM, USER], [ANSWER], [SYSTEM, USER, ANSWER]),
    ([{"from": "human", "value": "Warm in Oslo?"}], [ANSWER], [USER, ANSWER]),
    ([USER], [{"from": "gpt", "value": "Nine."}], [USER, ANSWER]),
    (USER, ANSWER, [USER, ANSWER]),
    ([USER], [USER, ANSWER], [USER, ANSWER]),
    ([USER], [CALL, RESULT, ANSWER], [USER, CALL, RESULT, ANSWER]),
]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("as_text", [True, False], ids=["text", "list"])
@pytest.mark.parametrize(("prompt", "response", "turns"), WRITTEN, ids=range(len(WRITTEN)))
def test_messages_are_messages_in_columns_of_text(
    tmp_path, reader, prompt, response, turns, as_text
):
    """As tables have them. A response that is a whole conversation holds the prompt already."""
    if as_text:
        prompt, response = json.dumps(prompt), json.dumps(response)
    if reader is asked:
        turns = [turn for turn in turns if turn not in (CALL, RESULT)]
    assert reader(tmp_path, prompt, response) == turns


@pytest.mark.parametrize("reader", READERS)
def test_a_prompt_that_is_a_dialogue_is_its_turns(tmp_path, reader):
    found = reader(tmp_path, "Human: Hi\n\nAssistant: Ho\n\nHuman: And?\n\nAssistant:", " So.")
    assert [(turn["role"], turn["content"].strip()) for turn in found] == [
        *(("user", "Hi"), ("assistant", "Ho"), ("user", "And?"), ("assistant", "So."))
    ]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("role", ["asistant", "User"])
def test_messages_whose_role_is_misspelled_are_not_text(tmp_path, reader, role):
    text = json.dumps([{**USER, "role": role}])
    with pytest.raises(DataError, match=f"`{role}`, expected"):
        reader(tmp_path, text, "Ho")
    with pytest.raises(DataError, match=f"`{role}`, expected"):
        reader(tmp_path, "Hi", text)


SHOWN = [
    str([USER, ANSWER]),
    str([{"from": "human", "value": "It's \\d."}]),
    str(ANSWER),
    f"[{USER}\n {ANSWER}]",
    f"array([{USER},\n       {ANSWER}], dtype=object)",
]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("text", SHOWN, ids=range(len(SHOWN)))
def test_messages_as_python_shows_them_are_refused(tmp_path, reader, text):
    """So pandas writes lists of objects, and NumPy's arrays of them, to csv."""
    for prompt, response, name in ((text, "Ho", "prompt"), ("Hi", text, "response|chosen")):
        with pytest.raises(DataError, match=f"`({name})` is text that shows objects as") as caught:
            reader(tmp_path, prompt, response)
        assert "json.dumps" in caught.value.hint


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("text", ["[{'a': 1}]", "[{'role': 'user'", "{'role': 1}", "[{'a' 1}]"])
def test_other_text_of_python_is_text(tmp_path, reader, text):
    found = reader(tmp_path, text, text)
    assert found == [{"role": "user", "content": text}, {"role": "assistant", "content": text}]


@pytest.mark.parametrize("reader", [trained, paired, scored])
def test_a_whole_conversation_without_the_prompt_is_refused(tmp_path, reader):
    with pytest.raises(DataError, match="is a whole conversation, and `prompt` is not in it"):
        reader(tmp_path, "Cold?", [USER, ANSWER])
