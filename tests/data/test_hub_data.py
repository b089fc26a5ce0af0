import json

import pytest

from tests.hub_server import HubHandler, online, serving
from tests.processes import run_llmctl

COMMIT = "a" * 40
ROWS = "".join(json.dumps({"text": f"Row {n} of a data set.\n"}) + "\n" for n in range(50)).encode()
FILE = {"type": "file", "oid": "b" * 40, "size": len(ROWS), "path": "data.jsonl"}


class FakeHub(HubHandler):
    """As much of the Hub as one public data set of one file needs."""

    def do_GET(self):
        path, known = self.path.split("?")[0], "/api/datasets/owner/name"
        if path in (known, f"{known}/revision/main", f"{known}/revision/{COMMIT}"):
            info = {"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": "data.jsonl"}]}
            info |= {"tags": [], "gated": False, "private": False}
            self.answer(json.dumps(info).encode())
        elif path.startswith(f"{known}/tree/"):
            self.answer(json.dumps([FILE]).encode())
        elif path.endswith("/data.jsonl"):
            self.answer(ROWS, 200, {"ETag": '"x"', "X-Repo-Commit": COMMIT})
        else:
            code = "EntryNotFound" if "owner/name" in path else "RepoNotFound"
            self.answer(b"{}", 404, {"X-Error-Code": code, "X-Repo-Commit": COMMIT})


@pytest.fixture
def endpoint():
    with serving(FakeHub) as address:
        yield address


def tokenize(endpoint, tmp_path, name):
    command = ("tokenize", "--data", name, "--algorithm", "byte", "-o", tmp_path / "run")
    return run_llmctl(*command, seconds=120, **online(endpoint, tmp_path / "home"))


@pytest.mark.slow
def test_a_data_set_on_the_hub_is_streamed_and_pinned_to_its_commit(endpoint, tmp_path):
    ran = tokenize(endpoint, tmp_path, "owner/name")
    assert ran.returncode == 0, ran.stderr
    assert "of 50 documents" in ran.stderr
    assert "\r" not in ran.stderr
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["inputs"] == [
        {"role": "data", "path": "owner/name", "kind": "hub", "sha256": None, "revision": COMMIT}
    ]


@pytest.mark.slow
def test_a_data_set_that_the_hub_does_not_know_is_refused(endpoint, tmp_path):
    ran = tokenize(endpoint, tmp_path, "owner/none")
    assert ran.returncode == 3
    assert "the Hub knows no such data set" in ran.stderr
    assert not (tmp_path / "run").exists()
