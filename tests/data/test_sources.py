"""Folders, links and data sets saved to disk."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from llmctl.data.documents import read_pieces
from llmctl.data.rows import read_rows
from llmctl.data.sources import find_sources
from llmctl.errors import DataError


def texts(spool, *data):
    """The text of each file that is found."""
    sources = find_sources([str(d) for d in data], spool)
    return ["".join(piece.text for piece in read_pieces(s, "text")) for s in sources]


def rows(spool, *data):
    sources = find_sources([str(d) for d in data], spool)
    return [record.values for source in sources for record in read_rows(source)]


def tree(root, **files):
    """Write files by their names, `__` for `/` and without the suffix."""
    for name, text in files.items():
        path = root / f"{name.replace('__', '/')}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_linked_folders_and_files_are_read(tmp_path, spool):
    folder = tree(tmp_path / "data", a__1="one")
    tree(tmp_path / "elsewhere", two="two", deep__three="three", _="four")
    (folder / "b").symlink_to(tmp_path / "elsewhere")
    (folder / "c.txt").symlink_to(tmp_path / "elsewhere" / "two.txt")
    assert texts(spool, folder) == ["one", "four", "three", "two"]
    for pattern in ("data/*/*.txt", "data/**/*.txt"):
        assert {"one", "four", "two"} <= set(texts(spool, tmp_path / pattern))
    assert sorted(texts(spool, tmp_path / "data" / "**" / "*.txt")) == sorted(texts(spool, folder))


def test_a_real_folder_is_read_once_and_loops_are_cut(tmp_path, spool):
    folder = tree(tmp_path / "data", a__1="one", a__b__2="two", z="three")
    (folder / "0").symlink_to(folder / "a")
    (folder / "a" / "b" / "up").symlink_to(folder)
    (folder / "a" / "top").symlink_to(tmp_path)
    (folder / "y").symlink_to(folder / "a" / "b")
    (folder / "self").symlink_to("self")
    tree(tmp_path, beside="not in the folder")
    with pytest.raises(DataError, match="a link to what is not there") as caught:
        texts(spool, folder)
    assert caught.value.hint == "it leads back to itself: remove it"
    (folder / "self").unlink()
    sources = find_sources([str(folder)], spool)
    assert [source.name for source in sources] == [
        str(folder / name) for name in ("a/1.txt", "a/b/2.txt", "z.txt")
    ]
    assert sorted(texts(spool, folder / "**" / "*.txt")) == ["one", "three", "two"]


@pytest.mark.parametrize("pattern", ["", "*", "*.jsonl", "**/*.jsonl", "b.jsonl"])
def test_a_link_to_nothing_is_refused_by_name(tmp_path, spool, pattern):
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "half"}\n')
    (folder / "b.jsonl").symlink_to("../blobs/gone")
    with pytest.raises(DataError, match="a link to what is not there") as caught:
        find_sources([str(folder / pattern)], spool)
    assert caught.value.file == str(folder / "b.jsonl")
    assert "../blobs/gone" in caught.value.hint
    (folder / "b.jsonl").rename(folder / ".b.jsonl")
    if not pattern:
        assert len(find_sources([str(folder)], spool)) == 1


def test_a_folder_of_other_files_says_which(tmp_path, spool):
    folder = tmp_path / "code"
    folder.mkdir()
    for name in ("a.py", "b.py", "c.rs"):
        (folder / name).write_text("x = 1\n")
    with pytest.raises(DataError, match=r"3 files of other kinds \(\.py, \.rs\)") as caught:
        find_sources([str(folder)], spool)
    pattern = caught.value.hint.split("'")[1]
    assert len(find_sources([pattern], spool)) == 3


def test_rows_in_a_folder_are_read_whatever_the_file_is_called(tmp_path, spool, said):
    """By the rule of a single file; what holds no rows is left out, and both are said."""
    folder = tree(tmp_path / "data", a="from text")
    lines = [{"text": "one"}, {"text": "two"}]
    written = {
        "part-0": "\n".join(map(json.dumps, lines)),
        "part-1.2024": 'id,text\n1,three\n2,"four, five"\n',
        "part-2.dump": json.dumps([{"text": "six"}], indent=1),
        "a.jsonl": json.dumps({"text": "seven"}),
        "a.jsonl.bak": json.dumps({"text": "seven"}),
        "a.jsonl~": json.dumps({"text": "seven"}),
        "b.bak": json.dumps({"text": "eight"}),
        "README": "Ann, Bob\nand others: a list.\n",
        "make.py": 'import json\nROWS = [{"text": "no"}]\n',
        "notes.ipynb": '{\n "cells": []\n}\n',
        "log": json.dumps({"text": "no"}) + "\nthen words\n",
    }
    for name, text in written.items():
        (folder / name).write_text(text)
    (folder / "plot.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    pq.write_table(pa.table({"text": ["nine"]}), folder / "part-3")
    (folder / "part-4.gz").write_bytes(gzip.compress(b'{"text": "ten"}\n'))
    found = ["from text", "seven", "eight", "onetwo", "threefour, five", "six", "nine", "ten"]
    assert sorted(texts(spool, folder)) == sorted(found)
    assert "begins with a JSON object" not in said.text, "it is not read as text"
    assert "rows by what they begin as, in 6 files (b.bak, part-0, part-1.2024" in said.text
    assert "left out 7 files of other kinds (README, .bak, .jsonl~, log, .py)" in said.text


def test_a_folder_of_documents_says_what_to_do(tmp_path, spool):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.docx").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match=r"1 file of other kinds \(\.docx\)") as caught:
        find_sources([str(tmp_path / "docs")], spool)
    assert caught.value.hint == "save its text as .txt"


SAVED = [{"prompt": str(n), "response": "x" * n} for n in range(1, 8)]


def test_a_data_set_saved_to_disk_is_read(tmp_path, spool):
    folder = tmp_path / "saved"
    Dataset.from_list(SAVED).save_to_disk(folder, num_shards=3)
    (folder / "cache-1234.arrow").write_bytes(b"of an earlier map")
    assert rows(spool, folder) == SAVED
    Dataset.from_list(SAVED).select([5, 2]).save_to_disk(tmp_path / "chosen")
    assert rows(spool, tmp_path / "chosen") == [SAVED[5], SAVED[2]]
    (folder / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(DataError, match="a file of this saved data set is missing"):
        rows(spool, folder)


def test_of_splits_saved_to_disk_train_is_read_or_the_one_that_is_named(tmp_path, spool, said):
    train, test = Dataset.from_list(SAVED[:3]), Dataset.from_list(SAVED[3:])
    DatasetDict(train=train, test=test).save_to_disk(tmp_path / "all")
    assert rows(spool, tmp_path / "all") == SAVED[:3]
    assert "reading the split train; left out: test" in said.text
    assert rows(spool, tmp_path / "all" / "test") == SAVED[3:]
    DatasetDict(only=test).save_to_disk(tmp_path / "one")
    assert rows(spool, tmp_path / "one") == SAVED[3:]
    DatasetDict(dev=train, test=test).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match="without a split `train`; there is dev, test") as caught:
        rows(spool, tmp_path / "two")
    assert caught.value.hint.endswith("two/dev")


def test_each_file_is_read_once_however_it_is_named(tmp_path, spool, monkeypatch):
    tree(tmp_path / "data", a="one", b="two")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    named = ("data/b.txt", "data", tmp_path / "data", "link", "./data/*", "link/*")
    assert texts(spool, *named) == ["two", "one"]


def test_a_folder_that_only_looks_like_a_saved_one_is_a_folder(tmp_path, spool):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps([{"text": "a"}]))
    assert texts(spool, folder) == ["a"]
