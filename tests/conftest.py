"""Small things made on the spot: a corpus, a tokenize run, a pretrained run; no network."""

import contextlib
import io
import logging
import os
import random
import signal
import sys
from collections.abc import Iterator, Mapping
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
WHO = ["cat", "dog", "friend", "teacher", "bird", "old man"]
OBJECTS = ["the river", "a red ball", "the house", "many stars", "a song", "the garden"]


def pytest_collection_modifyitems(items):
    """Begin with what takes minutes: at the end, one worker would wait for the other."""
    import torch

    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)

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


@pytest.fixture(autouse=True)
def _own_log_level() -> None:
    """Let each test hear what a command says: `--quiet` of one is not that of the next."""
    logging.getLogger("llmctl").setLevel(logging.INFO)


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


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium, where there is one."""
    from tests import chromium

    if not chromium.is_there():
        pytest.skip("needs chromium and chromedriver")
    with chromium.chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


def flags(settings: Mapping[str, object]) -> Iterator[object]:
    """Settings by the names that recipes give them, as words of a command."""
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            yield flag
        elif value is False:
            yield f"--no-{flag[2:]}"
        else:
            for one in value if isinstance(value, list) else [value]:
                yield from (flag, one)


def out_of_memory(*_: object) -> None:
    """Fail as a GPU does that is full."""
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def pipe(monkeypatch, *lines: str) -> None:
    """Let these lines come from a pipe."""
    piped = io.BytesIO("".join(f"{line}\n" for line in lines).encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(piped))


def sentences(count: int, seed: int = 0) -> list[str]:
    """Simple English with something to learn in it."""
    draw = random.Random(seed)
    parts = (SUBJECTS, VERBS, OBJECTS)
    return [" ".join(draw.choice(part) for part in parts) + "." for _ in range(count)]


def question_row(number: int, yes: int | None = None) -> dict[str, str]:
    """A question of varied length whose answer stands in it."""
    said = f"The {WHO[number % 6]} sees {OBJECTS[number // 6 % 6]}."
    more = " Yes." * (number % 4 if yes is None else yes)
    return {"prompt": f"What does the {WHO[number % 6]} see? {said}{more}", "response": said}


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


@pytest.fixture(scope="module")
def tokenizer(tokens):
    """The tokenizer of that run; a module may give it another template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokens / "tokenizer")


SMALL = ("--layers", 2, "--hidden", 32, "--heads", 2, "--context", 32, "--batch-size", 8)
"""A model that trains in a second."""


def pretrained(cli, tokens: Path, out: Path, shape: tuple[object, ...], steps: int) -> Path:
    """Pretrain a model of a shape on the tokens; its run."""
    flags = (*shape, "--max-steps", steps, "--eval-every", steps // 10, "--threads", 1)
    result = cli("pretrain", "--tokens", tokens, *flags, "-o", out)
    assert result.code == 0, result.err
    return out


@pytest.fixture(scope="session")
def base(cli, tokens, tmp_path_factory) -> Path:
    """A pretrained run on the tokens."""
    return pretrained(cli, tokens, tmp_path_factory.mktemp("runs") / "base", SMALL, 60)


@pytest.fixture(scope="session")
def roomy(cli, tokens, tmp_path_factory) -> Path:
    """A pretrained run with room for a conversation; its embeddings are tied."""
    shape = ("--layers", 2, "--hidden", 32, "--heads", 2, "--context", 128, "--batch-size", 4)
    return pretrained(cli, tokens, tmp_path_factory.mktemp("runs") / "roomy", shape, 40)
