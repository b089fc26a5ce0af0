"""Run directories: claimed, locked, described, and left clean on errors."""

import json
import os
import subprocess
import sys

import pytest

from llmctl.config.stages import PretrainConfig
from llmctl.errors import (
    DataError,
    DivergedError,
    ModelError,
    OutputError,
    ResourceError,
    UserError,
)
from llmctl.files import writing
from llmctl.rundir import open_run, resolve_model


def config(out, **flags):
    return PretrainConfig(tokens="t", out=out, **flags)


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
    assert manifest["outputs"][0]["path"] == "model/config.json"
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
    with (
        open_run("pretrain", config(out)),
        pytest.raises(OutputError, match=f"in use by another run \\(pid {os.getpid()}"),
        open_run("pretrain", config(out, overwrite=True)),
    ):
        pass


def test_a_dead_process_leaves_no_lock(tmp_path):
    out = tmp_path / "run"
    code = (
        "import os, sys; from pathlib import Path; from llmctl.rundir import open_run;"
        "from llmctl.config.stages import PretrainConfig;"
        "config = PretrainConfig(tokens='t', out=Path(sys.argv[1]));"
        "run = open_run('pretrain', config); run.__enter__(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(out)]).returncode == 9
    with (
        pytest.raises(OutputError, match="holds a run that was cut off"),
        open_run("pretrain", config(out)),
    ):
        pass
    with open_run("pretrain", config(out, resume=True)) as run:
        assert run.path == out


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


def test_no_space_is_a_matter_of_resources(tmp_path):
    with pytest.raises(ResourceError, match="bytes free"), writing(tmp_path):
        raise OSError(28, "No space left on device")


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
