"""Run directories: claimed, locked, described, and left clean on errors."""

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading

import pytest
from safetensors import SafetensorError

from llmctl.errors import (
    DataError,
    DivergedError,
    ModelError,
    OutputError,
    ResourceError,
    UserError,
)
from llmctl.files import writing
from llmctl.runs.directory import finished_already, open_run, resolve_model
from llmctl.runs.lock import LOCK, is_held
from llmctl.signals import Stopped
from tests.runs.conftest import config


def fail(out, folder, error, **flags):
    with open_run("pretrain", config(out, **flags)):
        (out / folder).mkdir(parents=True)
        (out / folder / "file").write_bytes(b"x")
        raise error


def finished(out):
    with open_run("pretrain", config(out)) as run:
        (out / "model").mkdir()
        (out / "model" / "config.json").write_text("{}")
        run.log({"step": 1, "loss": float("nan")})
    return out


def test_a_finished_run_says_what_it_did(tmp_path):
    out = finished(tmp_path / "run")
    manifest = json.loads((out / "manifest.json").read_text())
    assert {"stage", "command", "versions", "git", "seed", "inputs", "outputs"} <= set(manifest)
    assert [o["path"] for o in manifest["outputs"]] == ["model/README.md", "model/config.json"]
    assert json.loads((out / "status.json").read_text())["state"] == "completed"
    assert json.loads((out / "metrics.jsonl").read_text()) == {"step": 1, "loss": None}
    assert "tokens: t" in (out / "recipe.yaml").read_text()


def test_a_finished_run_is_not_written_over(tmp_path):
    out = finished(tmp_path / "run")
    with (
        pytest.raises(OutputError, match="holds a run that is completed"),
        open_run("pretrain", config(out)),
    ):
        pass


def test_overwrite_deletes_only_what_llmctl_wrote(tmp_path):
    out = finished(tmp_path / "run")
    (out / "notes.txt").write_text("mine")
    (out / "model" / "mine.txt").write_text("mine")
    with open_run("pretrain", config(out, overwrite=True)):
        assert not (out / "model" / "config.json").exists()
    assert (out / "notes.txt").read_text() == (out / "model" / "mine.txt").read_text() == "mine"


def test_a_failed_overwrite_puts_the_earlier_run_back(tmp_path):
    out = finished(tmp_path / "run")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(DataError):
        fail(out, "tokens", DataError("no such tokens"), overwrite=True)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_overwrite_never_touches_what_is_not_llmctls(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious.txt").write_text("mine")
    with (
        pytest.raises(OutputError, match="`model` stands here and is not llmctl's"),
        open_run("pretrain", config(tmp_path, overwrite=True)),
    ):
        pass
    assert (tmp_path / "model" / "precious.txt").read_text() == "mine"
    (tmp_path / "model").rename(tmp_path / "mine")
    with pytest.raises(DataError):
        fail(tmp_path, "tokens", DataError("bad"), overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] != ".") == ["mine"]


def test_overwriting_and_resuming_at_once_is_refused(tmp_path):
    out = finished(tmp_path / "run")
    with (
        pytest.raises(UserError, match="give one of them"),
        open_run("pretrain", config(out, overwrite=True, resume=True)),
    ):
        pass


def test_a_foreign_directory_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with (
        pytest.raises(OutputError, match="not a run of llmctl's"),
        open_run("pretrain", config(tmp_path)),
    ):
        pass
    assert [p.name for p in tmp_path.iterdir() if p.name[0] != "."] == ["thesis.tex"]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "run").write_text("x")
    with (
        pytest.raises(OutputError, match="a file is in the way"),
        open_run("pretrain", config(tmp_path / "run")),
    ):
        pass
    with (
        pytest.raises(OutputError, match="cannot write here"),
        open_run("pretrain", config(tmp_path / "run" / "deeper")),
    ):
        pass


def test_a_second_run_is_refused_and_named(tmp_path):
    out = tmp_path / "run"
    named = f"in use by another run \\(pid {os.getpid()} on {socket.gethostname()}\\)"
    (out / LOCK).parent.mkdir()
    (out / LOCK).write_text("999999999 of an earlier run, whose file filelock does not truncate\n")
    with (
        open_run("pretrain", config(out)),
        pytest.raises(OutputError, match=named),
        open_run("pretrain", config(out, overwrite=True)),
    ):
        pass


OPEN = (
    "import os, sys, time; from pathlib import Path; from llmctl.runs.directory import open_run;"
    "from llmctl.config.commands.pretrain import PretrainConfig;"
    "config = PretrainConfig(tokens='t', out=Path(sys.argv[1]));"
    "run = open_run('pretrain', config); run.__enter__(); print(flush=True); time.sleep(60)"
)


def opened(out):
    """A live process that has the run open."""
    process = subprocess.Popen([sys.executable, "-c", OPEN, out], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    return process


def test_a_lock_of_a_killed_process_is_taken_over(tmp_path):
    out = tmp_path / "run"
    process = opened(out)
    try:
        assert is_held(out)
        with pytest.raises(OutputError, match=f"in use by another run \\(pid {process.pid} on "):
            finished_already("pretrain", config(out))
        with (
            pytest.raises(OutputError, match=f"pid {process.pid} "),
            open_run("pretrain", config(out, resume=True)),
        ):
            pass
    finally:
        process.kill()
        process.wait()
    assert (out / LOCK).exists()
    assert not is_held(out)
    assert finished_already("pretrain", config(out)) is None
    with (
        pytest.raises(OutputError, match="holds a run that was cut off"),
        open_run("pretrain", config(out)),
    ):
        pass
    with open_run("pretrain", config(out, resume=True)) as run:
        assert run.path == out
        assert (out / LOCK).read_text().split() == [str(os.getpid()), socket.gethostname()]


def test_looking_at_a_lock_does_not_hinder_a_run(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / LOCK).touch()
    looker = os.open(out / LOCK, os.O_RDONLY)
    fcntl.flock(looker, fcntl.LOCK_SH)
    timer = threading.Timer(0.05, os.close, [looker])
    timer.start()
    with open_run("pretrain", config(out)):
        timer.join()


def test_only_rank_0_of_a_launched_run_looks_at_the_lock(tmp_path, monkeypatch):
    with open_run("pretrain", config(tmp_path / "run")):
        monkeypatch.setenv("RANK", "1")
        assert finished_already("pretrain", config(tmp_path / "run")) is None
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(OutputError, match="in use"):
            finished_already("pretrain", config(tmp_path / "run"))
        monkeypatch.delenv("RANK")


def test_a_finished_run_is_known_before_anything_is_loaded(tmp_path, monkeypatch):
    out = tmp_path / "run"
    result = {"out": str(out), "loss": 1.0}
    with open_run("pretrain", config(out)) as run:
        run.record(result=result)
    assert finished_already("pretrain", config(out)) is None
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert finished_already("pretrain", config(out, resume=True, lr=0.5)) == result
    with pytest.raises(OutputError, match="not one of `reward`"):
        finished_already("reward", config(out, resume=True))
    for damaged in ("{", '{"stage": "pretrain"}'):
        (out / "manifest.json").write_text(damaged)
        with pytest.raises(OutputError, match="not one of `pretrain`"):
            finished_already("pretrain", config(out, resume=True))


def test_a_run_keeps_its_id_when_it_is_resumed_and_no_other_has_it(tmp_path):
    def run_id(**flags):
        with open_run("pretrain", config(tmp_path / "run", **flags)) as run:
            assert json.loads((run.path / "manifest.json").read_text())["run_id"]
            return run.manifest["run_id"]

    first = run_id()
    assert len(first) == 32
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    (tmp_path / "run" / "status.json").write_text(json.dumps({**status, "state": "preempted"}))
    assert run_id(resume=True) == first
    assert run_id(overwrite=True) != first


def test_folders_made_for_a_refused_run_go_with_it(tmp_path):
    with pytest.raises(DataError):
        fail(tmp_path / "a" / "b" / "c", "tokens", DataError("bad"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError):
        fail(tmp_path / "a" / "b" / "c", "tokens", DataError("bad"))
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]
    with (
        pytest.raises(OutputError, match="File name too long"),
        open_run("pretrain", config(tmp_path / "b" / ("x" * 300))),
    ):
        pass
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]
    with pytest.raises(DivergedError):
        fail(tmp_path / "a" / "b" / "c", "tokens", DivergedError("nan"))
    assert (tmp_path / "a" / "b" / "c" / "status.json").exists()


def test_a_refused_directory_stays_as_it_was(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    (tmp_path / "empty").mkdir()
    with (
        pytest.raises(OutputError, match="not a run of llmctl's"),
        open_run("pretrain", config(tmp_path)),
    ):
        pass
    with pytest.raises(DataError):
        fail(tmp_path / "empty", "tokens", DataError("bad"))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["empty", "thesis.tex"]


def test_a_link_to_nowhere_is_in_the_way(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    with (
        pytest.raises(OutputError, match="a file is in the way"),
        open_run("pretrain", config(tmp_path / "run")),
    ):
        pass


def log_in(out, lose):
    with open_run("pretrain", config(out)) as run:
        lose(out)
        run.log({"step": 1})


def replace(out):
    """As a library does that makes the folders it writes to."""
    shutil.rmtree(out)
    out.mkdir()


@pytest.mark.parametrize("lose", [shutil.rmtree, replace, lambda out: out.rename(out.parent / "x")])
def test_a_directory_that_is_deleted_while_running(tmp_path, lose):
    out = tmp_path / "run"
    with pytest.raises(OutputError, match="the run directory was deleted while running"):
        log_in(out, lose)
    assert not (out / "status.json").exists()
    assert lose is replace or not out.exists()


def test_a_bug_is_not_written_to_a_directory_that_is_another_by_now(tmp_path):
    def train(out):
        with open_run("pretrain", config(out)):
            replace(out)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "run")
    assert not list(tmp_path.rglob("*.*"))


def test_another_missing_file_is_no_deleted_directory(tmp_path):
    with pytest.raises(FileNotFoundError), open_run("pretrain", config(tmp_path / "run")):
        (tmp_path / "elsewhere").read_text()


class Wrapped(Exception):
    """What a library makes of a signal that arrives within it."""


def wrapped(error):
    try:
        raise error
    except KeyboardInterrupt as caught:
        raise Wrapped from caught


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (Stopped(signal.SIGTERM), 143), (Stopped(signal.SIGUSR1), 143)],
)
@pytest.mark.parametrize("wrap", [False, True])
def test_a_signal_leaves_a_run_to_resume_or_none(tmp_path, error, code, wrap):
    def cut(out, *folders):
        with open_run("pretrain", config(out)):
            for folder in folders:
                (out / folder).mkdir(parents=True)
                (out / folder / "file").write_text("x")
            if wrap:
                wrapped(error)
            raise error

    with pytest.raises(Wrapped if wrap else type(error)):
        cut(tmp_path / "new", ".tmp-model", "tokens")
    assert not (tmp_path / "new").exists()
    out = tmp_path / "saved"
    with pytest.raises(Wrapped if wrap else type(error)):
        cut(out, ".tmp-model", "checkpoints/checkpoint-1", "checkpoints/.tmp-checkpoint-2")
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", code)
    assert status["error"] == ("interrupted" if code == 130 else "terminated")
    assert not (out / ".tmp-model").exists()
    assert not (out / "error.log").exists()
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("error", [DataError("bad"), KeyboardInterrupt()])
def test_nothing_half_made_is_left(tmp_path, error):
    out = tmp_path / "run"
    with pytest.raises(type(error)):
        fail(out, "tokens", error)
    assert not out.exists()


def test_what_can_be_resumed_is_kept(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(DataError):
        fail(out, "checkpoints/checkpoint-1", DataError("bad"))
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["resumable"], status["exit_code"]) == ("failed", True, 3)


def test_a_diverged_run_says_so(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(DivergedError), open_run("pretrain", config(out)):
        raise DivergedError("step 3: loss nan")
    assert json.loads((out / "status.json").read_text())["state"] == "diverged"


def test_a_bug_keeps_its_traceback(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ZeroDivisionError), open_run("pretrain", config(out)):
        raise ZeroDivisionError("oops")
    assert "ZeroDivisionError: oops" in (out / "error.log").read_text()


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "bytes free"),
        (errno.EDQUOT, "bytes free"),
        (errno.EIO, "the disk failed"),
        (errno.EFBIG, "beyond the size that is allowed"),
    ],
)
@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_the_disks_refusals_are_a_matter_of_resources(tmp_path, number, message, kind):
    said = os.strerror(number)
    error = OSError(number, said) if kind is OSError else kind(f"I/O: {said} (os error {number})")
    with pytest.raises(ResourceError, match=message), writing(tmp_path):
        raise error


@pytest.mark.parametrize("error", [OSError(errno.ESTALE, "stale"), SafetensorError("header")])
def test_other_failures_are_not_the_disks(tmp_path, error):
    with pytest.raises(type(error), match=str(error)[-5:]), writing(tmp_path):
        raise error


def test_a_limit_on_file_sizes_is_said_as_such(tmp_path):
    code = (
        "import resource, sys; from pathlib import Path; from llmctl.files import writing\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "with writing(Path(sys.argv[1])): Path(sys.argv[1], 'x').write_bytes(bytes(5000))"
    )
    ran = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert "ResourceError" in ran.stderr
    assert "ulimit -f" in ran.stderr


def test_a_model_argument_finds_model_then_adapter_then_the_folder(tmp_path):
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    assert resolve_model(str(run)) == str(run / "adapter")
    (run / "model").mkdir()
    assert resolve_model(str(run)) == str(run / "model")
    assert resolve_model(str(run / "model")) == str(run / "model")
    assert resolve_model("gpt2") == "gpt2"
    (run / "file").write_text("")
    with pytest.raises(ModelError, match="not a model folder"):
        resolve_model(str(run / "file"))
