"""Floors of the house: a folder imports only what lies below it, and knows what it may load."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "llmctl"
BOTTOM = {
    *("console", "errors", "files", "hardware", "launch", "metrics", "numbers", "redact"),
    "optional_imports",
    *("signals", "text_forms"),
}
"""Loose files that every folder may import; they import no folder."""
TOP = {"__main__", "cli", "options"}
"""Loose files that no folder may import."""
FOLDERS = (  # from the bottom up: a folder imports those before it
    "config",
    "runs",
    "models",
    "data",
    "decode",
    "gguf_file",
    "reporting",
    "reward",
    "checkup",
    "feedback",
    "training",
    "ppo",
    "evaluate",
    "quantize",
    "planning",
    "commands",
    "pipeline",
)
HEAVY = {"torch", "transformers", "accelerate", "trl", "peft", "datasets", "bitsandbytes"}
LIGHT = {"cli", "options", "config", "reporting", "runs", *BOTTOM} - {"hardware"}
"""What loads without any of them, but for the modules that HEAVY_ALL_THE_SAME names."""
HEAVY_ALL_THE_SAME = {"runs.checkpoint", "runs.resume"}
HEAVY_IN_FUNCTIONS = {"launch", "runs.trackers"}
"""Light until processes are launched or a tracker is opened."""
OWNERS = {
    "typer": {"cli", "options"},
    "torchao": {"quantize"},
    "bitsandbytes": {"models", "training", "checkup"},
    "yaml": {"config"},
    "filelock": {"runs"},
    "accelerate": {"training", "ppo", "planning", "commands", "runs"},
}
MODULES = {
    ".".join(path.relative_to(SRC).with_suffix("").parts): path
    for path in sorted(SRC.rglob("*.py"))
}


def unit(module):
    """The folder that a module lies in, or the loose file that it is."""
    return module.split(".")[0]


@cache
def tree(module):
    return ast.parse(MODULES[module].read_text())


def names(nodes):
    """Modules that import statements name, ours without `llmctl.`, each with the name it gives."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name.removeprefix("llmctl."), "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "" if node.module == "llmctl" else f"{node.module.removeprefix('llmctl.')}."
            ours = node.module.split(".")[0] == "llmctl"
            for alias in node.names:
                module = base + alias.name
                whole = module in MODULES or f"{module}.__init__" in MODULES
                yield (module if ours and whole else base.rstrip(".")), alias.name


def imports(module):
    """What a module imports, anywhere in it."""
    return [name for name, _ in names(ast.walk(tree(module))) if name]


def at_once(module):
    """Modules that are imported with this one: not in functions, not for type checkers."""
    todo = list(tree(module).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (name for name, _ in names([node]) if name)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
            todo += [*node.body, *node.orelse]


def file_of(name):
    return next((m for m in (name, f"{name}.__init__") if m in MODULES), None)


def loaded_with(module):
    """Modules of ours that importing this one imports, itself and their folders included."""
    seen, todo = set(), [module]
    while todo:
        here = todo.pop()
        if here not in seen:
            seen.add(here)
            folders = ["__init__" if "." not in here else f"{here.rpartition('.')[0]}.__init__"]
            found = [file_of(name) for name in at_once(here)]
            todo += [name for name in (*folders, *found) if name in MODULES]
    return seen


def test_every_place_is_known():
    there = {unit(module) for module in MODULES} - {"__init__"}
    assert there == BOTTOM | TOP | set(FOLDERS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    here = unit(module)
    for name in imports(module):
        there = unit(name)
        if there not in BOTTOM | TOP | set(FOLDERS) or there == here or here in TOP:
            continue
        assert there not in TOP, f"{module} may not import {name}, the top of the house"
        if here in BOTTOM:
            assert there in BOTTOM, f"{module} lies below {name}"
        elif there in FOLDERS:
            is_below = FOLDERS.index(there) < FOLDERS.index(here)
            assert is_below, f"{module} may not import {name}: {there} does not lie below {here}"


@pytest.mark.parametrize("module", MODULES)
def test_libraries_have_owners(module):
    for name in imports(module):
        package = name.split(".")[0]
        owners = OWNERS.get(package, {unit(module)})
        assert unit(module) in owners, f"{module}: {package} belongs to {owners}"


@pytest.mark.parametrize("module", [m for m in MODULES if unit(m) in LIGHT])
def test_light_modules_load_nothing_heavy(module):
    if module in HEAVY_ALL_THE_SAME:
        return
    if module not in HEAVY_IN_FUNCTIONS:
        assert not HEAVY & {name.split(".")[0] for name in imports(module)}
    for other in loaded_with(module):
        heavy = HEAVY & {name.split(".")[0] for name in at_once(other)}
        assert not heavy, f"{module} loads {other}, which imports {heavy}"


@pytest.mark.parametrize("module", MODULES)
def test_budgets(module):
    assert len(MODULES[module].read_text().splitlines()) <= 600
    for node in ast.walk(tree(module)):
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
    loaded = loaded_by("import llmctl.runs.directory, llmctl.options, llmctl.config.commands")
    assert not HEAVY & loaded
