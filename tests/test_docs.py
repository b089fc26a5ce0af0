"""Docs and recipes are true: the reference is current, every recipe loads."""

import subprocess
import sys
from pathlib import Path

import pytest

from llmctl.cli import COMMANDS
from llmctl.config import stages
from llmctl.config.base import read_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted(p for p in (ROOT / "recipes").rglob("*.yaml") if p.parent.name != "accelerate")


def test_the_reference_is_current():
    script = ROOT / "docs" / "generate.py"
    ran = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_there_are_recipes():
    assert len(RECIPES) >= 3


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
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
