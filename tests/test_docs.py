"""Docs and recipes are true: the reference is current, every recipe loads."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llmctl.cli import COMMANDS
from llmctl.config import stages
from llmctl.config.reading import read_recipe
from llmctl.pipeline.recipe import load
from llmctl.pipeline.references import resolve

ROOT = Path(__file__).parents[1]
RECIPES = sorted(p for p in (ROOT / "recipes").rglob("*.yaml") if p.parent.name != "accelerate")


def test_the_reference_is_current():
    script = ROOT / "docs" / "generate.py"
    ran = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_there_are_recipes():
    assert len(RECIPES) >= 3


LIVES = [path for path in RECIPES if "stages" in read_recipe(path)[0]]


@pytest.mark.parametrize("path", LIVES, ids=lambda p: p.name)
def test_every_life_cycle_loads(path):
    steps = load(path).steps
    assert len(resolve(load(path), Path("runs"))) == len(steps) > 3


@pytest.mark.parametrize("path", sorted({*RECIPES} - {*LIVES}), ids=lambda p: p.name)
def test_every_recipe_loads(path):
    values, _ = read_recipe(path)
    config, _ = COMMANDS[values["stage"]]
    loaded = getattr(stages, config).load(values["stage"], path, {})
    assert loaded.given() >= set(values) - {"stage"}, "a recipe holds only what differs"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/accelerate").glob("*.yaml")), ids=str)
def test_every_accelerate_configuration_is_valid(path):
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(path))
    assert loaded.distributed_type.name in {"MULTI_GPU", "FSDP"}


def tour():
    """The shell lines of the README's tour."""
    text = (ROOT / "README.md").read_text()
    block = text.split("<!-- tour -->\n```sh\n")[1].split("```")[0]
    lines = [line for line in block.splitlines() if line and not line.startswith("#")]
    assert len(lines) >= 5
    return lines


@pytest.mark.slow
@pytest.mark.timeout(900)  # nine commands, each a process of its own
def test_the_readme_tour_runs(tmp_path):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for line in tour():
        ran = subprocess.run(
            line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert ran.returncode == 0, f"{line}\n{ran.stderr}"
        assert ran.stdout, line


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_every_command_shown_is_one_and_its_flags_exist(path):
    for line in re.findall(r"^\s*llmctl (.+)$", path.read_text(), re.MULTILINE):
        command, *words = shlex.split(line, comments=True)
        if command not in COMMANDS:
            continue
        config = getattr(stages, COMMANDS[command][0])
        known = {config.flag(name) for name in config.model_fields} | {
            "--config",
            "--help",
            "-c",
            "-o",
        }
        flags = {word for word in words if word.startswith("-") and len(word) > 1}
        assert flags <= known | {"-q"}, line


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_every_link_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target
