"""`llmctl runs`: what is found, how it stands, and how it is resumed."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from llmctl.runs.lock import locked
from tests.conftest import SMALL
from tests.processes import run_llmctl, shown_on_a_terminal, spawn
from tests.run_files import cut_off, digest, edit_json, write_rows

KEYS = {
    "path",
    "stage",
    "status",
    "step",
    "max_steps",
    "loss",
    "val_loss",
    "updated",
    "age_seconds",
    "bytes",
    "resumable",
    "resume",
}


def make(path, state="completed", *, age=0, step=None, checkpoint=False, rows=(), stage="pretrain"):
    """A run directory as llmctl leaves it."""
    path.mkdir(parents=True)
    manifest = {"stage": stage, "versions": {"llmctl": "0"}, "plan": {"max_steps": 100}}
    updated = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(time.time() - age))
    status = {"state": state, "updated": updated, "resumable": checkpoint}
    if step is not None:
        status["step"] = step
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "status.json").write_text(json.dumps(status))
    write_rows(path / "metrics.jsonl", rows)
    (path / ".llmctl.lock").touch()
    if checkpoint:
        (path / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    return path


def listed(cli, *arguments):
    result = cli("runs", *arguments, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["stage"] == "runs"
    return {row["path"]: row for row in found["runs"]}


def test_every_state_with_its_facts_newest_first(cli, tmp_path):
    make(tmp_path / "old", age=7200, step=100, rows=[{"step": 100, "loss": 2.5}])
    make(tmp_path / "a" / "cut", "running", age=60, step=5, checkpoint=True)
    make(tmp_path / "stopped", "preempted", age=3, step=7, checkpoint=True)
    make(tmp_path / "early", "running", age=300)
    make(tmp_path / "wrong", "failed", age=30)
    found = listed(cli, tmp_path)
    assert [os.path.relpath(p, tmp_path) for p in found] == [
        "stopped",
        "wrong",
        "a/cut",
        "early",
        "old",
    ]
    assert all(set(row) == KEYS for row in found.values())
    old = found[str(tmp_path / "old")]
    assert (old["status"], old["step"], old["max_steps"], old["loss"]) == (
        "completed",
        100,
        100,
        2.5,
    )
    assert (old["val_loss"], old["resumable"], old["resume"]) == (None, False, None)
    assert abs(old["age_seconds"] - 7200) < 60
    assert old["bytes"] == sum(p.stat().st_size for p in (tmp_path / "old").iterdir())
    cut = found[str(tmp_path / "a" / "cut")]
    assert (cut["status"], cut["resumable"]) == ("killed", True)
    place = tmp_path / "a" / "cut"
    assert cut["resume"] == f"llmctl pretrain -c {place}/recipe.yaml -o {place} --resume"
    early = found[str(tmp_path / "early")]
    assert (early["status"], early["resumable"], early["resume"]) == ("killed", False, None)
    assert found[str(tmp_path / "stopped")]["resumable"]


def test_a_run_at_work_is_running_and_not_to_be_resumed(cli, tmp_path):
    out = make(tmp_path / "run", "running", checkpoint=True)
    with locked(out):
        row = listed(cli, tmp_path)[str(out)]
        assert (row["status"], row["resumable"], row["resume"]) == ("running", False, None)
    assert listed(cli, tmp_path)[str(out)]["status"] == "killed"


def test_losses_are_the_last_ones_and_torn_lines_do_not_matter(cli, tmp_path):
    rows = [{"step": 10, "val_loss": 3.0}, *({"step": n, "loss": n / 10} for n in range(11, 40))]
    out = make(tmp_path / "run", rows=rows)
    with (out / "metrics.jsonl").open("ab") as file:
        file.write(b'null\n{"step": 40, "loss": null}\n\xff\xfe\n{"step": 41, "lo')
    row = listed(cli, tmp_path)[str(out)]
    assert (row["step"], row["loss"], row["val_loss"]) == (40, None, 3.0)


def test_only_the_end_of_long_metrics_is_read(cli, tmp_path):
    rows = [{"step": n, "loss": 1.0, "pad": "x" * 1000} for n in range(3000)]
    out = make(tmp_path / "run", rows=[{"step": 0, "val_loss": 9.0}, *rows])
    row = listed(cli, tmp_path)[str(out)]
    assert (row["step"], row["loss"], row["val_loss"]) == (2999, 1.0, None)


@pytest.mark.parametrize("name", ["status.json", "manifest.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\x00", b"{}", b"[" * 100_000])
def test_a_broken_run_does_not_break_the_table(cli, tmp_path, name, content):
    make(tmp_path / "good")
    bad = make(tmp_path / "bad", checkpoint=True)
    (bad / name).write_bytes(content)
    found = listed(cli, tmp_path)
    assert found[str(tmp_path / "good")]["status"] == "completed"
    row = found[str(bad)]
    assert (row["status"], row["resumable"]) == ("damaged", False)
    assert "damaged" in cli("runs", tmp_path).out


@pytest.mark.parametrize("junk", [{"step": "x"}, {"updated": 5}, {"updated": "today", "step": []}])
def test_odd_values_are_passed_over(cli, tmp_path, junk):
    out = make(tmp_path / "run", rows=[{"step": None, "loss": "low", "val_loss": [1]}])
    (out / "status.json").write_text(json.dumps({"state": "completed", **junk}))
    row = listed(cli, tmp_path)[str(out)]
    assert (row["status"], row["step"], row["loss"]) == ("completed", None, None)
    assert cli("runs", tmp_path).code == 0


def test_what_is_no_run_is_not_listed_and_loops_end(cli, tmp_path):
    run = make(tmp_path / "deep" / "er" / "run")
    make(run / "checkpoints" / "hidden")
    make(run / "model" / "hidden")
    make(tmp_path / ".hidden" / "run")
    make(tmp_path.joinpath(*"abcdefg") / "too-deep")
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text("{}")
    (tmp_path / "deep" / "alias").symlink_to(run)
    assert set(listed(cli, tmp_path)) == {str(run)}
    assert set(listed(cli, tmp_path / "deep" / "alias")) == {str(tmp_path / "deep" / "alias")}


def test_a_link_to_a_run_counts_but_none_is_followed_further(cli, tmp_path):
    (tmp_path / "here").mkdir()
    run = make(tmp_path / "disk" / "run")
    (tmp_path / "here" / "link").symlink_to(run)
    (tmp_path / "here" / "disk").symlink_to(tmp_path / "disk")
    (tmp_path / "here" / "nowhere").symlink_to(tmp_path / "gone")
    assert set(listed(cli, tmp_path / "here")) == {str(tmp_path / "here" / "link")}


def test_by_default_it_looks_in_runs_else_here(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "elsewhere")
    assert set(listed(cli)) == {"elsewhere"}
    make(tmp_path / "runs" / "base")
    assert set(listed(cli)) == {"runs/base"}


def test_nothing_and_nowhere(cli, tmp_path):
    result = cli("runs", tmp_path)
    assert (result.code, result.out) == (0, "")
    assert "no runs under" in result.err
    assert listed(cli, tmp_path) == {}
    result = cli("runs", tmp_path / "absent")
    assert (result.code, result.out) == (3, "")
    assert "no such directory" in result.err
    (tmp_path / "file").touch()
    assert cli("runs", tmp_path / "file").code == 3


def test_it_takes_no_flags_that_mean_nothing_here(cli):
    text = cli("runs", "--help").out
    assert "[DIR]" in text
    assert "--json" in text
    for flag in ("--seed", "--out", "--overwrite", "--dry-run", "--config"):
        assert flag not in text
        assert cli("runs", flag).code == 2


def test_in_a_pipe_there_are_aligned_columns(cli, tmp_path):
    make(tmp_path / "two words", "preempted", age=90, step=1234, checkpoint=True)
    make(tmp_path / "b\x1b[31mad\nname", age=9000, rows=[{"step": 3, "loss": 2, "val_loss": 1.5}])
    result = cli("runs", tmp_path)
    head, first, second = result.out.splitlines()
    assert head.split() == ["run", "stage", "status", "step", "loss", "age", "size", "resume"]
    assert first.index("pretrain") == second.index("pretrain") == head.index("stage")
    assert "1,234/100" in first
    assert first.split("llmctl ")[1].endswith("two words' --resume")
    assert "b?[31mad?name" in second
    assert "1.5" in second
    assert "\x1b" not in result.out


def test_on_a_terminal_there_is_a_table_of_80_columns(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    make(tmp_path / ("long-" * 12), "preempted", age=90, step=12_345, checkpoint=True)
    text = shown_on_a_terminal("runs", tmp_path, TERM="xterm", COLUMNS="80")
    assert "\x1b[" in text
    table, commands = text.split("to resume:")
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in table.splitlines()]
    assert max(map(len, lines)) <= 80
    assert any("preempted" in line and "12,345/100" in line for line in lines)
    place = tmp_path / ("long-" * 12)
    assert f"llmctl pretrain -c {place}/recipe.yaml -o {place} --resume" in commands


def test_the_command_shown_resumes_the_run(cli, tokens, tmp_path):
    out = tmp_path / "a run"
    train = ("pretrain", "--tokens", tokens, *SMALL, "--max-steps", 8, "--threads", 1)
    assert cli(*train, "--save-every", 4, "-o", out).code == 0
    weights = (out / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "checkpoint-8")
    status = json.loads((out / "status.json").read_text())
    (out / "status.json").write_text(json.dumps({**status, "state": "running"}))
    row = listed(cli, tmp_path)[str(out)]
    assert (row["status"], row["max_steps"]) == ("killed", 8)
    name, *arguments = shlex.split(row["resume"])
    assert name == "llmctl"
    result = cli(*arguments)
    assert result.code == 0, result.err
    assert "resuming from" in result.err
    assert (out / "model" / "model.safetensors").read_bytes() == weights
    assert listed(cli, tmp_path)[str(out)]["status"] == "completed"


@pytest.mark.parametrize(
    ("entries", "start"),
    [
        ({}, "llmctl pretrain"),
        ({"world_size": 1, "machines": 1}, "llmctl pretrain"),
        ({"world_size": 4}, "llmctl pretrain --processes 4"),
        ({"world_size": 4, "machines": 1}, "llmctl pretrain --processes 4"),
        (
            {"world_size": 6, "machines": 2},
            "torchrun --nnodes 2 --nproc-per-node 3 --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
            "-m llmctl pretrain",
        ),
    ],
)
def test_a_run_resumes_with_as_many_processes_as_it_had(cli, tmp_path, entries, start):
    run = make(tmp_path / "run", "preempted", checkpoint=True)
    edit_json(run / "manifest.json", **entries)
    command = shlex.split(listed(cli, tmp_path)[str(run)]["resume"])
    wanted = shlex.split(start)
    files = ("-c", f"{run}/recipe.yaml", "-o", str(run), "--resume")
    assert {*command} == {*wanted, *files}
    assert command[: command.index("pretrain")] == wanted[: wanted.index("pretrain")]


@pytest.mark.slow
def test_the_command_shown_resumes_a_run_that_torchrun_began(cli, tokens, tmp_path):
    out, whole = tmp_path / "run", tmp_path / "whole"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    train = ("pretrain", "--tokens", tokens, *SMALL, "--max-steps", 8, "--save-every", 4)
    once = ("--threads", 1, "--eval-every", 4)
    began = spawn(*train, *once, "-o", whole, launcher=(*torchrun, "-m", "llmctl"))
    _, err = began.communicate(timeout=200)
    assert began.returncode == 0, err
    cut_off(whole, out, 4)
    row = listed(cli, tmp_path)[str(out)]
    assert row["status"] == "killed"
    ran = run_llmctl(*shlex.split(row["resume"])[1:])
    assert ran.returncode == 0, ran.stderr
    assert "resuming from" in ran.stderr
    assert digest(out) == digest(whole)


def test_it_is_light(tmp_path):
    make(tmp_path / "run")
    program = (
        "import sys; from llmctl.cli import main\n"
        "sys.argv = ['llmctl', 'runs', sys.argv[1]]\n"
        "try: main()\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers", "datasets", "numpy"} & set(ran.stderr.split())
    assert str(tmp_path / "run") in ran.stdout


def test_a_closed_pipe_is_no_bug(tmp_path):
    for number in range(3):
        make(tmp_path / str(number))
    shell = f"{sys.executable} -m llmctl runs {tmp_path} | true; echo ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert "Traceback" not in ran.stderr
    assert int(ran.stdout) in (0, 128 + signal.SIGPIPE)
