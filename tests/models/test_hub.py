"""`id@revision`: the commit that a branch or tag stood at is used, recorded, and found again."""

import hashlib
import json
import shutil

import pytest
from tokenizers import Tokenizer

from llmctl.data.sources import find_sources
from llmctl.errors import DataError, NetworkError
from llmctl.models import hub as hub_module
from llmctl.models.loading import local_folder
from tests import hub_server
from tests.processes import run_llmctl

COMMITS = {"main": "a" * 40, "v1.0": "b" * 40, "refs/pr/1": "c" * 40}


FILES = {}
"""Kind and commit -> name -> content."""


class Server(hub_server.HubHandler):
    """A Hub of the model org/small and the data set org/rows, which differ by commit."""

    def do_GET(self):
        path = self.path.split("?")[0].replace("%2F", "/")
        kind = "datasets" if "/datasets/" in path else "models"
        known = "org/rows" if kind == "datasets" else "org/small"
        if known not in path:
            return self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        rest = path.split(known, 1)[1].strip("/")
        action, _, where = rest.partition("/")
        where = where or "main"
        revision = next((r for r in (*COMMITS, *COMMITS.values()) if where.startswith(r)), None)
        if revision is None:
            return self.answer(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
        commit = COMMITS.get(revision, revision)
        files = FILES[f"{kind} {commit}"]
        name = where.removeprefix(revision).strip("/")
        if action in ("", "revision"):
            siblings = [{"rfilename": name} for name in files]
            about = {"id": known, "sha": commit, "siblings": siblings, "tags": []}
            return self.answer(json.dumps(about).encode())
        if action == "tree":
            tree = [
                {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for n, b in files.items()
            ]
            return self.answer(json.dumps(tree).encode())
        if name in files:
            digest = hashlib.sha256(files[name]).hexdigest()
            return self.answer(files[name], 200, {"ETag": f'"{digest}"', "X-Repo-Commit": commit})
        missing = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
        return self.answer(b"{}", 404, missing)


@pytest.fixture(scope="module")
def endpoint(base, roomy):
    """main and v1.0 differ: another model, and data of other rows."""
    for name, run in (("main", base), ("v1.0", roomy), ("refs/pr/1", roomy)):
        files = {p.name: p.read_bytes() for p in (run / "model").iterdir()}
        files["other.bin"] = b"never fetched"
        FILES[f"models {COMMITS[name]}"] = files
        rows = [{"text": f"Row {n} of {name}.\n"} for n in range(50)]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        FILES[f"datasets {COMMITS[name]}"] = {"data.jsonl": content}
    with hub_server.serving(Server) as address:
        yield address


@pytest.fixture
def online(endpoint, monkeypatch, tmp_path):
    """The Hub libraries of this process talk to the server."""
    from huggingface_hub import constants

    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return monkeypatch


def offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/1", COMMITS["v1.0"]])
def test_a_model_of_a_revision_is_fetched_and_found_again_offline(online, revision):
    folder = local_folder(f"org/small@{revision}")
    assert folder.name == COMMITS.get(revision, revision)
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 128
    main = json.loads((local_folder("org/small") / "config.json").read_text())
    assert main["max_position_embeddings"] == 32
    offline(online)
    assert local_folder(f"org/small@{revision}") == folder
    assert hub_module.commit_of(f"org/small@{revision}") == folder.name
    with pytest.raises(NetworkError, match="switched off"):
        local_folder("org/small@never")


def test_a_run_records_the_commit_and_its_adapter_finds_the_base_again(cli, online, tmp_path):
    out = tmp_path / "run"
    flags = ("--data", "builtin:tasks", "--val-size", 2, "--max-steps", 1, "--samples", 0)
    size = ("--batch-size", 1, "--threads", 1, "--max-length", 64)
    result = cli("sft", "--model", "org/small@v1.0", "--lora", *flags, *size, "-o", out)
    assert result.code == 0, result.err
    model, *_ = json.loads((out / "manifest.json").read_text())["inputs"]
    assert (model["path"], model["revision"]) == ("org/small@v1.0", COMMITS["v1.0"])
    about = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == "org/small"
    assert about["revision"] == COMMITS["v1.0"], "PEFT opens it on this very base"
    offline(online)
    prompt = ("--prompt", "The", "--max-new-tokens", 2)
    assert cli("generate", "--model", out, *prompt).code == 0
    merged = cli("merge", "--model", out, "-o", tmp_path / "merged")
    assert merged.code == 0, merged.err
    inputs = json.loads((tmp_path / "merged" / "manifest.json").read_text())["inputs"]
    assert inputs[1]["revision"] == COMMITS["v1.0"]


def test_a_tokenizer_takes_a_revision(cli, online, corpus, tmp_path):
    flags = ("--data", corpus, "--tokenizer", "org/small@v1.0", "-o", tmp_path / "tok")
    result = cli("tokenize", *flags)
    assert result.code == 0, result.err
    *_, tokenizer = json.loads((tmp_path / "tok" / "manifest.json").read_text())["inputs"]
    assert tokenizer["role"] == "tokenizer"
    assert tokenizer["revision"] == COMMITS["v1.0"]


def test_a_data_set_is_pinned_to_the_commit_of_its_revision(online, tmp_path):
    (source,) = find_sources(["org/rows@v1.0"], tmp_path)
    assert (source.name, source.revision) == ("org/rows@v1.0", COMMITS["v1.0"])


@pytest.mark.slow
def test_rows_are_those_of_the_revision(endpoint, tmp_path):
    command = ["tokenize", "--data", "org/rows@v1.0", "--algorithm", "byte", "-o", tmp_path / "run"]
    ran = run_llmctl(*command, seconds=120, **hub_server.online(endpoint, tmp_path / "home"))
    assert ran.returncode == 0, ran.stderr
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    expected = {"role": "data", "path": "org/rows@v1.0", "kind": "hub", "sha256": None}
    assert manifest["inputs"] == [{**expected, "revision": COMMITS["v1.0"]}]
    shards = (tmp_path / "run" / "tokens").glob("*.bin")
    tokenizer = Tokenizer.from_file(str(tmp_path / "run" / "tokenizer" / "tokenizer.json"))
    text = tokenizer.decode([byte for shard in shards for byte in shard.read_bytes() if byte])
    assert "of v1.0" in text
    assert "of main" not in text


def test_a_revision_that_is_not_there_is_named(cli, online, tmp_path):
    result = cli("generate", "--model", "org/small@v9", "--prompt", "x")
    assert result.code == 6
    assert result.err == (
        "error: the Hub knows no revision `v9` of `org/small`\n"
        "pass a branch, a tag or a commit after the @\n"
    )
    with pytest.raises(DataError, match="no revision `v9` of `org/rows`"):
        find_sources(["org/rows@v9"], tmp_path)


@pytest.mark.parametrize("name", ["org/small@", "org/small@-x", "org/small@v 1", "@v1"])
def test_a_revision_that_cannot_be_is_no_hub_id(cli, name):
    result = cli("generate", "--model", name, "--prompt", "x")
    assert result.code == 4
    assert result.err == f"error: {name}: no such model folder\n"


def test_a_path_with_an_at_sign_is_a_path(cli, base, corpus, tmp_path):
    place = tmp_path / "a@b"
    shutil.copytree(base / "model", place)
    shutil.copyfile(corpus, place / "rows@v1.jsonl")
    result = cli("generate", "--model", place, "--prompt", "The", "--max-new-tokens", 2)
    assert result.code == 0, result.err
    (source,) = find_sources([str(place / "rows@v1.jsonl")], tmp_path)
    assert source.revision is None
    with pytest.raises(DataError, match="no such file"):
        find_sources([str(place / "none@v1.jsonl")], tmp_path)


def test_a_life_cycle_takes_a_pinned_id(cli, online, tmp_path):
    recipe = tmp_path / "life.yaml"
    stage = "{name: sft, stage: sft, model: org/small@refs/pr/1, data: ['builtin:tasks']}"
    recipe.write_text(f"stages:\n  - {stage}\n")
    result = cli("run", recipe, "--dry-run", "-o", tmp_path / "life")
    assert result.code == 0, result.err
