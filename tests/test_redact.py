"""No secret reaches a file or a stream: canaries in the environment and on the command line."""

import json
import os
import subprocess
import sys

import pytest

from llmctl.redact import redact, redacted
from tests.conftest import SMALL

NAMED = "canary-7c1f in two words"
HUB = "hf_" + "CanaryCanary1234567890abcd"
URL = "https://alice:c4nary-pass@example.org/x"
CANARIES = (NAMED, HUB, "c4nary-pass")


@pytest.fixture
def secret(monkeypatch):
    monkeypatch.setenv("SOME_SERVICE_API_KEY", NAMED)
    monkeypatch.setenv("LLMCTL_TEST_UNRELATED", "unrelated-value")


@pytest.fixture
def hidden(tmp_path, corpus, tokens):
    """Inputs whose very paths are secrets."""
    folder = tmp_path / NAMED / HUB
    folder.mkdir(parents=True)
    (folder / "corpus.jsonl").write_bytes(corpus.read_bytes())
    (folder / "tok").symlink_to(tokens)
    return folder


def clean(result, folder):
    """No canary in stdout, stderr or any file."""
    for text in (result.out, result.err):
        assert not any(canary in text for canary in CANARIES), text
    files = [p for p in folder.rglob("*") if p.is_file()]
    for path in files:
        content = path.read_bytes()
        assert not any(canary.encode() in content for canary in CANARIES), path
    return {path.name for path in files}


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "my_password", "X_PASSWD", "CLOUD_CREDENTIALS", "KEYS"],
)
def test_values_of_variables_that_are_named_like_secrets(monkeypatch, name):
    monkeypatch.setenv(name, "s3cr3t-value")
    assert redact("a s3cr3t-value b") == "a [redacted] b"


@pytest.mark.parametrize(
    ("name", "value"),
    [("HF_HOME", "s3cr3t-value"), ("KEYBOARD", "s3cr3t-value"), ("A_KEY", "short")],
)
def test_other_variables_and_short_values_stay(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert redact(f"a {value} b") == f"a {value} b"


def test_a_secret_within_a_longer_one_does_not_save_it(monkeypatch):
    monkeypatch.setenv("A_KEY", "12345678")
    monkeypatch.setenv("B_KEY", "123456789abc")
    assert redact("x 123456789abc y") == "x [redacted] y"


@pytest.mark.parametrize(
    "secret", ['with"quote and\\slash', "späße 中文 geheim", "two\nlines of it"]
)
def test_secrets_are_found_as_repr_and_json_spell_them(monkeypatch, secret):
    monkeypatch.setenv("A_KEY", secret)
    for text in (secret, repr(secret), json.dumps(secret)):
        assert redact(text).strip("'\"") == "[redacted]"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"token {HUB}!", "token [redacted]!"),
        ("hf_short and hf_transfer", "hf_short and hf_transfer"),
        (URL, "https://[redacted]@example.org/x"),
        ("/tmp/https:/al:c4nary@host/x", "/tmp/https:/[redacted]@host/x"),
        ("s3://key:p@ss@bucket/a b@c", "s3://[redacted]@bucket/a b@c"),
        ("https://example.org/a@b and x@y", "https://example.org/a@b and x@y"),
    ],
)
def test_tokens_and_urls(text, expected):
    assert redact(text) == expected
    assert redact(expected) == expected


def test_structures_keep_their_shape(secret):
    assert redacted({"a": [NAMED, 1, None], "b": {"c": (HUB, 2.5)}}) == {
        "a": ["[redacted]", 1, None],
        "b": {"c": ["[redacted]", 2.5]},
    }


def test_a_run_that_succeeds(cli, secret, hidden, tmp_path):
    out = tmp_path / "run"
    tokenize = ("tokenize", "--data", hidden / "corpus.jsonl", "--algorithm", "byte", "-v")
    result = cli(*tokenize, "-o", out)
    assert (result.code, result.out) == (0, f"{out}\n")
    assert {"recipe.yaml", "manifest.json", "status.json", "metrics.jsonl"} <= clean(result, out)
    assert "[redacted]" in (out / "recipe.yaml").read_text()
    assert "[redacted]" in json.loads((out / "manifest.json").read_text())["command"][3]

    out = tmp_path / "trained"
    train = ("pretrain", "--tokens", hidden / "tok", *SMALL, "--max-steps", 4, "--threads", 1)
    result = cli(*train, "-v", "-o", out)
    assert result.code == 0
    assert {"model.safetensors", "recipe.yaml"} <= clean(result, out)


def test_a_dry_run(cli, secret, hidden, tmp_path):
    train = ("pretrain", "--tokens", hidden / "tok", *SMALL, "--max-steps", 4, "--dry-run", "-v")
    result = cli(*train)
    assert result.code == 0
    assert "[redacted]" in result.out
    clean(result, tmp_path / "nothing")


@pytest.mark.parametrize("extra", [(), ("--json",), ("--debug",), ("-v", "--dry-run")])
def test_a_run_that_fails(cli, secret, tmp_path, extra):
    for tokens in (NAMED, HUB, URL):
        result = cli("pretrain", "--tokens", tmp_path / tokens, "-o", tmp_path / "run", *extra)
        assert result.code == 3
        assert "[redacted]" in result.err
        clean(result, tmp_path)
    result = cli("pretrain", "--tokens", "t", "--lr", NAMED, *extra)
    assert result.code == 2
    assert "[redacted]" in result.err
    clean(result, tmp_path)
    result = cli("pretrain", f"--{HUB}", *extra)
    assert result.code == 2
    clean(result, tmp_path)


def test_a_run_that_fails_but_can_be_resumed(secret, tmp_path):
    from llmctl.config.commands.pretrain import PretrainConfig
    from llmctl.errors import DataError
    from llmctl.runs.directory import open_run

    def train():
        with open_run("pretrain", PretrainConfig(tokens=HUB, out=tmp_path)) as run:
            (run.checkpoints / "checkpoint-1").mkdir(parents=True)
            raise DataError(f"{NAMED} is bad", file=URL)

    with pytest.raises(DataError):
        train()
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["error"] == "https://[redacted]@example.org/x: [redacted] is bad"


@pytest.mark.parametrize("extra", [(), ("-v", "--json", "--debug")])
def test_a_bug(corpus, tmp_path, extra):
    program = (
        "import sys; from llmctl.commands import tokenize; from llmctl.cli import main\n"
        "def boom(*_): raise ZeroDivisionError('while at ' + sys.argv[-1])\n"
        "tokenize._vocabulary = boom\n"
        "main()"
    )
    flags = ("tokenize", "--data", str(corpus), "-o", str(tmp_path / "run"), *extra)
    flags = (*flags, "--special-token", f"{NAMED} {HUB} {URL}")
    ran = subprocess.run(
        [sys.executable, "-c", program, *flags],
        env={**os.environ, "SOME_SERVICE_API_KEY": NAMED},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1
    assert "Traceback" in ran.stderr
    assert "ZeroDivisionError: while at [redacted] [redacted]" in ran.stderr
    for canary in CANARIES:
        assert canary not in ran.stdout + ran.stderr
        for path in (tmp_path / "run").rglob("*"):
            assert path.is_dir() or canary not in path.read_text(), path
    assert "ZeroDivisionError" in (tmp_path / "run" / "error.log").read_text()
