"""The sbatch script in the docs does what they say, with stand-ins for srun and scontrol."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import SMALL

ROOT = Path(__file__).parents[1]
COMMAND = "llmctl pretrain --tokens runs/tok -o runs/base --processes 8 --resume"


def job(folder, tokens):
    """The script of the docs in a folder of its own, its command made small; its environment."""
    text = (ROOT / "docs" / "reliability.md").read_text()
    script = text.split("<!-- sbatch -->\n```sh\n")[1].split("```")[0]
    assert COMMAND in script
    small = f"llmctl pretrain --tokens {tokens} -o runs/base --resume --max-steps 300 --threads 1 "
    (folder / "job.sh").write_text(script.replace(COMMAND, small + " ".join(map(str, SMALL))))
    stands_in = folder / "bin"
    stands_in.mkdir()
    (stands_in / "srun").write_text('#!/bin/sh\necho $$ > pid\nexec "$@"\n')
    (stands_in / "scontrol").write_text('#!/bin/sh\necho "$@" >> scontrol.log\n')
    for path in stands_in.iterdir():
        path.chmod(0o755)
    path = f"{stands_in}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "SLURM_JOB_ID": "4711", "OMP_NUM_THREADS": "1"}


def submit(folder, environment):
    return subprocess.Popen(
        ["bash", "job.sh"],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_job_at_its_time_limit_is_requeued_and_ends(tokens, tmp_path):
    environment = job(tmp_path, tokens)
    process = submit(tmp_path, environment)
    metrics = tmp_path / "runs" / "base" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert (tmp_path / "scontrol.log").read_text() == "requeue 4711\n"
    process = submit(tmp_path, environment)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "resuming from" in err
    assert (tmp_path / "scontrol.log").read_text() == "requeue 4711\n", "a finished job stays out"
    status = json.loads((tmp_path / "runs/base/status.json").read_text())
    assert status["state"] == "completed"


def test_launchers_in_scripts_leave_time_to_save():
    """Torchrun kills its processes 30 s after a signal, and one it does not pass on kills it."""
    pages = [page.read_text() for page in (ROOT / "docs").glob("*.md")]
    blocks = [block.split("```")[0] for page in pages for block in page.split("```sh\n")[1:]]
    jobs = [block for block in blocks if "#SBATCH" in block and "torchrun" in block]
    assert jobs
    for job in jobs:
        before, _, after = job.partition("torchrun ")
        seconds = re.search("export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=([0-9]+)", before)
        assert seconds is not None
        assert int(seconds[1]) >= 600
        assert "USR1" in re.search("--signals-to-handle ([A-Z0-9,]+)", after)[1]
        assert "--kill-on-bad-exit" in before
        assert "--resume" in after
