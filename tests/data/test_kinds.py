"""What files hold: told by their suffix, else by how they begin; compressed in four ways."""

import bz2
import gzip
import io
import json
import lzma
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from llmctl.data import kinds
from llmctl.data.documents import read_pieces
from llmctl.data.examples import read_examples
from llmctl.data.kinds import file_kind
from llmctl.data.rows import read_rows
from llmctl.data.sources import find_sources, manifest_input
from llmctl.errors import DataError

ROWS = [{"prompt": "How, then?", "text": "Like\tthis"}, {"prompt": "And {so}?", "text": "[On]"}]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = 'prompt,text\n"How, then?",Like\tthis\nAnd {so}?,[On]\n'
TSV = 'prompt\ttext\nHow, then?\t"Like\tthis"\nAnd {so}?\t[On]\n'
PACK = {
    ".gz": gzip.compress,
    ".zst": lambda raw: zstandard.ZstdCompressor().compress(raw),
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def parquet():
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue()


def stream():
    sink, table = io.BytesIO(), pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def arrow_file():
    sink, table = io.BytesIO(), pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


FORMS = {
    "jsonl": JSONL.encode(),
    "json": json.dumps(ROWS, indent=1).encode(),
    "csv": CSV.encode(),
    "tsv": TSV.encode(),
    "parquet": parquet(),
    "arrow": stream(),
    "arrow of a file": arrow_file(),
}
SUFFIXES = {
    "jsonl": ("jsonl", "jsonlines", "jl", "ndjson", "JSONL"),
    "json": ("json", "Json"),
    "csv": ("csv", "CSV"),
    "tsv": ("tsv",),
    "parquet": ("parquet",),
    "arrow": ("arrow",),
}
NAMES = [(form, f"a.{s}") for form in SUFFIXES for s in SUFFIXES[form]] + [
    (form, name) for form in FORMS for name in ("a", "a.bak", "a.jsonl-1", "a.2024", "a.log")
]


def found(spool, *data):
    return find_sources([str(d) for d in data], spool)


@pytest.mark.parametrize(("form", "name"), NAMES)
def test_rows_are_read_whatever_the_file_is_called(tmp_path, spool, form, name):
    path = tmp_path / name
    path.write_bytes(FORMS[form])
    (source,) = found(spool, path)
    assert source.kind == form.split()[0]
    assert [row.values for row in read_rows(source)] == ROWS


@pytest.mark.parametrize("form", FORMS)
def test_a_pipe_is_what_it_begins_as(spool, monkeypatch, form):
    piped = io.TextIOWrapper(io.BytesIO(FORMS[form]))
    monkeypatch.setattr(sys, "stdin", piped)
    (source,) = found(spool, "-")
    assert (source.name, source.kind) == ("stdin", form.split()[0])
    assert [row.values for row in read_rows(source)] == ROWS


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("hidden", [False, True])
def test_a_compressed_file_is_read_with_its_suffix_or_without(
    tmp_path, spool, form, suffix, hidden
):
    path = tmp_path / ("a" if hidden else f"a.{form.split()[0]}{suffix}")
    path.write_bytes(PACK[suffix](FORMS[form]))
    (source,) = found(spool, path)
    assert [row.values for row in read_rows(source)] == ROWS


@pytest.mark.parametrize("suffix", [".xz", ".bz2"])
@pytest.mark.parametrize("cut", [20, -5])
def test_a_compressed_file_that_is_cut_short_is_refused(tmp_path, spool, suffix, cut):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(PACK[suffix](b"hello\n" * 100_000)[:cut])
    with pytest.raises(DataError, match="damaged"):
        "".join(piece.text for piece in read_pieces(*found(spool, path), "text"))


TEXTS = {
    "a list of links": "[1] One source\n[2] Another\n",
    "a number in brackets": "[2, 3] are primes\n",
    "a brace": "{curly} is how it began.\n",
    "a template": "{{ name }}, hello\n[{% if x %}]\n",
    "a template in an array": "[{% if x %}]\n",
    "sentences of one comma each": "Well, how are you?\nFine, thank you.\nGood, then.\n",
    "a sentence over two names": "Ann,Bob\nThey went home.\n",
    "a header alone": "prompt,text\n",
    "numbers": "1,2\n3,4\n",
    "rows of other lengths": "id,text\n1,a\n2,b,c\n",
    "a name twice": "text,text\na,b\n",
    "tabs in prose": "Name of it\tits age\nBob\t7\n",
    "an object before prose": '{\n "text": "a"\n}\nThat was JSON.\n',
    "an object and a line": '{"text": "a"}\nnot JSON\n',
    "a program": '{\n  "use strict";\n  run();\n}\n',
    "sentences of one semicolon each": "He came; she left\nIt rained; they sang\nGood; bad\n",
    "short sentences of one comma each": "Write me a poem, please\nTell a joke, now\nGo, go\n",
    "numbers in an array": "[1, 2]\n",
    "nothing": "",
    "white space": " \n\n",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("name", ["a", "a.log", "a.txt"])
def test_other_text_stays_text(tmp_path, spool, text, name):
    (tmp_path / name).write_text(text)
    (source,) = found(spool, tmp_path / name)
    assert source.kind == "text"
    assert "".join(piece.text for piece in read_pieces(source, "text")) == text


@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_a_name_of_text_is_believed(tmp_path, spool, name):
    text = '{\n "text": "a"\n}\n'
    (tmp_path / name).write_text(text)
    (source,) = found(spool, tmp_path / name)
    assert "".join(piece.text for piece in read_pieces(source, "text")) == text


@pytest.mark.parametrize("name", ["a", "a.dat", "a.json"])
@pytest.mark.parametrize("count", [1, 4000])
@pytest.mark.parametrize("packed", [False, True])
def test_an_object_over_several_lines_is_no_text(tmp_path, spool, name, count, packed):
    """Whatever it is called, and where its head alone is looked at."""
    raw = json.dumps({"data": [{"text": f"row {n}"} for n in range(count)]}, indent=2).encode()
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(raw) if packed else raw)
    (source,) = found(spool, path)
    with pytest.raises(DataError, match=r"one object over several lines; .* those of `data`") as e:
        list(read_rows(source))
    assert (e.value.file, e.value.line) == (str(path), 1)


def test_a_folder_leaves_out_such_an_object(tmp_path, spool):
    """There it is a setting or a notebook beside the data."""
    (tmp_path / "notes.ipynb").write_text(json.dumps({"cells": [], "nbformat": 4}, indent=1))
    (tmp_path / "a.jsonl").write_text(JSONL)
    (source,) = found(spool, tmp_path)
    assert source.name == str(tmp_path / "a.jsonl")


@pytest.mark.parametrize("broken", [0, 2, 4])
@pytest.mark.parametrize("line", ['{"text": "cut o', "not JSON", "[1, 2]"])
def test_rows_with_one_broken_line_are_no_text(tmp_path, spool, broken, line):
    lines = [json.dumps({"text": letter}) for letter in "abcd"]
    path = tmp_path / "a.dat"
    path.write_text("\n".join([*lines[:broken], line, *lines[broken:]]))
    (source,) = found(spool, path)
    assert source.kind == "jsonl"
    with pytest.raises(DataError) as refused:
        list(read_rows(source))
    assert (refused.value.file, refused.value.line) == (str(path), broken + 1)
    seen = []
    assert [row.values["text"] for row in read_rows(source, on_bad=seen.append)] == list("abcd")
    assert len(seen) == 1


TABLES = {
    "semicolons": 'prompt;text\n"How; then?";1,5\nWhat?;This\n',
    "words": 'the prompt,best text\n"How, then?",Like this\nWhat?,That\n',
    "words and semicolons": "the prompt;best text\nHow?;1,5\nWhat?;This\n",
    "words and tabs": "the prompt\tbest text\nHow?\tSo\nWhat?\tThis\n",
}


@pytest.mark.parametrize("text", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("name", ["a", "a.bak"])
def test_tables_of_spreadsheets_are_read_as_under_their_own_name(tmp_path, spool, text, name):
    (tmp_path / name).write_text(text)
    (source,) = found(spool, tmp_path / name)
    kind = "tsv" if "\t" in text else "csv"
    (tmp_path / f"own.{kind}").write_text(text)
    (own,) = found(spool, tmp_path / f"own.{kind}")
    rows = [row.values for row in read_rows(source)]
    assert source.kind == kind
    assert len(rows) == 2
    assert rows == [row.values for row in read_rows(own)]


def test_lines_of_any_length_and_a_torn_end_are_told(tmp_path, spool, monkeypatch):
    long = "".join(json.dumps({"text": letter * 300_000}) + "\n" for letter in "abc")
    for number, text in enumerate((long, long[:-1], "\n\n" + JSONL * 5000, "\ufeff" + JSONL)):
        (tmp_path / f"a{number}").write_text(text)
        assert file_kind(tmp_path / f"a{number}", "a").kind == "jsonl"
    (tmp_path / "array").write_text(json.dumps([{"text": "a" * 300_000}, {"text": "b"}], indent=2))
    assert file_kind(tmp_path / "array", "array").kind == "json"
    (tmp_path / "table").write_text('id,text\n7,"a\n\nb"\n' + '8,"c, d"\n' * 20_000)
    assert file_kind(tmp_path / "table", "table").kind == "csv"
    monkeypatch.setattr(kinds, "HEAD_BYTES", 40)
    (tmp_path / "table").write_text('id,text\n7,"a\nb"\n8,"' + "c" * 50 + '"\n')
    assert file_kind(tmp_path / "table", "table").kind == "csv"


def test_twenty_lines_tell_and_blank_ones_do_not_count(tmp_path, said):
    rows = [json.dumps({"text": str(n)}) for n in range(20)]
    for name, lines in {"a": [*rows, "no", "no"], "b": ["", *rows[:18], "", "no", "no"]}.items():
        (tmp_path / name).write_text("\n".join(lines))
    assert file_kind(tmp_path / "a", "a").kind == "jsonl"
    assert file_kind(tmp_path / "b", f"{tmp_path}/b").kind == "text"
    assert "b: begins with a JSON object, but not every line is one" in said.text


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.xz"])
def test_rows_under_a_name_of_text_are_warned_of_once(tmp_path, spool, said, name):
    raw = JSONL.encode()
    (tmp_path / name).write_bytes(lzma.compress(raw) if name.endswith("xz") else raw)
    for _ in range(3):
        (source,) = found(spool, tmp_path / name)
    assert source.kind == "text"
    assert said.text.count("each line is a JSON object") == 1


def test_the_kind_is_said_and_recorded(tmp_path, spool, said):
    (tmp_path / "a.bak").write_bytes(gzip.compress(JSONL.encode()))
    (source,) = found(spool, tmp_path / "a.bak")
    assert f"{tmp_path}/a.bak: read as jsonl, gzip" in said.text
    assert manifest_input("data", source, str)["kind"] == "jsonl"


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 9000\n"
FOREIGN = {
    "a pointer of git-lfs": (("a.txt", "a.jsonl", "a.parquet", "a", "a.csv"), POINTER),
    "a zip archive": (("a", "a.txt", "a.bak"), b"PK\x03\x04\x14\x00\x06\x00rest"),
    "a PDF": (("a", "a.md"), b"%PDF-1.7\n%\xe2\xe3"),
    "cannot read .docx files": (("a.docx",), b"PK\x03\x04"),
    "cannot read .xlsx files": (("a.xlsx",), b"PK\x03\x04"),
    "cannot read .tar files": (("a.tar.bz2", "a.tar"), b""),
}


@pytest.mark.parametrize(
    ("message", "name"), [(what, name) for what in FOREIGN for name in FOREIGN[what][0]]
)
def test_what_holds_no_text_is_called_what_it_is(tmp_path, spool, message, name):
    (tmp_path / name).write_bytes(FOREIGN[message][1])
    with pytest.raises(DataError, match=message) as caught:
        found(spool, tmp_path / name)
    assert "iconv" not in (caught.value.hint or "")
    assert caught.value.hint


def test_a_spreadsheet_with_semicolons_is_a_table(tmp_path):
    """As spreadsheets write it where the comma stands in numbers, with a byte-order mark."""
    file = tmp_path / "a.csv"
    file.write_bytes('\ufeffprompt;response\r\nHow warm?;"9,5; or so"\r\n'.encode())
    ((example,),) = (part.examples for part in read_examples([str(file)]))
    assert [message["content"] for message in example.messages] == ["How warm?", "9,5; or so"]
    file.write_text("prompt,response;x\na,b\n")
    with pytest.raises(DataError, match="no example in these columns: `prompt`, `response;x`"):
        read_examples([str(file)])
