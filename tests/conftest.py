"""Small things made on the spot: a corpus, a tokenize run, a pretrained run; no network."""

import contextlib
import io
import os
import random
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
worker = os.environ.get("PYTEST_XDIST_WORKER", "")
if worker and hasattr(os, "sched_setaffinity"):
    # a core for each: threads of commands that all take all cores wait for one another
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
# a shell's background job ignores Ctrl-C, and so would every process that the tests start
signal.signal(signal.SIGINT, signal.default_int_handler)

SUBJECTS = ["The cat", "A dog", "My friend", "The old man", "Our teacher", "A small bird"]
VERBS = ["sees", "likes", "finds", "follows", "remembers", "paints"]
OBJECTS = ["the river", "a red ball", "the house", "many stars", "a song", "the garden"]


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def cli():
    """Run llmctl in this process: `cli("generate", "--model", path)` -> code, stdout, stderr."""
    import torch

    from llmctl.cli import main
    from tests.known_metrics import known_metrics

    torch.set_num_threads(1)

    def run(*arguments: object) -> Result:
        out, err, before = io.StringIO(), io.StringIO(), sys.argv
        sys.argv = ["llmctl", *map(str, arguments)]
        try:
            with (
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
                known_metrics(),
            ):
                main()
        except SystemExit as exit_:
            code = exit_.code or 0
        finally:
            sys.argv = before
            torch.set_num_threads(1)
        return Result(int(code), out.getvalue(), err.getvalue())

    return run


def sentences(count: int, seed: int = 0) -> list[str]:
    """Simple English with something to learn in it."""
    draw = random.Random(seed)
    parts = (SUBJECTS, VERBS, OBJECTS)
    return [" ".join(draw.choice(part) for part in parts) + "." for _ in range(count)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A jsonl of 400 small documents, each of six sentences."""
    from tests.run_files import write_rows

    lines = sentences(2400)
    rows = [{"text": " ".join(lines[i : i + 6])} for i in range(0, 2400, 6)]
    return write_rows(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", rows)


@pytest.fixture(scope="session")
def tokens(cli, corpus, tmp_path_factory) -> Path:
    """A tokenize run on the corpus."""
    out = tmp_path_factory.mktemp("runs") / "tok"
    result = cli("tokenize", "--data", corpus, "--vocab-size", 320, "-o", out)
    assert result.code == 0, result.err
    return out


SMALL = ("--layers", 2, "--hidden", 32, "--heads", 2, "--context", 32, "--batch-size", 8)
"""A model that trains in a second."""


@pytest.fixture(scope="session")
def base(cli, tokens, tmp_path_factory) -> Path:
    """A pretrained run on the tokens."""
    out = tmp_path_factory.mktemp("runs") / "base"
    result = cli(
        "pretrain", "--tokens", tokens, *SMALL, "--max-steps", 60, "--threads", 1, "-o", out
    )
    assert result.code == 0, result.err
    return out


@pytest.fixture(scope="session")
def roomy(cli, tokens, tmp_path_factory) -> Path:
    """A pretrained run with room for a conversation; its embeddings are tied."""
    out = tmp_path_factory.mktemp("runs") / "roomy"
    shape = ("--layers", 2, "--hidden", 32, "--heads", 2, "--context", 128, "--batch-size", 4)
    result = cli(
        "pretrain", "--tokens", tokens, *shape, "--max-steps", 40, "--threads", 1, "-o", out
    )
    assert result.code == 0, result.err
    return out
