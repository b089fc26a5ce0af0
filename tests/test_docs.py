"""Docs and recipes are true: the reference is current, every recipe loads."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llmctl.cli import COMMANDS
from llmctl.config import commands
from llmctl.config.base import read_recipe
from llmctl.pipeline.references import resolve
from llmctl.pipeline.steps import load

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TOURS = [page for page in PAGES if "<!-- tour -->" in page.read_text()]
ACCELERATE = sorted((ROOT / "recipes/accelerate").glob("*.yaml"))
RECIPES = sorted({*(ROOT / "recipes").rglob("*.yaml")} - {*ACCELERATE})


def test_the_reference_is_current():
    script = ROOT / "docs" / "generate.py"
    ran = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_there_are_recipes():
    assert len(RECIPES) >= 3


def test_every_folder_of_recipes_holds_some_and_the_guide_lists_it():
    guide = (ROOT / "docs/guide.md").read_text()
    listed = set(re.findall(r"^\| \[(\w+)/\]\(\.\./recipes/\1\)", guide, re.MULTILINE))
    assert listed >= {"accelerate", "lifecycle", "pretrain", "rlhf", "sft", "use"}
    assert listed == {p.name for p in (ROOT / "recipes").iterdir() if p.is_dir()}
    assert [p.name for p in (ROOT / "recipes").iterdir() if not p.is_dir()] == ["demo.yaml"]
    for folder in sorted(listed):
        assert list((ROOT / "recipes" / folder).glob("*.yaml")), folder


LIVES = [path for path in RECIPES if "stages" in read_recipe(path)[0]]


def short(path):
    return str(path.relative_to(ROOT / "recipes"))


@pytest.mark.parametrize("path", LIVES, ids=short)
def test_every_life_cycle_loads(path):
    steps = load(path).steps
    assert len(resolve(load(path), Path("runs"))) == len(steps) > 3


@pytest.mark.parametrize("path", sorted({*RECIPES} - {*LIVES}), ids=short)
def test_every_recipe_loads(path):
    values, _ = read_recipe(path)
    assert values["stage"] in (path.stem.split("-")[0], path.parent.name), "its path says for what"
    loaded = commands.config_of(values["stage"]).load(values["stage"], path, {})
    assert loaded.given() >= set(values) - {"stage"}, "a recipe holds only what differs"


@pytest.mark.parametrize("path", ACCELERATE, ids=short)
def test_every_accelerate_configuration_is_valid(path):
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(path))
    assert loaded.distributed_type.name in {"MULTI_GPU", "FSDP"}


def tour(page):
    """The shell lines of a page's tour."""
    text = page.read_text()
    block = text.split("<!-- tour -->\n```sh\n")[1].split("```")[0]
    return [line for line in block.splitlines() if line and not line.startswith("#")]


def test_the_readme_has_a_tour():
    assert ROOT / "README.md" in TOURS
    assert len(tour(ROOT / "README.md")) >= 5


def test_the_hybrid_configuration_shards_within_a_machine_and_copies_across():
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    path = str(ROOT / "recipes/accelerate/hybrid.yaml")
    arguments = launch_command_parser().parse_args(["--config_file", path, "-m", "llmctl"])
    settings, *_ = _validate_launch_command(arguments)
    assert settings.use_fsdp
    assert settings.use_parallelism_config
    assert settings.parallelism_config_dp_replicate_size == settings.num_machines
    shards = settings.parallelism_config_dp_shard_size
    assert shards * settings.num_machines == settings.num_processes


@pytest.mark.slow
@pytest.mark.timeout(900)  # nine commands, each a process of its own
@pytest.mark.parametrize("page", TOURS, ids=lambda p: p.name)
def test_the_tours_run(page, tmp_path):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for line in tour(page):
        ran = subprocess.run(
            line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert ran.returncode == 0, f"{line}\n{ran.stderr}"
        assert ran.stdout, line


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_every_command_shown_is_one_and_its_flags_exist(path):
    for line in re.findall(r"^\s*llmctl (.+)$", path.read_text(), re.MULTILINE):
        command, *words = shlex.split(line, comments=True)
        assert command in COMMANDS or command.startswith("--"), line
        config = commands.config_of(command)
        known = {config.flag(name) for name in config.model_fields} | {
            "--config",
            "--help",
            "-c",
            "-o",
        }
        flags = {word for word in words if word.startswith("-") and len(word) > 1}
        assert flags <= known | {"-q"}, line


def test_the_readme_says_which_commands_lack_a_flag(cli):
    text = " ".join((ROOT / "README.md").read_text().split())
    helps = {name: cli(name, "--help").out for name in COMMANDS}
    for shown, flag in (("-c recipe.yaml", "--config"), ("--dry-run", "--dry-run")):
        said = re.search(rf"`{shown}`(?: is a flag)? of all but (.*?)(?:\.|, `--)", text)
        lacking = {name for name, printed in helps.items() if flag not in printed}
        assert set(re.findall(r"`(\w+)`", said[1])) == lacking, flag


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_every_link_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target
