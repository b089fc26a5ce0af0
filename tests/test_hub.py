"""The Hub, played by a server on this machine: a model by its id, and every way it can fail."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

SHA = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_canarycanarycanarycanarycanary"


@pytest.fixture(scope="module")
def hub(base):
    """Serves `base` as the model org/small; org/gated wants a login."""
    files = {p.name: p.read_bytes() for p in (base / "model").iterdir()}
    files["evil.bin"] = b"pickle"
    asked = []

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            asked.append(self.path)
            name = self.path.rsplit("/", 1)[-1]
            if self.path.startswith(f"/api/models/org/small/tree/{SHA}"):
                tree = [
                    {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                    for n, b in files.items()
                ]
                self.reply(json.dumps(tree).encode())
            elif self.path.startswith("/api/models/org/small"):
                siblings = [{"rfilename": name} for name in files]
                self.reply(
                    json.dumps({"id": "org/small", "sha": SHA, "siblings": siblings}).encode()
                )
            elif self.path.startswith(f"/org/small/resolve/{SHA}/") and name in files:
                self.reply(files[name], ETag=f'"{hashlib.sha256(files[name]).hexdigest()}"')
            elif "gated" in self.path:
                self.reply(b"{}", 403, **{"X-Error-Code": "GatedRepo"})
            else:
                self.reply(b"{}", 404, **{"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def reply(self, body, status=200, **headers):
            self.send_response(status)
            for key, value in {
                "X-Repo-Commit": SHA,
                "Content-Length": len(body),
                **headers,
            }.items():
                self.send_header(key, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def generate(model, endpoint, home, **environment):
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "llmctl",
            "generate",
            "--model",
            model,
            "--prompt",
            "The",
            "--max-new-tokens",
            "3",
            "--greedy",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        env={
            **os.environ,
            "HF_ENDPOINT": endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_DISABLE_XET": "1",
            **environment,
        },
    )
    assert TOKEN not in ran.stdout + ran.stderr
    return ran


@pytest.mark.slow
def test_a_model_by_its_id_is_fetched_once_and_without_pickles(hub, base, cli, tmp_path):
    endpoint, asked = hub
    ran = generate("org/small", endpoint, tmp_path)
    assert ran.returncode == 0, ran.stderr
    local = cli("generate", "--model", base, "--prompt", "The", "--max-new-tokens", 3, "--greedy")
    assert ran.stdout == local.out
    assert any(path.endswith("model.safetensors") for path in asked)
    assert not any("evil.bin" in path for path in asked)
    again = generate("org/small", endpoint, tmp_path, HF_HUB_OFFLINE="1")
    assert (again.returncode, again.stdout) == (0, ran.stdout), "cached: works offline"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "environment", "message"),
    [
        ("org/absent", {}, "the Hub knows no such model"),
        ("org/gated", {}, "wants a login"),
        ("org/uncached", {"HF_HUB_OFFLINE": "1"}, "the Hub is switched off (HF_HUB_OFFLINE)"),
        ("org/small", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the Hub cannot be reached"),
    ],
)
def test_what_the_hub_cannot_give_is_a_network_error(hub, tmp_path, model, environment, message):
    ran = generate(model, hub[0], tmp_path, **environment)
    assert ran.returncode == 6, ran.stderr
    assert message in ran.stderr
    assert len(ran.stderr.strip().splitlines()) <= 3
