"""The script in examples/ci runs as it stands, and sees what it is there to see."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "ci" / "life.sh"


def with_llmctl(folder):
    """An environment in which `llmctl` is this interpreter's."""
    program = folder / "llmctl"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m llmctl "$@"\n')
    program.chmod(0o755)
    python = Path(sys.executable).parent
    return {**os.environ, "PATH": f"{folder}:{python}:{os.environ['PATH']}"}


@pytest.mark.slow
@pytest.mark.timeout(900)  # ten commands, each a process of its own
def test_the_life_cycle_runs_and_every_code_is_the_expected_one(tmp_path):
    (tmp_path / "bin").mkdir()
    ran = subprocess.run(
        [SCRIPT, "runs"],
        cwd=tmp_path,
        env=with_llmctl(tmp_path / "bin"),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    said = dict(line.split(": ", 1) for line in ran.stdout.splitlines() if ": " in line)
    assert said["all of it held"] == "runs"
    assert said["pretrain"].startswith("val_loss ")
    assert said["gate"].startswith("perplexity is ")
    assert said["data"] == "runs/bad.jsonl:1"
    assert "--lora-rang" in said["usage"]


def test_a_code_that_was_not_expected_fails_the_script(tmp_path):
    program = tmp_path / "llmctl"
    program.write_text("#!/bin/sh\nexit 7\n")
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ran = subprocess.run(
        [SCRIPT, "runs"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 1
    assert ran.stderr.startswith("ended with 7, where 0 was expected: llmctl tokenize")


@pytest.mark.slow
def test_the_sdist_has_examples_recipes_and_the_tested_set(tmp_path):
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
        script = opened.getmember(next(n for n in opened.getnames() if n.endswith("/life.sh")))
    assert {"examples/ci/life.sh", "recipes/sft/sft.yaml", "constraints.txt", "mkdocs.yml"} <= names
    assert script.mode & 0o111, "it can be run"
