import hashlib
import json

import numpy as np
import pytest

from llmctl.data.shards import open_tokens, shard_writer
from llmctl.errors import DataError


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, 60_000, 1000)


def write(folder, tokens, limit=300, dtype="<u2", chunk=170):
    """Tokens in chunks, every seventh position the end of a document; the index by hand."""
    folder.mkdir(exist_ok=True)
    ends = np.arange(6, len(tokens), 7)
    with shard_writer(folder, "train", dtype, limit) as writer:
        for start in range(0, len(tokens), chunk):
            inside = ends[(ends >= start) & (ends < start + chunk)] - start
            writer.write(tokens[start : start + chunk], inside)
    shards = [vars(shard) for shard in writer.shards]
    split = {"tokens": len(tokens), "documents": len(ends), "bytes": 5, "shards": shards}
    facts = {"vocab_size": 60_000, "eos_token_id": 1, "bos_token_id": 0, "tokenizer_sha256": "x"}
    index = {"dtype": dtype, **facts, "splits": {"train": split}}
    (folder / "index.json").write_text(json.dumps(index))
    return shards


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_every_window_is_read_across_shards(tmp_path, tokens, dtype):
    write(tmp_path, tokens, dtype=dtype)
    train = open_tokens(tmp_path).train
    for length in (1, 64, 299, 300, 301, 700, 1000):
        starts = np.arange(0, 1000 - length + 1, 13)
        expected = np.stack([tokens[s : s + length] for s in starts])
        found = train.windows(starts, length)
        assert found.dtype == np.int64
        assert (found == expected).all()
        assert (train.window(int(starts[-1]), length) == expected[-1]).all()


def test_shards_are_plain_arrays_of_the_limit(tmp_path, tokens):
    shards = write(tmp_path, tokens)
    files = sorted(p.name for p in tmp_path.glob("*.bin"))
    assert files == [f"train-0000{i}.bin" for i in range(4)]
    assert [shard["tokens"] for shard in shards] == [300, 300, 300, 100]
    raw = b"".join((tmp_path / name).read_bytes() for name in files)
    assert raw == tokens.astype("<u2").tobytes()
    for shard in shards:
        content = (tmp_path / shard["file"]).read_bytes()
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()


def test_documents_belong_to_the_shard_that_they_end_in(tmp_path, tokens):
    shards = write(tmp_path, tokens)
    assert [shard["documents"] for shard in shards] == [42, 43, 43, 14]


def test_a_full_last_shard_leaves_no_empty_one(tmp_path, tokens):
    shards = write(tmp_path, tokens[:600])
    assert [shard["tokens"] for shard in shards] == [300, 300]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "index.json",
        "train-00000.bin",
        "train-00001.bin",
    ]


def test_a_window_past_the_end_is_refused(tmp_path, tokens):
    write(tmp_path, tokens)
    train = open_tokens(tmp_path).train
    for start in (-1, 991):
        with pytest.raises(IndexError):
            train.window(start, 10)


def test_an_error_leaves_no_file(tmp_path, tokens):
    def fail():
        with shard_writer(tmp_path, "train", "<u2", 300) as writer:
            writer.write(tokens, np.array([], np.int64))
            assert len(list(tmp_path.iterdir())) == 4
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_files_have_their_names_only_when_all_is_written(tmp_path, tokens):
    with shard_writer(tmp_path, "train", "<u2", 300) as writer:
        writer.write(tokens, np.array([], np.int64))
        assert not list(tmp_path.glob("*.bin"))
    assert len(list(tmp_path.glob("*.bin"))) == 4


def test_a_missing_folder_or_index_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match="no token shards here"):
            open_tokens(folder)


def test_a_missing_or_short_shard_is_refused(tmp_path, tokens):
    write(tmp_path, tokens)
    path = tmp_path / "train-00001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match="598 bytes, but the index says 600") as caught:
        open_tokens(tmp_path)
    assert caught.value.file == str(path)
    path.unlink()
    with pytest.raises(DataError, match="a token shard is missing"):
        open_tokens(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"splits": 3, "dtype": "<u2"}'])
def test_a_broken_index_is_refused(tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(DataError, match="not an index of token shards"):
        open_tokens(tmp_path)
