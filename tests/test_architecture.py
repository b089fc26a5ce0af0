"""The floors of the house: imports only ever point down."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "llmctl"
FLOORS = [  # a module imports from floors below its own, and from its own package or floor
    {
        "errors",
        "extras",
        "console",
        "files",
        "provenance",
        "redact",
        "stopping",
        "energy",
        "wording",
    },
    {"config"},
    {
        "rundir",
        "claim",
        "dryrun",
        "options",
        "lock",
        "survey",
        "trackers",
        "lineage",
        "cards",
        "reporting",
    },
    {
        "hardware",
        "headed",
        "launch",
        "likelihood",
        "low_rank",
        "models",
        "embeddings",
        "adapters",
        "attention",
        "quantized",
        "merging",
        "checkpoint",
        "checkup",
        "data",
        "decode",
        "exchanges",
        "gguf_file",
        "resume",
        "scoring",
        "shapes",
        "vetting",
    },
    {"training", "feedback", "ppo", "evaluate", "quantize", "planning"},
    {"stages"},
    {"pipeline"},
    {"cli"},
]
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}
HEAVY = {"torch", "transformers", "accelerate", "trl", "peft", "datasets", "bitsandbytes"}
OWNERS = {
    "typer": {"cli", "options"},
    "torchao": {"quantize"},
    "bitsandbytes": {"quantized", "training", "checkup"},
    "yaml": {"config"},
    "filelock": {"lock"},
    "accelerate": {"training", "ppo", "planning", "stages"},
}
MODULES = sorted(p for p in SRC.rglob("*.py") if p.stem not in ("__init__", "__main__"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"llmctl.{a.name}" for a in node.names] if node.module == "llmctl" else []
            yield from names or [node.module]


def unit(path):
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def test_modules_are_found():
    assert len(MODULES) > 15


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_point_down(path):
    here = unit(path)
    for name in imports(path):
        package, *rest = name.split(".")
        if package == "llmctl" and rest and rest[0] in FLOOR:
            same = FLOOR[rest[0]] == FLOOR[here] and here not in ("stages",)
            assert FLOOR[rest[0]] < FLOOR[here] or same, f"{path.name} may not import {name}"
        assert here in OWNERS.get(package, {here}), f"{package} belongs to {OWNERS[package]}"
        light = FLOOR[here] < FLOOR["models"] or here == "cli"
        assert not (package in HEAVY and light), f"{path.name} must stay light, imports {package}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_budgets(path):
    text = path.read_text()
    assert len(text.splitlines()) <= (120 if unit(path) == "stages" else 300)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} does not fit a screen"


def loaded_by(code):
    program = f"import sys; {code}; print(*sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(ran.stdout.split())


def test_help_imports_nothing_heavy():
    loaded = loaded_by("from llmctl.cli import build_app; build_app(None)")
    assert not (HEAVY | {"pydantic", "tokenizers", "numpy"}) & loaded


def test_reading_a_config_imports_nothing_heavy():
    loaded = loaded_by("import llmctl.rundir, llmctl.options, llmctl.config.stages")
    assert not HEAVY & loaded
