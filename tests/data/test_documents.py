import gzip
import io
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from llmctl.data import documents
from llmctl.data import rows as rows_module
from llmctl.data.bad_rows import BadRows
from llmctl.data.builtin import python_docs
from llmctl.data.documents import read_pieces
from llmctl.data.sources import find_sources
from llmctl.errors import DataError, NetworkError

ODD = "\ufeffa\r\nb\rc\x00\x1c\u2028d\té😀\n"


def texts(tmp_path, *data, column="text"):
    """The documents of what `--data` names, pieces joined."""
    found, held = [], ""
    for source in find_sources([str(d) for d in data], tmp_path):
        for piece in read_pieces(source, column):
            held += piece.text
            if piece.is_last:
                found.append(held)
                held = ""
    assert held == ""
    return found


def packed(raw, suffix):
    if suffix == ".gz":
        return gzip.compress(raw)
    return zstandard.ZstdCompressor().compress(raw) if suffix == ".zst" else raw


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.log", "a.txt.gz", "a.md.zst", "a"])
def test_plain_text_is_one_document_kept_to_the_byte(tmp_path, spool, name):
    path = tmp_path / name
    path.write_bytes(packed(ODD.encode(), path.suffix))
    assert texts(spool, path) == [ODD]


def test_a_character_across_two_blocks_is_whole(tmp_path, spool, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 7)
    path = tmp_path / "a.txt"
    path.write_text("é😀" * 50)
    assert texts(spool, path) == ["é😀" * 50]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("block", [5, 1 << 20])
def test_invalid_utf8_is_refused_with_its_offset(tmp_path, spool, monkeypatch, suffix, block):
    monkeypatch.setattr(documents, "BLOCK_BYTES", block)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(packed("é".encode() * 6 + b"\xe9tat", suffix))
    with pytest.raises(DataError, match="not UTF-8 at byte 12") as caught:
        texts(spool, path)
    assert caught.value.file == str(path)


def test_a_character_cut_off_at_the_end_is_refused(tmp_path, spool):
    path = tmp_path / "a.txt"
    path.write_bytes("aé".encode()[:-1])
    with pytest.raises(DataError, match="not UTF-8 at byte 1"):
        texts(spool, path)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_utf16_is_recognised(tmp_path, spool, encoding, name):
    path = tmp_path / name
    path.write_bytes('\ufeff{"text": "hello"}\n'.encode(encoding))
    with pytest.raises(DataError, match="UTF-16 byte-order mark") as caught:
        texts(spool, path)
    assert "iconv -f UTF-16" in str(caught.value)


def test_invalid_utf8_in_jsonl_counts_from_the_start_of_the_file(tmp_path, spool):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match="not UTF-8 at byte 24"):
        texts(spool, path)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_line_of_jsonl_is_a_document(tmp_path, spool, suffix):
    rows = [{"text": ODD}, {"more": [1, {"text": 2}], "text": "b\nc"}]
    path = tmp_path / f"a.jsonl{suffix}"
    raw = "\n\n".join(map(json.dumps, rows)).encode()
    path.write_bytes(packed(raw, suffix))
    assert texts(spool, path) == [ODD, "b\nc"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_element_of_a_json_array_is_a_document(tmp_path, spool, suffix, indent):
    path = tmp_path / f"a.json{suffix}"
    raw = json.dumps([{"text": ODD}, {"text": "b\nc"}], indent=indent, ensure_ascii=False)
    path.write_bytes(packed(("\ufeff\n " + raw).encode(), suffix))
    assert texts(spool, path) == [ODD, "b\nc"]


def test_a_json_file_may_hold_lines(tmp_path, spool):
    path = tmp_path / "a.json"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert texts(spool, path) == ["a", "b"]
    path.write_text('{\n"text": "a"\n}')
    with pytest.raises(DataError, match="an array of objects, or one object a line"):
        texts(spool, path)


def test_an_array_over_the_limit_is_refused(tmp_path, spool, monkeypatch):
    monkeypatch.setattr(rows_module, "ARRAY_BYTES", 1 << 20)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a" * (1 << 20)}]))
    with pytest.raises(DataError, match="an array of more than 1 MiB, the limit"):
        texts(spool, path)


def test_invalid_utf8_in_an_array_is_refused_with_its_offset(tmp_path, spool):
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "\xff"}]')
    with pytest.raises(DataError, match="not UTF-8 at byte 11"):
        texts(spool, path)


def test_reading_goes_on_after_a_bad_row_where_it_can(tmp_path, spool):
    rows = {
        "a.jsonl": '{"n": "1"}\nno\n[]\n{"n": "2"}\n',
        "a.json": '[{"n": "1"},\n7,\nnull,\n{"n": "2"}]',
        "a.csv": 'n\n1\n"2"3\n4,5\n2\n',
    }
    for name, text in rows.items():
        (tmp_path / name).write_text(text)
        (source,) = find_sources([str(tmp_path / name)], spool)
        bad = []
        found = list(rows_module.read_rows(source, on_bad=bad.append))
        assert [record.values for record in found] == [{"n": "1"}, {"n": "2"}]
        first = found[0].line
        assert [error.line for error in bad] == [first + 1, first + 2]
        assert found[1].line == first + 3
        with pytest.raises(DataError) as caught:
            list(rows_module.read_rows(source))
        assert caught.value.line == first + 1


def test_plain_text_has_no_rows(tmp_path, spool):
    (tmp_path / "a.txt").write_text("a")
    (source,) = find_sources([str(tmp_path / "a.txt")], spool)
    with pytest.raises(DataError, match="plain text has no rows"):
        rows_module.read_rows(source)


def test_a_byte_order_mark_before_jsonl_is_dropped(tmp_path, spool):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "a"}\n')
    assert texts(spool, path) == ["a"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text" "a"}', "not JSON: Expecting ':' delimiter at column 9"),
        ('{"text": "a"', "not JSON: Expecting ',' delimiter at column 13"),
        ('{"text": "a"} {"text": "b"}', "Extra data at column 15"),
        ('{"text": "a", "text": "b"}', "duplicate key `text`"),
        ('{"text": "a", "n": NaN}', "NaN is no JSON number"),
        ('{"text": "a", "n": -Infinity}', "-Infinity is no JSON number"),
        ('["a"]', "expected an object, got an array"),
        ('"a"', "got text"),
        ('{"prompt": "a", "answer": "b"}', "no column `text`; there is `prompt`, `answer`"),
        ('{"text": null}', "`text` is null, expected text"),
        ('{"text": 7}', "`text` is a number"),
        ('{"text": ["a"]}', "`text` is an array"),
        ('{"text": "a\\ud800"}', r"half a surrogate pair, \\ud800"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "a number of more than 4,300 digits"),
        ("[" * 100_000, "arrays or objects within each other"),
    ],
)
def test_a_bad_line_of_jsonl_is_refused_with_its_number(tmp_path, spool, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=message) as caught:
        texts(spool, path)
    assert (caught.value.file, caught.value.line) == (str(path), 3)


def test_a_line_over_the_limit_is_refused(tmp_path, spool, monkeypatch):
    monkeypatch.setattr(rows_module, "LINE_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + json.dumps({"text": "b" * (1 << 20)}))
    with pytest.raises(DataError, match="a line of more than 1 MiB, the limit") as caught:
        texts(spool, path)
    assert caught.value.line == 2


def test_csv_rows_are_documents(tmp_path, spool):
    path = tmp_path / "a.csv"
    path.write_bytes('\ufeffid,text\r\n1,"a, ""b""\r\nc"\r\n\r\n2,d\r\n'.encode())
    assert texts(spool, path) == ['a, "b"\r\nc', "d"]


@pytest.mark.parametrize(
    ("rows", "message", "line"),
    [
        ("id,body\n1,a\n", "no column `text`; there is `id`, `body`", 1),
        ("id,text\n1,a\n2\n", "1 fields, but the header has 2", 3),
        ('id,text\n1,"a"b\n', "not CSV", 2),
        (
            'id,text\n1,"a\n',
            "the quotation mark . that begins a field is not closed by the end of the file",
            2,
        ),
        ('id,text\n1,"a\nb"\n2\n', "1 fields, but the header has 2", 4),
        (
            'id,text\n1,a\n2,"b\n\n',
            "the quotation mark . that begins a field is not closed by the end of the file",
            3,
        ),
        ("text,text\na,b\n", "two columns are named `text`", 1),
    ],
)
def test_bad_csv_is_refused(tmp_path, spool, rows, message, line):
    path = tmp_path / "a.csv"
    path.write_text(rows)
    with pytest.raises(DataError, match=message) as caught:
        texts(spool, path)
    assert caught.value.line == line


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_parquet_rows_are_documents(tmp_path, spool, suffix):
    path = tmp_path / f"a.parquet{suffix}"
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": ["a", ODD], "n": [1, 2]}), sink)
    path.write_bytes(packed(sink.getvalue(), suffix))
    assert texts(spool, path) == ["a", ODD]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a", None]}, "`text` is null"),
        ({"text": [1, 2]}, "`text` is a number"),
        ({"body": ["a"]}, "no column `text`; there is `body`"),
        ({"body": pa.array([], pa.string())}, "no column `text`; there is `body`"),
    ],
)
def test_bad_parquet_is_refused(tmp_path, spool, columns, message):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(DataError, match=message):
        texts(spool, path)


def test_columns_beside_the_text_are_noted(tmp_path, spool):
    rows = [{"text": "a", "id": 1, "note": ""}, {"text": "b", "url": "u"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.table({"text": ["c"], "id": [1]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("d")
    for name, unread in (("a.jsonl", ["id", "url"]), ("b.parquet", ["id"]), ("c.txt", [])):
        (source,) = find_sources([str(tmp_path / name)], spool)
        bad = BadRows()
        list(read_pieces(source, "text", bad))
        assert bad.unread == unread


def test_a_file_that_is_not_parquet_is_refused(tmp_path, spool):
    path = tmp_path / "a.parquet"
    path.write_text("no parquet")
    with pytest.raises(DataError, match="not a sound parquet file"):
        texts(spool, path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("cut", [10, -5])
def test_a_packed_file_that_is_cut_short_is_refused(tmp_path, spool, suffix, cut):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(packed(b"hello\n" * 100_000, suffix)[:cut])
    with pytest.raises(DataError, match="damaged"):
        texts(spool, path)


def test_a_folder_mixes_kinds_in_order_of_name(tmp_path, spool):
    folder = tmp_path / "data"
    (folder / "inner").mkdir(parents=True)
    (folder / "b.txt").write_text("second")
    (folder / "a.jsonl").write_text('{"text": "first"}\n')
    (folder / "inner" / "c.csv").write_text("text\nthird\n")
    (folder / ".hidden.txt").write_text("no")
    (folder / "image.png").write_bytes(b"\xff")
    assert texts(spool, folder) == ["first", "second", "third"]


def test_a_glob_takes_any_kind_as_text_and_each_file_once(tmp_path, spool):
    for name in "ab":
        (tmp_path / f"{name}.py").write_text(name)
    assert texts(spool, tmp_path / "*.py", tmp_path / "a.py") == ["a", "b"]


@pytest.mark.parametrize("name", ["none.txt", "none", "./none/x", "a/b/c", "a.jsonl.gz", "x*.py"])
def test_what_is_not_there_is_refused(spool, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no (such file|file matches)"):
        texts(spool, name)


def test_an_empty_folder_is_refused(spool):
    with pytest.raises(DataError, match="an empty corpus"):
        texts(spool, spool)


def test_an_archive_is_refused(tmp_path, spool):
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"a"))
    with pytest.raises(DataError, match=r"cannot read \.tar files"):
        texts(spool, tmp_path / "a.tar.gz")


def test_a_hub_id_while_offline_is_a_network_error(spool):
    with pytest.raises(NetworkError, match=r"HF_HUB_OFFLINE") as caught:
        texts(spool, "owner/name")
    assert "local file" in str(caught.value)


def test_stdin_is_kept_for_a_second_reading(spool, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(ODD.encode())))
    (source,) = find_sources(["-"], spool)
    for _ in range(2):
        assert "".join(piece.text for piece in read_pieces(source, "text")) == ODD


def test_python_docs_are_the_same_every_time_and_import_nothing(spool):
    first, modules = texts(spool, "builtin:python-docs"), set(sys.modules)
    python_docs.cache_clear()
    assert texts(spool, "builtin:python-docs") == first
    assert len(first) > 200
    assert sum(map(len, first)) > 400_000
    assert min(map(len, first)) >= 200
    assert "turtle" not in modules & set(sys.modules)


def test_unknown_built_in_data_is_refused(spool):
    with pytest.raises(DataError, match="there is builtin:python-docs"):
        texts(spool, "builtin:shakespeare")
