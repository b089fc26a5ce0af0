import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

COMMIT = "a" * 40
ROWS = "".join(json.dumps({"text": f"Row {n} of a data set.\n"}) + "\n" for n in range(50)).encode()
FILE = {"type": "file", "oid": "b" * 40, "size": len(ROWS), "path": "data.jsonl"}


class FakeHub(BaseHTTPRequestHandler):
    """As much of the Hub as one public data set of one file needs."""

    def do_GET(self):
        path, known = self.path.split("?")[0], "/api/datasets/owner/name"
        if path in (known, f"{known}/revision/main", f"{known}/revision/{COMMIT}"):
            info = {"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": "data.jsonl"}]}
            self.answer(200, json.dumps(info | {"tags": [], "gated": False, "private": False}))
        elif path.startswith(f"{known}/tree/"):
            self.answer(200, json.dumps([FILE]))
        elif path.endswith("/data.jsonl"):
            self.answer(200, ROWS.decode(), {"ETag": '"x"', "X-Repo-Commit": COMMIT})
        else:
            code = "EntryNotFound" if "owner/name" in path else "RepoNotFound"
            self.answer(404, "{}", {"X-Error-Code": code, "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def answer(self, code, body, headers=()):
        self.send_response(code)
        for name, value in {"Content-Length": len(body.encode()), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def tokenize(endpoint, tmp_path, name):
    command = ["tokenize", "--data", name, "--algorithm", "byte", "-o", tmp_path / "run"]
    online = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    return subprocess.run(
        [sys.executable, "-m", "llmctl", *command],
        env={**os.environ, **online},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_a_data_set_on_the_hub_is_streamed_and_pinned_to_its_commit(endpoint, tmp_path):
    ran = tokenize(endpoint, tmp_path, "owner/name")
    assert ran.returncode == 0, ran.stderr
    assert "of 50 documents" in ran.stderr
    assert "\r" not in ran.stderr
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["inputs"] == [
        {"role": "data", "path": "owner/name", "sha256": None, "revision": COMMIT}
    ]


@pytest.mark.slow
def test_a_data_set_that_the_hub_does_not_know_is_refused(endpoint, tmp_path):
    ran = tokenize(endpoint, tmp_path, "owner/none")
    assert ran.returncode == 3
    assert "the Hub knows no such data set" in ran.stderr
    assert not (tmp_path / "run").exists()
