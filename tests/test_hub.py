"""The Hub, played by a server on this machine: a model by its id, and every way it can fail."""

import hashlib
import json

import pytest

from tests.hub_server import TOKEN, HubHandler, online, serving
from tests.processes import run_llmctl

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def hub(base):
    """Serves `base` as the model org/small; org/gated wants a login."""
    files = {p.name: p.read_bytes() for p in (base / "model").iterdir()}
    files["evil.bin"] = b"pickle"
    asked = []

    class Hub(HubHandler):
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

        def reply(self, body, status=200, **headers):
            self.answer(body, status, {"X-Repo-Commit": SHA, **headers})

    with serving(Hub) as address:
        yield address, asked


def generate(model, endpoint, home, **environment):
    variables = {**online(endpoint, home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    ran = run_llmctl(
        *("generate", "--model", model, "--prompt", "The", "--max-new-tokens", 3, "--greedy"),
        seconds=60,
        **{**variables, **environment},
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
