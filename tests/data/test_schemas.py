"""What rows say is obeyed, refused, or named as not read; nothing vanishes."""

import json

import pytest

from llmctl.config.finetuning import Preferred
from llmctl.data.bad_rows import BadRows
from llmctl.data.examples import read_examples
from llmctl.data.preferences import read_preferences
from llmctl.data.prompts import read_prompts
from llmctl.data.rows import SourceRow
from llmctl.errors import DataError, UserError
from llmctl.reward.score_file import samples_of
from tests.run_files import write_rows

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Ho"}


def read(folder, row, columns=(), task="chat"):
    bad = BadRows()
    file = write_rows(folder / "a.jsonl", [row])
    ((example,),) = (
        part.examples for part in read_examples([str(file)], columns=columns, task=task, bad=bad)
    )
    return example, bad.unread


@pytest.mark.parametrize(
    ("row", "columns", "prompt", "unread"),
    [
        (
            {"instruction": "Add", "input": "1 2", "output": "3"},
            ["prompt=instruction,response=output"],
            "Add\n\n1 2",
            [],
        ),
        (
            {"instruction": "Say", "context": "It", "response": "A", "category": "qa"},
            ["prompt=instruction,input=context,response=response"],
            "Say\n\nIt",
            ["category"],
        ),
        (
            {"instruction": "Say", "context": "It", "response": "A", "category": "qa"},
            ["prompt=instruction,response=response"],
            "Say",
            ["category", "context"],
        ),
        ({"instruction": "Say", "context": "It", "response": "A"}, [], "Say\n\nIt", []),
        ({"q": "Say", "c": "It", "a": "A"}, ["prompt=q,input=c,response=a"], "Say\n\nIt", []),
        ({"prompt": "Say", "response": "A", "id": 7, "note": ""}, [], "Say", ["id"]),
    ],
)
def test_columns_beside_the_prompt_are_read_or_named(tmp_path, row, columns, prompt, unread):
    example, named = read(tmp_path, row, columns)
    assert example.messages[0]["content"] == prompt
    assert named == unread


OPENAI_PAIR = {
    "input": {"messages": [USER], "tools": [{"type": "function"}], "parallel_tool_calls": True},
    "preferred_output": [ANSWER],
    "non_preferred_output": [{"role": "assistant", "content": "No"}],
}


def test_openais_preferences_are_read_by_every_reader(tmp_path):
    """Trained on as chats, asked as prompts, scored as pairs; what is not read is named."""
    tools = OPENAI_PAIR["input"]["tools"]
    example, unread = read(tmp_path, OPENAI_PAIR)
    assert (list(example.messages), example.tools) == ([USER, ANSWER], tools)
    assert unread == ["input.parallel_tool_calls", "non_preferred_output"]
    file = write_rows(tmp_path / "a.jsonl", [OPENAI_PAIR])
    bad = BadRows()
    (asked,) = read_prompts([str(file)], [], 0, bad).train
    assert (asked.messages, asked.answer, asked.tools) == ([USER], "Ho", tools)
    assert bad.unread == unread
    sides = samples_of(SourceRow(OPENAI_PAIR, "a.jsonl", 1), has_turns=True)
    assert [side.messages[-1]["content"] for side in sides.values()] == ["Ho", "No"]
    assert {side.messages[0]["content"] for side in sides.values()} == {"Hi"}
    text = {**OPENAI_PAIR, "input": json.dumps(OPENAI_PAIR["input"])}
    assert read(tmp_path, text) == (example, unread), "as a table has it"
    for spoiled, error in (
        ({"input": "Hi"}, "no example in these columns"),
        ({"input": {"messages": 3}}, "`input.messages` is a number"),
    ):
        with pytest.raises(DataError, match=error):
            read(tmp_path, {**OPENAI_PAIR, **spoiled})


EXPORTS = {
    "axolotl": {"segments": [{"label": False, "text": "<s>Hi"}, {"label": True, "text": "Ho"}]},
    "Argilla": {
        "id": "1",
        "fields": {"question": "Say", "reply": "A"},
        "suggestions": {},
        "responses": {"good": [{"value": "yes", "user_id": "u"}]},
    },
    "Label Studio": {
        "id": 1,
        "data": {"text": "Good"},
        "annotations": [{"result": [{"type": "choices", "value": {"choices": ["pos"]}}]}],
    },
    "OpenAssistant": {"message_tree_id": "a", "prompt": {"text": "Hi", "replies": []}},
    "the Hub's viewer": {"row_idx": 0, "row": {"prompt": "Hi"}, "truncated_cells": []},
}


@pytest.mark.parametrize("tool", EXPORTS)
def test_what_another_tool_exports_is_called_so(tmp_path, tool):
    """With what to do; the columns that the hint names are then read."""
    row = EXPORTS[tool]
    file = write_rows(tmp_path / "a.jsonl", [row])
    tasks = ("chat", "classify")
    readers = [lambda task=task: read_examples([str(file)], task=task) for task in tasks]
    readers.append(lambda: read_preferences(Preferred(val_size=0), [str(file)], 0))
    if "prompt" not in row:
        readers.append(lambda: samples_of(SourceRow(row, "a.jsonl", 1), has_turns=True))
        readers.append(lambda: read_prompts([str(file)], [], 0, BadRows()))
    for reads in readers:
        with pytest.raises(DataError, match=r"no \w+ in|no column|nothing to score") as caught:
            reads()
        assert f"of {tool}" in caught.value.hint
    if tool == "Argilla":
        columns = ["prompt=fields.question,response=fields.reply"]
        example, unread = read(tmp_path, row, columns)
        assert [message["content"] for message in example.messages] == ["Say", "A"]
        assert unread == ["id", "responses"]
    if tool == "Label Studio":
        example, _ = read(tmp_path, {"text": "Good", "tone": "pos"}, ["label=tone"], "classify")
        assert (example.text, example.label) == ("Good", "pos")


def test_columns_may_be_keys_of_objects(tmp_path):
    row = {"data": {"q": "Say", "a": "A", "id": 3}, "data.q": "Other", "id": 4}
    example, unread = read(tmp_path, row, ["prompt=data.q,response=data.a"])
    assert [message["content"] for message in example.messages] == ["Other", "A"]
    del row["data.q"]
    example, unread = read(tmp_path, row, ["prompt=data.q,response=data.a"])
    assert [message["content"] for message in example.messages] == ["Say", "A"]
    assert unread == ["data.id", "id"]
    with pytest.raises(DataError, match=r"no column `data\.b`; there is `data`, `id`"):
        read(tmp_path, row, ["prompt=data.q,response=data.b"])


def test_orcas_system_prompt_is_the_system_message(tmp_path):
    row = {"question": "Q", "response": "A", "system_prompt": "Be brief."}
    for columns in ([], ["prompt=question,response=response"]):
        example, unread = read(tmp_path, row, columns)
        assert example.messages[0] == {"role": "system", "content": "Be brief."}
        assert unread == []


def test_keys_of_messages_that_nothing_reads_are_named(tmp_path):
    row = {"messages": [{**USER, "mood": "good"}, {**ANSWER, "id": 3}]}
    assert read(tmp_path, row)[1] == ["messages[].id", "messages[].mood"]


@pytest.mark.parametrize("key", ["train", "loss", "trainable"])
@pytest.mark.parametrize("value", [True, False])
def test_turns_that_are_not_to_be_trained_are_not(tmp_path, key, value):
    row = {"messages": [{**USER, key: False}, {**ANSWER, key: value}]}
    example, _ = read(tmp_path, row)
    assert example.messages[1]["weight"] == int(value)
    assert "weight" not in example.messages[0]


@pytest.mark.parametrize(
    ("message", "refusal"),
    [
        ({**ANSWER, "train": 1}, "`messages\\[1\\].train` is 1, expected true or false"),
        ({**ANSWER, "weight": True}, "`messages\\[1\\].weight` is True, expected 0 or 1"),
        ({**ANSWER, "weight": 1, "loss": False}, "which contradict each other"),
        ({**USER, "train": True}, "only the assistant is trained on, this is the user"),
        ({**ANSWER, "images": ["a.png"]}, "`messages\\[1\\].images` cannot be read"),
        (
            {**ANSWER, "tool_calls": [{"name": "f"}], "function_call": {"name": "f"}},
            "`tool_calls` and `function_call`: which one counts",
        ),
    ],
)
def test_what_cannot_be_obeyed_is_refused(tmp_path, message, refusal):
    with pytest.raises(DataError, match=refusal):
        read(tmp_path, {"messages": [USER, message, ANSWER]})


def test_the_first_calls_of_openai_are_calls(tmp_path):
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    result = {"role": "function", "name": "f", "content": "9"}
    row = {"messages": [USER, call, result, ANSWER], "functions": [{"name": "f"}]}
    example, unread = read(tmp_path, row)
    assert unread == []
    assert example.tools == [{"type": "function", "function": {"name": "f"}}]
    assert example.messages[1]["tool_calls"] == [{"name": "f", "arguments": {}}]
    assert example.messages[2] == {"role": "tool", "content": "9", "name": "f"}


def test_calls_of_llama_factory_are_calls(tmp_path):
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "9"},
        {"from": "gpt", "value": "Nine."},
    ]
    example, _ = read(tmp_path, {"conversations": turns})
    assert [message["role"] for message in example.messages] == [
        *("user", "assistant", "tool", "assistant")
    ]
    assert example.messages[1]["tool_calls"] == [{"name": "f", "arguments": {"a": 1}}]


def test_a_content_of_texts_and_parts_is_joined(tmp_path):
    parts = ["Hi ", {"type": "text", "text": "there"}, "!"]
    example, _ = read(tmp_path, {"messages": [{**USER, "content": parts}, ANSWER]})
    assert example.messages[0]["content"] == "Hi there!"
    with pytest.raises(DataError, match="a part of type `a number`"):
        read(tmp_path, {"messages": [{**USER, "content": ["Hi", 3]}, ANSWER]})


def test_input_goes_with_a_prompt_only(tmp_path):
    with pytest.raises(UserError, match="`input` does not go with `messages`"):
        read(tmp_path, {"messages": [USER, ANSWER]}, ["messages=messages,input=x"])


def test_a_prompt_that_is_a_dialogue_is_its_turns(tmp_path):
    prompt = "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: And?\n\nAssistant:"
    example, _ = read(tmp_path, {"prompt": prompt, "response": " So."})
    assert [(m["role"], m["content"].strip()) for m in example.messages] == [
        *(("user", "Hi"), ("assistant", "Ho"), ("user", "And?"), ("assistant", "So."))
    ]
    example, _ = read(tmp_path, {"prompt": "Human: Hi", "response": "Ho"})
    assert example.messages[0]["content"] == "Human: Hi"
