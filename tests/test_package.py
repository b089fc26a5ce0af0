"""The built wheel installs and runs outside the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_runs_outside_the_checkout(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("llmctl-*-py3-none-any.whl")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", site, wheel], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}

    def run(*command):
        ran = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return ran.stdout.strip()

    where = run(sys.executable, "-c", "import llmctl; print(llmctl.__file__)")
    assert Path(where).is_relative_to(site)
    script = site / "bin" / "llmctl"
    assert run(sys.executable, script, "--version").startswith("llmctl 0.")
    (tmp_path / "a.txt").write_text("The cat sees the dog. " * 50)
    flags = ("--data", "a.txt", "--algorithm", "char", "-o", "run")
    assert run(sys.executable, "-m", "llmctl", "tokenize", *flags) == "run"
    assert (tmp_path / "run" / "tokens" / "index.json").exists()
