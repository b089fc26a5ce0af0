import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmctl.console import log
from llmctl.data.bad_rows import BadRows
from llmctl.data.builtin import tasks
from llmctl.data.examples import Example, read_examples
from llmctl.errors import DataError, UserError
from llmctl.files import sha256_file
from tests.run_files import write_rows

ASKED = {"role": "user", "content": "Hi"}
SAID = {"role": "assistant", "content": "Hello."}
SYSTEM = {"role": "system", "content": "Be kind."}
FINE = {"messages": [ASKED, SAID]}


def write(path, *rows):
    """A file of rows in the form that its name asks for."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows), indent=2))
    else:
        write_rows(path, rows)
    return path


def read(*data, **how):
    """All examples of one `--data`."""
    (found,) = read_examples([str(name) for name in data], **how)
    return found.examples


def refused(*data, **how):
    with pytest.raises(DataError) as caught:
        read_examples([str(name) for name in data], **how)
    return caught.value


SHAPES = [
    ({"messages": [SYSTEM, ASKED, SAID, ASKED, SAID]}, (SYSTEM, ASKED, SAID, ASKED, SAID)),
    (
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello."},
            ]
        },
        (SYSTEM, ASKED, SAID),
    ),
    ({"conversations": [{"from": "user", "value": "Hi"}, SAID]}, (ASKED, SAID)),
    ({"prompt": "Hi", "completion": "Hello."}, (ASKED, SAID)),
    ({"prompt": "Hi", "response": "Hello.", "id": 7}, (ASKED, SAID)),
    ({"prompt": [SYSTEM, ASKED], "completion": [SAID]}, (SYSTEM, ASKED, SAID)),
    ({"instruction": "Hi", "output": "Hello."}, (ASKED, SAID)),
    ({"instruction": "Hi", "input": "", "output": "Hello.", "text": "all"}, (ASKED, SAID)),
    (
        {"instruction": "Add.", "input": "1 2", "output": "Hello.", "system": "Be kind."},
        (SYSTEM, {"role": "user", "content": "Add.\n\n1 2"}, SAID),
    ),
    (
        {"instruction": "Hi", "output": "Hello.", "history": [["Hi", "Hello."]]},
        (ASKED, SAID, ASKED, SAID),
    ),
    ({"question": "Hi", "answer": "Hello."}, (ASKED, SAID)),
    ({"prompt": "Hi", "chosen": "Hello.", "rejected": "Go away."}, (ASKED, SAID)),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize(("row", "messages"), SHAPES, ids=[",".join(row) for row, _ in SHAPES])
def test_a_shape_is_recognised_by_its_columns(tmp_path, row, messages, suffix):
    path = write(tmp_path / f"a{suffix}", row, row)
    first, second = read(path)
    assert first.messages == second.messages == messages
    assert first.text is first.label is first.tools is None
    assert first.place == str(path)
    if suffix == ".jsonl":
        assert second == Example(messages, None, None, None, str(path), 2)
        assert second.name == f"{path}:2"


def test_text_stays_text(tmp_path):
    (example,) = read(write(tmp_path / "a.jsonl", {"text": "All of it.\n", "label": "x"}))
    assert example == Example(None, "All of it.\n", None, None, str(tmp_path / "a.jsonl"), 1)


@pytest.mark.parametrize(("label", "text"), [("good", "good"), (3, "3"), (True, "true")])
def test_labels_become_text(tmp_path, label, text):
    path = write(tmp_path / "a.jsonl", {"text": "Hi", "label": label})
    assert read(path, task="classify") == [Example(None, "Hi", text, None, str(path), 1)]


def test_csv_may_hold_messages_as_json_and_lines_are_those_rows_begin_in(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,response\n"a\nb",c\n\nd,"e\nf"\ng,\n')
    assert (refused(path).line, refused(path).message) == (
        7,
        "`response` is empty: the assistant says nothing",
    )
    first, second = read(path, bad=BadRows(1))
    assert [first.line, second.line] == [2, 5]
    assert first.messages[0]["content"] == "a\nb"
    cell = json.dumps([ASKED, SAID]).replace('"', '""')
    path.write_text(f'id,messages\n1,"{cell}"\n')
    assert read(path)[0].messages == (ASKED, SAID)


def test_elements_of_an_array_have_their_lines(tmp_path):
    path = tmp_path / "a.json"
    row = json.dumps(FINE)
    path.write_text(f"\ufeff\n[{row}, {row},\n\n{row}\n,\r\n{json.dumps(FINE, indent=1)}]\n")
    assert [example.line for example in read(path)] == [2, 2, 4, 6]


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        (
            "[\n{},\n{]",
            "not JSON: Expecting property name enclosed in double quotes at column 2",
            3,
        ),
        ('[{"text": "a"},\n{"text": "b"}\n', "not JSON: Expecting ',' delimiter at column 1", 3),
        ('[{"text": "a"}\n{"text": "b"}]', "not JSON: Expecting ',' delimiter at column 1", 2),
        ('[{"text": "a"},\n]', "not JSON: Expecting value at column 1", 2),
        ('[{"text": "a"}]\nmore', "not JSON: Extra data at column 1", 2),
        ('[\n{"text": "a", "text": "b"}]', "not JSON: duplicate key `text`", 2),
        ('[\n\n{"text": "a", "n": NaN}]', "not JSON: NaN is no JSON number", 3),
        ('[\n"a"]', "expected an object, got text", 2),
        ("[\n" + "[" * 100_000, "arrays or objects within each other, more than can be read", 2),
        ('{\n"text": "a"}', "one object over several lines", 1),
        ('{"data": [\n{"text": "a"}\n]}', "its rows may be those of `data`", 1),
        ('{"text": "a"}\n{\n"text": "b"}', "not JSON: Expecting property name", 2),
    ],
)
def test_a_bad_array_is_refused_with_its_line(tmp_path, text, message, line):
    path = tmp_path / "a.json"
    path.write_text(text.replace("{},", '{"text": "a"},'))
    error = refused(path)
    assert message in error.message
    assert (error.file, error.line) == (str(path), line)


def turns(*messages):
    return {"messages": list(messages)}


BAD_ROWS = [
    ({"q": "Hi", "a": "Hello."}, "no example in these columns: `q`, `a`"),
    ({}, "no example in these columns: none"),
    ({"prompt": "Hi"}, "no example in these columns: `prompt`"),
    ({"messages": None}, "`messages` is null, expected a list of messages"),
    ({"messages": "Hi"}, "`messages` is text"),
    ({"messages": []}, "`messages` is empty"),
    ({"messages": ["Hi"]}, "`messages[0]` is text, expected an object"),
    (turns({"content": "Hi"}), "the role of `messages[0]` is missing, expected system, developer"),
    (turns({"role": 1, "content": "Hi"}), "the role of `messages[0]` is a number"),
    (turns(ASKED, {"role": "asistant", "content": "Hi"}), "`messages[1]` is `asistant`"),
    (turns(ASKED, {"role": "assistant"}), "no `messages[1].content`; there is `role`"),
    (turns(ASKED, SAID | {"content": None}), "`messages[1].content` is null, expected text"),
    (turns(ASKED, SAID | {"content": 7}), "`messages[1].content` is a number"),
    (turns(ASKED, SAID | {"content": ""}), "`messages[1].content` is empty: the assistant"),
    (turns(ASKED, SAID | {"content": " \n"}), "nothing but white space: the assistant"),
    (turns({"role": "user", "content": ""}, SAID), "`messages[0].content` is empty: the user"),
    (turns(ASKED, SAID | {"content": "a\ud800"}), "half a surrogate pair, \\ud800"),
    (turns(ASKED, SAID | {"content": [{"type": "image_url"}]}), "a part of type `image_url`"),
    (turns(ASKED, SAID | {"weight": 2}), "`messages[1].weight` is 2, expected 0 or 1"),
    (turns(ASKED | {"weight": 1}, SAID), "only the assistant is trained on, this is the user"),
    (turns(ASKED, SAID | {"tool_calls": "f"}), "`messages[1].tool_calls` is text"),
    (turns(ASKED, SAID | {"tool_calls": [{}]}), "a call without the name of a function"),
    (
        turns(ASKED, SAID | {"tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}),
        "arguments that are text, expected an object",
    ),
    (turns(ASKED | {"tool_calls": [{"name": "f"}]}, SAID), "the user cannot call tools"),
    (turns(ASKED), "no message of the assistant"),
    (turns(SAID, ASKED, SAID), "begins with the assistant, expected the user"),
    (turns(SYSTEM, SAID), "begins with the assistant"),
    (turns({"role": "tool", "content": "4"}, SAID), "begins with the tool"),
    (turns(SYSTEM, ASKED, SAID) | {"system": "B"}, "`system` beside a message of the system"),
    (turns(ASKED, SAID) | {"tools": "f"}, "`tools` is text, expected a list of objects"),
    (
        turns(ASKED, SAID) | {"tools": '[{"name": "f", "name": "g"}]'},
        "`tools` is text (not JSON: duplicate key `name`), expected a list of objects",
    ),
    (turns(ASKED, SAID) | {"tools": "[{'name': 'f'}]"}, "`tools` is text that shows objects as"),
    ({"messages": str([ASKED, SAID])}, "`messages` is text that shows objects as Python does"),
    (
        {"messages": '[{"role"}]'},
        "`messages` is text (not JSON: Expecting ':' delimiter at column 9), expected a list of",
    ),
    (turns(ASKED, SAID) | {"tools": '[{"\\ud83d": 1, "\\ud83d": 2}]'}, "duplicate key `\\ud83d`"),
    ({"conversations": [{"from": "humam", "value": "Hi"}]}, "`conversations[0]` is `humam`"),
    ({"prompt": None, "completion": "a"}, "`prompt` is null, expected text"),
    ({"prompt": " \t", "completion": "a"}, "`prompt` is nothing but white space"),
    ({"prompt": "a", "completion": ""}, "`completion` is empty: the assistant says nothing"),
    ({"prompt": "a", "completion": 4}, "`completion` is a number, expected text"),
    ({"instruction": "a", "input": 4, "output": "b"}, "`input` is a number"),
    ({"instruction": "a", "output": "b", "history": [["c"]]}, "expected a list of pairs"),
    ({"question": ["a"], "answer": "b"}, "`question[0]` is text, expected an object"),
    ({"text": None}, "`text` is null, expected text"),
    ({"text": "\n"}, "`text` is empty or nothing but white space"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_bad_row_is_refused_with_its_line(tmp_path, row, message):
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n" + json.dumps(row) + "\n" + json.dumps(FINE))
    error = refused(path)
    assert message in error.message
    assert (error.code, error.file, error.line) == (3, str(path), 3)


@pytest.mark.parametrize(
    ("role", "meant"), [("asistant", "assistant"), ("User", "user"), ("humam", "user")]
)
def test_a_misspelled_role_gets_a_guess(tmp_path, role, meant):
    path = write(tmp_path / "a.jsonl", turns({"role": role, "content": "Hi"}))
    assert refused(path).hint == f"did you mean `{meant}`?"


def test_unknown_columns_get_the_shapes_there_are(tmp_path):
    hint = refused(write(tmp_path / "a.jsonl", {"q": "a"})).hint
    assert "`prompt` + `completion`" in hint
    assert "--columns prompt=NAME,response=NAME" in hint


def test_two_shapes_in_one_file_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", FINE, FINE, {"question": "a", "answer": "b"})
    error = refused(path)
    assert error.message == "this row is `question` + `answer`, but that of line 1 is `messages`"
    assert error.line == 3
    path = write(tmp_path / "a.jsonl", {"question": "a", "answer": "b"}, {"question": "a"})
    assert refused(path).message == "no column `answer`; there is `question`"
    assert refused(path).line == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "no column `label`; there is `text`"),
        ({"text": "a", "label": None}, "`label` is null, expected text"),
        ({"text": "a", "label": " "}, "`label` is empty"),
        ({"text": "a", "label": 0.5}, "`label` is a number, expected text"),
    ],
)
def test_bad_labels_are_refused(tmp_path, row, message):
    path = write(tmp_path / "a.jsonl", {"text": "a", "label": "b"}, row)
    error = refused(path, task="classify")
    assert (error.message, error.line) == (message, 2)


def test_columns_may_be_named(tmp_path):
    row = {"q": "Hi", "a": "Hello.", "s": "Be kind.", "messages": "no"}
    path = write(tmp_path / "a.jsonl", row)
    assert read(path, columns=["prompt=q, response=a"])[0].messages == (ASKED, SAID)
    assert read(path, columns=["prompt=q,response=a", "system=s"])[0].messages[0] == SYSTEM
    assert read(path, columns=["text=s"])[0].text == "Be kind."
    labelled = read(path, columns=["text=q,label=a"], task="classify")
    assert (labelled[0].text, labelled[0].label) == ("Hi", "Hello.")
    error = refused(path, columns=["prompt=q,response=a,system=nowhere"])
    assert error.message.startswith("no column `nowhere`; there is `q`, `a`")
    path = write(tmp_path / "b.jsonl", {"chat": [ASKED, SAID]})
    assert read(path, columns=["messages=chat"])[0].messages == (ASKED, SAID)


@pytest.mark.parametrize(
    ("columns", "task", "message"),
    [
        ("promt=q", "chat", "no role `promt` in --task chat"),
        ("label=q", "chat", "no role `label`"),
        ("prompt=q", "classify", "no role `prompt` in --task classify"),
        ("prompt", "chat", "expected ROLE=NAME"),
        ("prompt=", "chat", "expected ROLE=NAME"),
        ("prompt=a,prompt=b", "chat", "given twice"),
        ("messages=a,prompt=b", "chat", "`prompt` does not go with `messages`"),
        ("text=a,system=b", "chat", "`system` does not go with `text`"),
    ],
)
def test_columns_that_make_no_sense_are_refused(columns, task, message):
    with pytest.raises(UserError, match=message) as caught:
        read_examples(["none.jsonl"], columns=[columns], task=task)
    assert caught.value.code == 2


def test_parts_tools_and_weights_are_kept(tmp_path):
    tools = [{"type": "function", "function": {"name": "add"}}]
    call = {"id": "1", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": t} for t in ("H", "i")]},
            {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
            {"role": "tool", "content": "2", "name": "add", "tool_call_id": "1"},
            SAID | {"tool_calls": None, "extra": 1},
        ],
        "tools": json.dumps(tools),
    }
    (example,) = read(write(tmp_path / "a.jsonl", row))
    called = {"id": "1", "function": {"name": "add", "arguments": {"a": 1}}}
    assert example.tools == tools
    assert example.messages == (
        ASKED,
        {"role": "assistant", "content": "", "tool_calls": [called], "weight": 0},
        {"role": "tool", "content": "2", "name": "add", "tool_call_id": "1"},
        SAID,
    )


BAD_LINE = "not JSON\n"


def test_bad_rows_are_left_out_up_to_a_number_and_counted(tmp_path, caplog, monkeypatch):
    path = tmp_path / "a.jsonl"
    fine = json.dumps(FINE) + "\n"
    path.write_text(fine + BAD_LINE + fine + '{"messages": []}\n' + fine + '["a"]\n')
    other = write(tmp_path / "b.json", FINE, "a", FINE)
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level("WARNING", "llmctl"):
        first, second = read_examples([str(path), str(other)], bad=(bad := BadRows(4)))
        bad.report()
    assert [example.line for example in first.examples] == [1, 3, 5]
    assert (len(second.examples), bad.count) == (2, 4)
    assert "left out 4 rows that cannot be used, the first: " + f"{path}:2: not JSON" in caplog.text
    error = refused(path, other, bad=BadRows(3))
    assert error.file == str(other)
    assert error.message.endswith("got text (4 bad rows, --skip-bad-rows 3)")
    assert refused(path).line == 2


def test_a_bad_row_of_csv_is_left_out(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,response\na,b\nc\nd,"e"f\ng,h\n')
    assert [example.line for example in read(path, bad=BadRows(2))] == [2, 5]
    path.write_text('prompt,"resp"onse\na,b\n')
    assert refused(path, bad=BadRows(9)).message.startswith("not CSV")


@pytest.mark.parametrize(
    ("raw", "line", "what", "hint"),
    [
        (b"prompt,response\rWhat?,That\r", 1, "a carriage return without a line feed", "tr '"),
        (b'prompt,response\na,b\n"open,c\nd,e\n', 3, "is not closed by the end", "double each"),
    ],
)
def test_what_is_wrong_with_csv_is_said_in_words_of_the_file(tmp_path, raw, line, what, hint):
    path = tmp_path / "a.csv"
    path.write_bytes(raw)
    error = refused(path)
    assert (error.file, error.line, error.code) == (str(path), line, 3)
    assert what in error.message
    assert hint in error.hint


def test_two_columns_of_one_name_are_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,response,prompt\na,b,c\n")
    assert (refused(path).message, refused(path).line) == ("two columns are named `prompt`", 1)


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("a.jsonl", b""),
        ("a.jsonl", b"\n \n"),
        ("a.json", b""),
        ("a.json", b"[ ]\n"),
        ("a.csv", b""),
        ("a.csv", b"prompt,response\n"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)),
    ],
)
def test_an_empty_file_is_refused(tmp_path, name, raw):
    (tmp_path / name).write_bytes(raw)
    error = refused(tmp_path / name)
    assert error.message == "an empty file: no rows in it"
    assert error.file == str(tmp_path / name)


def test_a_parquet_file_without_rows_and_one_without_good_ones_are_refused(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    assert refused(tmp_path / "a.parquet").message == "an empty file: no rows in it"
    path = write(tmp_path / "a.jsonl", {"text": ""})
    assert refused(path, bad=BadRows(3)).message == "no row of it can be read"
    path.write_text(BAD_LINE)
    assert refused(path, bad=BadRows(3)).message == "no row of it can be read"


def test_plain_text_is_refused_but_may_lie_beside_rows(tmp_path):
    (tmp_path / "README.md").write_text("About.")
    error = refused(tmp_path)
    assert "plain text" in error.message
    assert "llmctl pretrain" in error.hint
    write(tmp_path / "a.jsonl", FINE)
    write(tmp_path / "b.json", {"question": "Hi", "answer": "Hello."})
    assert [example.messages for example in read(tmp_path)] == [(ASKED, SAID)] * 2


def test_weights_are_read_off_the_names(tmp_path):
    first, second = (write(tmp_path / name, FINE) for name in ("a.jsonl", "b.jsonl"))
    sets = read_examples([f"{first}=0.7", f"{second}=3e-1", "builtin:tasks:3=2"])
    assert [found.weight for found in sets] == [0.7, 0.3, 2.0]
    assert [found.name for found in sets] == [str(first), str(second), "builtin:tasks:3"]
    entry = {"role": "data", "path": str(first), "kind": "jsonl", "sha256": sha256_file(first)}
    assert sets[0].inputs == [entry]
    odd = write(tmp_path / "c.jsonl=0.5", FINE)
    odd.rename(tmp_path / "c=0.5")
    (rows,) = read_examples([str(tmp_path / "c=0.5")])
    assert (rows.name, rows.weight) == (str(tmp_path / "c=0.5"), None)
    folder = tmp_path / "d=0.5"
    folder.mkdir()
    write(folder / "a.jsonl", FINE)
    assert read_examples([str(folder)])[0].weight is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["a.jsonl=0.5", "b.jsonl"], "b.jsonl has no weight, but a.jsonl has one"),
        (["a.jsonl=0"], "the weight 0 is not a positive number"),
        (["a.jsonl=-1"], "the weight -1"),
        (["a.jsonl=nan"], "the weight nan"),
        (["a.jsonl=inf"], "the weight inf"),
    ],
)
def test_bad_weights_are_refused(data, message):
    with pytest.raises(UserError, match=message) as caught:
        read_examples(data)
    assert caught.value.code == 2


def test_a_file_counts_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.jsonl", FINE)
    assert len(read_examples([str(path), "a.jsonl"])) == 1
    with pytest.raises(UserError, match="named twice"):
        read_examples([f"{path}=1", "a.jsonl=1"])


def test_built_in_tasks_are_examples():
    (found,) = read_examples(["builtin:tasks:1"], role="val-data")
    assert [example.messages for example in found.examples] == [
        tuple(task.messages()) for task in tasks(1)
    ]
    assert found.examples[4].name == "builtin:tasks:1:5"
    (facts,) = found.inputs
    assert (facts["role"], facts["path"], len(facts["sha256"])) == ("val-data", found.name, 64)
