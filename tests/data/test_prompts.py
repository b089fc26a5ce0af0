"""A prompt is asked as its row is trained, whichever file it comes from."""

import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmctl.data.bad_rows import BadRows
from llmctl.data.examples import read_examples
from llmctl.data.prompts import read_prompt_file, read_prompts
from llmctl.errors import DataError
from tests.run_files import write_rows

USER = {"role": "user", "content": "Warm in Oslo?"}
ANSWER = {"role": "assistant", "content": "Nine."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}],
}
RESULT = {"role": "tool", "content": "9"}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
ROWS = [
    {"messages": [USER, ANSWER]},
    {"messages": [SYSTEM, USER, ANSWER, USER, ANSWER]},
    {"messages": [USER, CALL, RESULT, ANSWER], "tools": TOOLS},
    {"messages": [USER, ANSWER], "tools": json.dumps(TOOLS), "system": "Be brief."},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
    {"prompt": "Hi", "response": "Ho", "system": "Be brief."},
    {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Say.", "context": "A text.", "response": "It."},
    {"instruction": "Go on.", "history": [["Hi", "Ho"]], "output": "So."},
    {"question": "Q", "answer": "A"},
    {"question": "Q", "system_prompt": "Be brief.", "response": "A"},
]


@pytest.mark.parametrize("row", ROWS, ids=[",".join(row) for row in ROWS])
def test_a_row_is_asked_as_it_is_trained(tmp_path, row):
    file = write_rows(tmp_path / "a.jsonl", [row])
    ((trained,),) = (part.examples for part in read_examples([str(file)]))
    (asked,) = read_prompt_file(file)
    assert asked.messages == list(trained.messages[:-1])
    assert asked.answer == trained.messages[-1]["content"]
    assert asked.tools == trained.tools


def test_every_kind_of_file_gives_the_same_prompts(tmp_path):
    rows = [{"prompt": "Hi", "system": "Be brief."}, {"prompt": "Ho, so", "system": ""}]
    write_rows(tmp_path / "a.jsonl", rows)
    write_rows(tmp_path / "a.ndjson", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "a.csv").write_text('prompt,system\nHi,Be brief.\n"Ho, so",\n')
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    wanted = [[{**SYSTEM}, {"role": "user", "content": "Hi"}], "Ho, so"]
    for suffix in ("jsonl", "ndjson", "json", "csv", "parquet"):
        assert [p.prompt for p in read_prompt_file(tmp_path / f"a.{suffix}")] == wanted, suffix


def test_lines_of_text_are_prompts_and_repeated_rows_stay(tmp_path):
    (tmp_path / "a.txt").write_text("Hi\n\nHi\n")
    assert [(p.prompt, p.line) for p in read_prompt_file(tmp_path / "a.txt")] == [
        ("Hi", 1),
        ("Hi", 3),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "Hi"}, "no prompt in these columns: `text`"),
        ({"prompt": 3}, "`prompt` is a number, expected text"),
        ({"prompt": "a\ud800"}, "half a surrogate pair"),
        ({"messages": [ANSWER, USER]}, "begins with the assistant"),
        ({"messages": []}, "`messages` is empty"),
        ({"messages": [USER, {**ANSWER, "content": None}]}, "is null, expected text"),
        ({"prompt": "Hi", "images": ["a.png"]}, "`images` cannot be read"),
        ({"prompt": "Hi", "system": "a", "system_prompt": "b"}, "which one counts"),
    ],
)
def test_a_row_without_a_prompt_is_refused_with_its_line(tmp_path, row, message):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"prompt": "Hi"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message) as refused:
        read_prompt_file(file)
    assert (refused.value.file, refused.value.line) == (str(file), 2)
    bad = BadRows(1)
    assert [p.prompt for p in read_prompts([str(file)], [], 0, bad).train] == ["Hi"]
    assert bad.count == 1


def test_columns_beside_the_prompt_and_its_answer_are_named(tmp_path):
    row = {"prompt": "Hi", "answer": "Ho", "system": "Be kind.", "context": "x", "id": 3}
    bad = BadRows()
    read_prompts([str(write_rows(tmp_path / "a.jsonl", [row]))], [], 0, bad)
    assert bad.unread == ["context", "id"]


def test_structured_text_is_text(tmp_path):
    """A JSON list of objects that have no role is what a user or a model may well write."""
    text = json.dumps([{"name": "Ann", "age": 3}])
    row = {"prompt": text, "response": text}
    file = write_rows(tmp_path / "a.jsonl", [row])
    assert [p.prompt for p in read_prompt_file(file)] == [text]
    written = write_rows(tmp_path / "b.jsonl", [{"prompt": json.dumps([USER]), "response": "x"}])
    assert [p.prompt for p in read_prompt_file(written)] == [[USER]]


def test_a_pipe_that_brings_nothing_is_called_one(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    with pytest.raises(DataError, match="nothing to read: no prompt came") as refused:
        read_prompt_file(Path("-"))
    assert refused.value.file == "stdin"
