"""Models, checkpoints, templates and recipes that were made to do harm: nothing of theirs runs."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmctl.config.commands.pretrain import PretrainConfig
from llmctl.errors import UserError
from tests.run_files import cut_off, edit_json
from tests.torture import harness

PICKLES = ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "rng_state.pth")
QUICK = 15
"""Seconds for a whole command on a busy machine; the guard of templates has its own test."""
ASK = ("--prompt", "hi", "--max-new-tokens", 1)


@pytest.fixture
def model(base, tmp_path) -> Path:
    """A model folder to tamper with."""
    return Path(shutil.copytree(base / "model", tmp_path / "model"))


@pytest.fixture
def canary(tmp_path) -> Path:
    """What only an attack creates."""
    return tmp_path / "canary"


# Pickles


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.mkdir, (self.canary,)


def plant_pickles(folder: Path, canary: Path) -> None:
    """Half of them as torch saves, half as plain pickles."""
    for i, name in enumerate(PICKLES):
        save = torch.save if i % 2 else lambda evil, file: file.write_bytes(pickle.dumps(evil))
        save(Evil(canary), folder / name)


def test_the_pickles_do_harm_where_they_are_loaded(tmp_path, canary) -> None:
    plant_pickles(tmp_path, canary)
    for i, name in enumerate(PICKLES):
        with (tmp_path / name).open("rb") as file:
            torch.load(file, weights_only=False) if i % 2 else pickle.load(file)
        canary.rmdir()


def test_pickles_beside_safetensors_are_ignored(cli, model, canary) -> None:
    plant_pickles(model, canary)
    assert cli("generate", "--model", model, *ASK).code == 0
    assert not canary.exists()


@pytest.mark.parametrize("decoy", [False, True])
def test_pickled_weights_are_refused(cli, tokens, model, canary, decoy) -> None:
    plant_pickles(model, canary)
    (model / "model.safetensors").unlink()
    message = "only pickled weights here (pytorch_model.bin)"
    if decoy:  # safetensors are there, and an index leads to a pickle all the same
        (model / "other.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
        index = {"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model.bin"}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        message = "model.safetensors.index.json points at 'pytorch_model.bin'"
    new = model.with_name("new")
    for command in (
        ("generate", "--model", model, *ASK),
        ("pretrain", "--model", model, "--tokens", tokens, "--max-steps", 1, "-o", new),
    ):
        result = cli(*command)
        assert (result.code, message in result.err) == (4, True), result.err
        assert "weights_only" not in result.err
    assert not canary.exists()


def test_a_pickled_adapter_is_refused(cli, model, tmp_path, canary) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    about = {"peft_type": "LORA", "base_model_name_or_path": str(model)}
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    shutil.copy(model / "tokenizer.json", adapter)
    (adapter / "decoy.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Evil(canary)))
    result = cli("generate", "--model", adapter, *ASK)
    assert (result.code, "only pickled weights" in result.err) == (4, True), result.err
    (adapter / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    (adapter / "adapter_config.json").write_text(
        json.dumps({**about, "base_model_name_or_path": str(adapter)})
    )
    assert "is an adapter itself" in cli("generate", "--model", adapter, *ASK).err
    assert not canary.exists()


def test_pickles_in_a_checkpoint_are_never_read(cli, tokens, base, tmp_path, canary) -> None:
    def resume(*flags: object) -> tuple[int, str]:
        shape = ("--layers", 2, "--hidden", 32, "--heads", 2, "--context", 32, "--batch-size", 8)
        what = ("--tokens", tokens, *shape, "--max-steps", 60, "--threads", 1)
        result = cli("pretrain", *what, *flags)
        return result.code, result.err

    mixed, swapped = cut_off(base, tmp_path / "mixed"), cut_off(base, tmp_path / "swapped")
    plant_pickles(mixed / "checkpoints" / "checkpoint-60", canary)
    code, message = resume("-o", mixed, "--resume")
    assert (code, "resuming from" in message) == (0, True), message
    foreign = tmp_path / "checkpoint-500"
    foreign.mkdir()
    plant_pickles(foreign, canary)
    (foreign / "trainer_state.json").write_text('{"global_step": 500}')
    code, message = resume("-o", tmp_path / "new", "--resume-from", foreign)
    assert (code, "checkpoint-500" in message) == (4, True), message
    shutil.rmtree(swapped / "checkpoints")
    shutil.copytree(foreign, swapped / "checkpoints" / "checkpoint-500")
    code, message = resume("-o", swapped, "--resume")
    assert (code, "no valid checkpoint" in message) == (4, True), message
    assert not canary.exists()


# Code that comes with a model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "flags"), [("model", ()), ("tokenizer", ()), ("both", ()), ("both", ("-O",))]
)
def test_code_of_a_model_never_runs_whatever_stdin_says(model, canary, where, flags) -> None:
    (model / "evil.py").write_text(
        f"open({str(canary)!r}, 'w')\nclass Config: ...\nclass Model: ...\nclass Tokens: ...\n"
    )
    if where in ("model", "both"):
        classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        edit_json(model / "config.json", auto_map=classes, model_type="evil")
    if where in ("tokenizer", "both"):
        classes = {"AutoTokenizer": ["evil.Tokens", "evil.Tokens"]}
        config = model / "tokenizer_config.json"
        edit_json(config, auto_map=classes, tokenizer_class="EvilTokens")
        (model / "tokenizer.json").unlink()
    answers = model / "yes"
    answers.write_text("y\n" * 100_000)
    with answers.open() as stdin:
        ran = subprocess.run(
            [sys.executable, *flags, "-m", "llmctl", "generate", "--model", model, "--prompt", "a"],
            stdin=stdin,
            capture_output=True,
            text=True,
        )
        assert os.lseek(stdin.fileno(), 0, os.SEEK_CUR) == 0, "it asked stdin"
    assert (ran.returncode, ran.stdout) == (4, ""), ran.stderr
    assert len(ran.stderr.splitlines()) <= 3
    assert not canary.exists()


# Chat templates

ESCAPES = (
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ self._TemplateReference__context }}",
    "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ ('{0.__class__.__init__.__globals__}' | format_map({'0': messages})) }}",
    "{{ messages | attr('__class__') | attr('__base__') | attr('__subclasses__')() }}",
    "{{ raise_exception.__globals__['json'].codecs.open('CANARY', 'w') }}",
    "{% set f = ''.format %}{{ f.__self__.__class__ }}{{ [f] | map('attr', '__self__') | list }}",
    "{{ namespace.__init__.__globals__ }}{{ namespace(__class__=1) }}",
    "{% include 'CANARY' %}{% import 'os' as os %}{{ os.system('touch CANARY') }}",
    "{{ joiner.__init__.__builtins__['open']('CANARY', 'w') }}",
)
BOMBS = {
    "takes too long": "{% for a in range(99999) %}" * 2 + "{% endfor %}" * 2,
    "takes too much memory": "{{ 'x' * 10**9 }}",
    "refuses these messages": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "is larger than": "{# x #}" * 150_000,
}


@pytest.mark.parametrize("template", ESCAPES)
def test_templates_that_reach_for_python_get_nothing(
    cli, model, tmp_path, canary, monkeypatch, template
) -> None:
    monkeypatch.chdir(tmp_path)
    (model / "chat_template.jinja").write_text("x" + template.replace("CANARY", str(canary)))
    before = sorted(tmp_path.rglob("*"))
    begun = time.monotonic()
    result = cli("generate", "--model", model, "--chat", *ASK, "--json")
    assert time.monotonic() - begun < 60
    if result.code:  # the others are text, of which nothing comes from Python
        said = ("refuses these messages" in result.err, "does not write what is" in result.err)
        assert (result.code, any(said)) == (4, True), result.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize(("message", "template"), BOMBS.items(), ids=BOMBS)
def test_templates_that_starve_the_machine_are_refused(model, tmp_path, message, template) -> None:
    (model / "chat_template.jinja").write_text(template)
    trial, seconds = bounded(tmp_path, "generate", "--model", model, "--chat", *ASK)
    assert (trial.code, f"the chat template {message}" in trial.err) == (4, True), trial.err
    assert seconds < QUICK


# Weights and configurations


def index_to(model: Path, shard: str) -> None:
    """Make the weights a shard of this name."""
    weights = model / "model.safetensors"
    shutil.move(weights, model / "model-00001-of-00002.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": shard}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def config(**changes: object) -> Callable[[Path], None]:
    return lambda model: edit_json(model / "config.json", **changes)


def header(claimed: int, text: bytes = b"{}") -> Callable[[Path], None]:
    data = struct.pack("<Q", claimed) + text
    return lambda model: (model / "model.safetensors").write_bytes(data) and None


def other_index(model: Path) -> None:
    shutil.copy(model / "model.safetensors", model.with_name("x"))
    edit_json(model / "config.json", transformers_weights="../x.safetensors.index.json")


HUGE = b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
HARM: dict[str, tuple[Callable[[Path], object], str]] = {
    "index up": (lambda m: index_to(m, "../x"), "points at '../x'"),
    "index absolute": (lambda m: index_to(m, "/x.safetensors"), "points at '/x.safetensors'"),
    "index to nothing": (lambda m: index_to(m, "b.safetensors"), "a shard is missing: b."),
    "index elsewhere": (other_index, "points out of its folder"),
    "header of 2**60": (header(2**60), "header too large"),
    "tensor of 4 TB": (header(len(HUGE), HUGE), "deserializing header"),
    "hidden 10**9": (config(hidden_size=10**9), "config.json describes"),
    "hidden 20k": (config(hidden_size=20_000, vocab_size=20_000), "config.json describes"),
    "vocab 10**9": (config(vocab_size=10**9), "config.json describes"),
    "layers 10**9": (config(num_hidden_layers=10**9), "num_hidden_layers of 1,000,000,000"),
    "labels 10**9": (config(num_labels=10**9), "num_labels of 1,000,000,000"),
    "100 MB of config": (config(x="y" * 10**8), "the limit is 10,000,000"),
    "deep config": (lambda m: (m / "config.json").write_text("[" * 10**6), "recursion"),
    "tokenizer config": (
        lambda m: edit_json(m / "tokenizer_config.json", x="y" * 10**8),
        "the limit is 10,000,000",
    ),
    "a long template": (
        lambda m: (m / "chat_template.jinja").write_text("x" * 10**8),
        "the limit is 10,000,000",
    ),
    "a pipe": (
        lambda m: (m / "config.json").unlink() or os.mkfifo(m / "config.json"),
        "not a regular file",
    ),
}


def bound_memory() -> None:
    """Let this process take no more than 500 MB besides what it has."""
    import resource

    import psutil

    most = psutil.Process().memory_info().vms + 500_000_000
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def bounded(folder: Path, *command: object) -> tuple[harness.Trial, float]:
    """Run a command with little memory; its trial, and the seconds it took."""
    begun = time.monotonic()
    trial = harness.start(command, folder / "logs", plant=bound_memory)
    trial.wait(60)
    return trial, time.monotonic() - begun


@pytest.mark.slow
@pytest.mark.parametrize("harm", HARM)
def test_absurd_files_are_refused_quickly_and_in_little_memory(model, tmp_path, harm) -> None:
    spoil, message = HARM[harm]
    spoil(model)
    trial, seconds = bounded(tmp_path, "generate", "--model", model, *ASK)
    assert (trial.code, message in trial.err) == (4, True), trial.err
    assert seconds < QUICK


# Recipes


@pytest.mark.parametrize(
    "text",
    [
        "a: &a {x: 1}\nb: {<<: *a}\n",
        "tokens: " + "[" * 30_000,
        "".join(" " * i + "a:\n" for i in range(200)),
        "data: [" + "1," * 12_000 + "1]",
        "".join(f"a{i}: 1\n" for i in range(3_500)),
        "data: [" + "&a 1," * 6_000 + "1]",
        "seed: 1" + ":1" * 12_000,
        "seed: 0x" + "f" * 9_000,
        "seed: " + "9" * 5_000,
        "seed: !!int x",
        "lr: !!float x",
        "compile: !!bool x",
        "tokens: 2001-99-99",
        "? [a]\n: b",
        "x: " + "a" * 2_000_000,
        "tokens: !!python/object/apply:os.system [touch canary]",
        "tokens: a\n\t\tlr: 1",
        "tokens: a\ntokens: a",
    ],
    ids=[
        "merge",
        "brackets",
        "indents",
        "list",
        "keys",
        "anchors",
        "sexagesimal",
        "hexadecimal",
        "digits",
        "int",
        "float",
        "bool",
        "date",
        "key",
        "2 MB",
        "python",
        "tabs",
        "twice",
    ],
)
def test_recipes_are_refused_in_a_second(tmp_path, monkeypatch, text) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(text)
    begun = time.process_time()
    with pytest.raises(UserError) as refused:
        PretrainConfig.load("pretrain", Path("recipe.yaml"), {})
    assert time.process_time() - begun < 1
    assert refused.value.code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
