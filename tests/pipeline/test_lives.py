"""The recipes of whole lives work: every stage is checked, and a short form of the demo runs."""

import json
from pathlib import Path

import pytest
import yaml

from llmctl.pipeline.demo import RECIPE
from tests.run_files import write_rows

LIVES = sorted((Path(__file__).parents[2] / "recipes/lifecycle").glob("*.yaml"))
PROMPTS = [{"prompt": f"Say {word}."} for word in ("one", "two", "three", "four", "five", "six")]
EXAMPLES = [{**row, "response": row["prompt"][4:-1]} for row in PROMPTS]
PREFERENCES = [{**row, "chosen": "yes, gladly", "rejected": "no"} for row in PROMPTS]


@pytest.fixture
def data(corpus, tmp_path, monkeypatch):
    """What the recipes read."""
    files = {
        "examples": EXAMPLES,
        **dict.fromkeys(("preferences", "helpful", "harmless"), PREFERENCES),
        **dict.fromkeys(("prompts", "prompts-1", "prompts-2", "prompts-3"), PROMPTS),
    }
    for name, rows in files.items():
        write_rows(tmp_path / f"{name}.jsonl", rows)
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text(corpus.read_text())
    monkeypatch.setenv("DATA", str(tmp_path))


def test_there_are_lives():
    assert {path.stem for path in LIVES} >= {"life", "rlhf-two-rewards", "rlhf-iterative"}


@pytest.mark.parametrize("recipe", LIVES, ids=lambda path: path.stem)
def test_a_dry_run_of_a_recipe_finds_nothing_wrong(recipe, cli, roomy, data, tmp_path, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(roomy))
    result = cli("run", recipe, "-o", tmp_path / "out", "--dry-run", "--json")
    assert result.code == 0, result.err
    written = yaml.safe_load(recipe.read_text())["stages"]
    planned = json.loads(result.out)["stages"]
    steps = [len(entry.get("stages", [0])) * entry.get("rounds", 1) for entry in written]
    assert len(planned) == sum(steps)
    assert not (tmp_path / "out").exists()


SHORT = {
    "tok": {"data": ["CORPUS", "builtin:tasks:1"], "vocab_size": 320},
    "base": {"max_steps": 2, "size": None, "layers": 2, "hidden": 32, "heads": 2},
    "sft": {"max_steps": 2},
    "exact": {"limit": 4, "max_new_tokens": 4},
    "reward": {"max_steps": 2},
    "ppo": {"max_steps": 1, "val_size": 4, "max_new_tokens": 4, "batch_size": 8},
    "after": {"limit": 4, "max_new_tokens": 4},
    "samples": {"max_new_tokens": 4},
}


@pytest.mark.slow
def test_the_demo_in_short_goes_through_every_stage(cli, corpus, tmp_path):
    """No stage refuses what the recipe says; what it reaches is measured by benchmarks/demo.py."""
    recipe = yaml.safe_load(RECIPE.read_text())
    for stage in recipe["stages"]:
        stage.pop("gates", None)
        stage.update(SHORT.get(stage["name"], {}))
        for name in [name for name, value in stage.items() if value is None]:
            del stage[name]
    text = yaml.safe_dump(recipe).replace("CORPUS", str(corpus))
    (tmp_path / "short.yaml").write_text(text)
    result = cli("run", tmp_path / "short.yaml", "-o", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    assert {s["state"] for s in json.loads(result.out)["stages"]} == {"completed"}
