"""Rows of parquet and Arrow are those that were put in."""

import datetime
import decimal
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmctl.data.arrow import plain_row
from llmctl.data.rows import checked_text, read_rows
from llmctl.data.sources import Source, find_sources
from llmctl.errors import DataError
from tests.run_files import write_rows


def read(path, spool, columns=None):
    (source,) = find_sources([str(path)], spool)
    return [record.values for record in read_rows(source, columns)]


@pytest.fixture(params=["parquet", "arrow", "parquet.gz"])
def save(request, tmp_path):
    """Write a table in one of the forms."""

    def written(table):
        path = tmp_path / f"a.{request.param}"
        if "arrow" in request.param:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
                out.write_table(table, max_chunksize=3)
        else:
            out = pa.CompressedOutputStream(str(path), "gzip") if "gz" in request.param else path
            pq.write_table(table, out)
            if out is not path:
                out.close()
        return path

    return written


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def talk(*calls):
    return [
        {"role": "user", "content": "Go on."},
        {"role": "assistant", "content": None, "tool_calls": list(calls)},
    ]


ROUTE = {"to": "Rom", "stops": [{"at": "Bonn"}, {"hour": 7}]}
TEXT, NUMBER = {"type": "string"}, {"type": "integer"}
ROWS = [
    {
        "messages": talk(call("weather", city="Oslo", days=2)),
        "tools": [tool("weather", city=TEXT, days=NUMBER)],
    },
    {
        "messages": talk(call("add", a=1, b=2), call("route", way=ROUTE)),
        "tools": [tool("add", a=NUMBER, b={"enum": ["1", None]})],
    },
    {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        "tools": None,
    },
]
"""Rows whose calls and schemas have other keys, a list that holds null, a column that is null."""


def test_objects_have_the_keys_they_were_written_with(save, spool, said):
    path = save(pa.Table.from_pylist(ROWS))
    assert pa.Table.from_pylist(ROWS).to_pylist() != ROWS
    assert read(path, spool) == ROWS
    assert read(path, spool, ["tools"]) == [{"tools": row["tools"]} for row in ROWS]
    assert said.text.count("null values inside tools and other nested objects are left out") == 1


def test_rows_of_the_hub_have_them_too():
    rows = pa.Table.from_pylist(ROWS).to_pylist()
    assert [plain_row(row, "owner/name") for row in rows] == ROWS


def test_a_null_that_was_written_is_kept_where_the_hub_keeps_json(tmp_path, spool, monkeypatch):
    """`datasets` keeps objects of other keys as JSON, and those of equal keys as Arrow does."""
    import datasets

    written = [
        {"tools": [{"name": "f", "parameters": {"unit": None, "city": "Oslo"}}], "meta": {"n": 1}},
        {"tools": [{"name": "g", "parameters": {"day": 1}}], "meta": {"n": None}},
    ]
    file = write_rows(tmp_path / "a.jsonl", written)
    streamed = datasets.load_dataset(
        "json", data_files=str(file), split="train", streaming=True, cache_dir=str(tmp_path / "c")
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: streamed)
    found = [record.values for record in read_rows(Source("owner/name", "hub", revision="a"))]
    assert found == [written[0], {**written[1], "meta": {}}]
    kept = tmp_path / "kept.parquet"
    table = datasets.Dataset.from_list([dict(row) for row in streamed], streamed.features)
    table.to_parquet(str(kept))
    (source,) = find_sources([str(kept)], spool)
    assert [record.values for record in read_rows(source)] == found


def test_jsonl_keeps_a_null_that_is_written(tmp_path, spool):
    row = {"tools": [{"city": None, "n": 1}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert read(tmp_path / "a.jsonl", spool) == [row]


def test_rows_without_nested_objects_say_nothing_of_them(save, spool, said):
    rows = [{"text": "a", "n": None, "l": ["x", None]}, {"text": None, "n": 1, "l": None}]
    assert read(save(pa.Table.from_pylist(rows)), spool) == rows
    assert "left out" not in said.text


def test_maps_and_json_are_objects_with_the_nulls_they_have(save, spool):
    pairs = pa.array([[("b", "x"), ("a", None)], [], None], pa.map_(pa.string(), pa.string()))
    texts = pa.array(['{"k": null, "l": [1]}', '"t"', None])
    nested = pa.array([[{"arguments": text}] for text in ('{"z": null}', "7", None)])
    types = pa.list_(pa.struct({"arguments": pa.json_()}))
    columns = {"m": pairs, "j": texts.cast(pa.json_()), "n": nested.cast(types)}
    assert read(save(pa.table(columns)), spool) == [
        {"m": {"b": "x", "a": None}, "j": {"k": None, "l": [1]}, "n": [{"arguments": {"z": None}}]},
        {"m": {}, "j": "t", "n": [{"arguments": 7}]},
        {"m": None, "j": None, "n": [{}]},
    ]


def test_bytes_that_are_text_are_read(save, spool):
    columns = {
        "text": pa.array(["hé".encode(), None], pa.binary()),
        "large": pa.array([b"x", b"\xff"], pa.large_binary()),
        "list": pa.array([[b"a"], []], pa.list_(pa.binary())),
    }
    assert read(save(pa.table(columns)), spool) == [
        {"text": "hé", "large": "x", "list": ["a"]},
        {"text": None, "large": b"\xff", "list": []},
    ]


KINDS = {
    "bytes that are not UTF-8": b"\xff\xfe",
    "a timestamp": datetime.datetime(2024, 5, 1, 12, 30),
    "a date": datetime.date(2024, 5, 1),
    "a time of day": datetime.time(12, 30),
    "a duration": datetime.timedelta(seconds=7),
    "a decimal number": decimal.Decimal("1.5"),
    "a number": 1.5,
    "true or false": True,
}


@pytest.mark.parametrize("what", KINDS)
def test_what_is_no_text_is_called_what_it_is(save, spool, what):
    (row,) = read(save(pa.table({"text": [KINDS[what]]})), spool)
    with pytest.raises(DataError, match=f"`text` is {what}, expected text"):
        checked_text(row["text"], "text")


def test_a_damaged_file_is_refused(save, spool):
    path = save(pa.Table.from_pylist(ROWS * 100))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"not a sound (parquet|Arrow) file|damaged") as caught:
        read(path, spool)
    assert caught.value.file == str(path)
