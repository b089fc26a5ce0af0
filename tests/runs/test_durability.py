"""What a kill or a power cut at any instant leaves of a run's records, and a refusal none of."""

import json
import os
import shlex
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from llmctl import files
from llmctl.console import log
from llmctl.errors import DataError, DivergedError, ModelError, OutputError
from llmctl.files import finite, write_json
from llmctl.runs.directory import finished_already, is_complete, open_run, read_manifest
from tests.conftest import SMALL
from tests.run_files import metrics
from tests.runs.conftest import config

CHANGES = ("write_bytes", "write_text", "replace", "rename", "unlink")


def train(out, *, error=None, **flags):
    with open_run("pretrain", config(out, **flags)) as run:
        run.drop_metrics_after(0)
        (out / "model").mkdir(exist_ok=True)
        (out / "model" / "config.json").write_text(f'{{"lr": {flags.get("lr")}}}')
        run.log({"step": 1, "loss": 2.0})
        if error:
            raise error


def preempted(out, step=4):
    """A run that a signal stopped after this step."""
    with suppress(KeyboardInterrupt), open_run("pretrain", config(out)) as run:
        run.record(plan={"max_steps": 9}, parameters=7, device="cpu", inputs=[{"role": "tokens"}])
        run.drop_metrics_after(0)
        (run.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
        run.set_status("running", step=step)
        raise KeyboardInterrupt
    return out


def records(out):
    return {p: p.read_bytes() for p in out.iterdir() if p.is_file() and p.name[0] != "."}


@pytest.fixture
def instants(tmp_path, monkeypatch):
    """`instants(out, body)`: copies of the directory before and after each change that body makes.

    A file that is being written is also seen half.
    """
    taken = []

    def photograph(out):
        copy = tmp_path / "instants" / str(len(taken))
        shutil.copytree(out, copy)
        taken.append(copy)

    def watch(out, body):
        taken.clear()
        shutil.rmtree(tmp_path / "instants", ignore_errors=True)
        with monkeypatch.context() as patch:
            for name in CHANGES:
                patch.setattr(Path, name, watched(name, getattr(Path, name), out))
            body()
        assert len(taken) > 8
        return list(taken)

    def watched(name, change, out):
        def changing(path, *arguments, **options):
            inside = out in path.parents and out.is_dir()
            if inside:
                photograph(out)
            if inside and name.startswith("write"):
                change(path, arguments[0][: len(arguments[0]) // 2])
                photograph(out)
            found = change(path, *arguments, **options)
            if inside:
                photograph(out)
            return found

        return changing

    return watch


def failing(out, **flags):
    with pytest.raises(DataError):
        train(out, error=DataError("bad"), **flags)


@pytest.mark.parametrize("ends", [train, failing])
def test_a_kill_at_any_instant_leaves_a_directory_to_resume_or_overwrite(ends, tmp_path, instants):
    for copy in instants(tmp_path / "run", lambda: ends(tmp_path / "run")):
        again = copy.with_name("again")
        for flags in ({"resume": True}, {"overwrite": True}):
            shutil.copytree(copy, again)
            if not (is_complete(again) and "resume" in flags):
                train(again, **flags)
            assert is_complete(again), copy
            assert (again / "recipe.yaml").read_text().startswith("stage: pretrain")
            shutil.rmtree(again)


@pytest.mark.parametrize("ends", [train, failing])
def test_a_kill_while_overwriting_loses_neither_run(ends, tmp_path, instants):
    out = tmp_path / "run"
    train(out, lr=1)
    first = read_manifest(out)["run_id"]
    for copy in instants(out, lambda: ends(out, overwrite=True, lr=2)):
        begun = read_manifest(copy).get("run_id") not in (None, first)
        with pytest.raises(OutputError, match="holds a run that "):
            train(copy)
        assert begun or is_complete(copy), "the earlier one is back"
        if is_complete(copy):
            made_with = json.loads((copy / "model" / "config.json").read_text())["lr"]
            assert f"lr: {made_with}" in (copy / "recipe.yaml").read_text()
        train(copy, overwrite=True, lr=3)
        assert json.loads((copy / "model" / "config.json").read_text()) == {"lr": 3}
        assert not list(copy.glob(".replaced*"))


@pytest.mark.parametrize("name", ["recipe.yaml", "status.json", "manifest.json", ".replaced/x"])
@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_a_name_of_ours_alone_makes_no_run(tmp_path, name, flags):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"versions": null, "state": "completed"}')
    if not (name.startswith(".") and "overwrite" in flags):
        with pytest.raises(OutputError, match="not"):
            train(tmp_path, **flags)
    assert (tmp_path / name).read_text() == '{"versions": null, "state": "completed"}'


def test_a_run_without_status_was_cut_off(tmp_path):
    train(tmp_path)
    (tmp_path / "status.json").unlink()
    with pytest.raises(OutputError, match="was cut off"):
        train(tmp_path)
    train(tmp_path, resume=True)
    assert is_complete(tmp_path)


# --- power cuts


def synced_before(monkeypatch, name, body):
    """The paths that were fsynced before a file got this name."""
    synced, replace = [], Path.replace
    fsync, before = os.fsync, []
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(Path(f"/proc/self/fd/{fd}").readlink()), fsync(fd))
    )

    def replacing(path, target):
        if Path(target).name == name:
            before[:] = synced
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", replacing)
    body()
    return set(before)


def test_all_results_are_on_the_disk_before_the_run_is_completed(tmp_path, monkeypatch):
    out = tmp_path / "a" / "run"

    def body():
        with open_run("pretrain", config(out)) as run:
            run.log({"step": 1})
            for folder in ("tokens/deep", "tokenizer"):
                (out / folder).mkdir(parents=True)
                (out / folder / "file").write_text("x")

    before = synced_before(monkeypatch, "status.json", body)
    results = {p for p in out.rglob("*") if p.suffix != ".lock" and p.name[0] != "."}
    assert results - before <= {out / n for n in ("manifest.json", "status.json", "recipe.yaml")}
    assert {
        out,
        out.parent,
        tmp_path,
        out / ".manifest.json.tmp",
        out / ".recipe.yaml.tmp",
    } <= before


def test_a_model_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    synced, rename = [], Path.rename
    monkeypatch.setattr(files, "fsync", lambda path: synced.append(path))
    monkeypatch.setattr(Path, "rename", lambda a, b: (synced.append("rename"), rename(a, b))[1])
    staging = tmp_path / ".tmp-model"
    (staging / "deep").mkdir(parents=True)
    (staging / "deep" / "weights").write_text("x")
    (tmp_path / "model").mkdir()
    files.replace_folder(staging, tmp_path / "model")
    at = synced.index("rename")
    assert set(synced[:at]) == {staging, staging / "deep", staging / "deep" / "weights"}
    assert synced[at + 1 :] == [tmp_path]
    assert (tmp_path / "model" / "deep" / "weights").read_text() == "x"


def test_models_are_saved_that_way(base, tmp_path, monkeypatch):
    from llmctl.models import loading

    seen = []
    monkeypatch.setattr(files, "replace_folder", lambda *paths: seen.append(paths))
    model = loading.load_causal_lm(str(base), dtype=loading.DTYPES["fp32"])
    tokenizer = loading.load_tokenizer(str(base))
    loading.save_model(model, model.state_dict(), tokenizer, tmp_path / "model")
    assert seen == [(tmp_path / ".tmp-model", tmp_path / "model")]


def test_metrics_that_are_no_lines_are_dropped(tmp_path, monkeypatch):
    out = preempted(tmp_path / "run")
    lines = [
        b'{"step": 1, "loss": 3.0}',
        b"\0" * 100,
        b'{"step": 2, "lo{"step": 2, "loss": 1}',
        b'{"loss": 3.0}',
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"step": "x"}',
        b'{"step": 4}',
        b'{"step": 5}',
        b'{"step": 4, "va',
    ]
    (out / "metrics.jsonl").write_bytes(b"\n".join(lines))
    written = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: (written.append(b), replace(a, b))[1])
    with open_run("pretrain", config(out, resume=True)) as run:
        run.drop_metrics_after(4)
        assert written[-1] == out / "metrics.jsonl"
        run.log({"step": 5})
    rows = metrics(out)
    assert rows == [{"step": 1, "loss": 3.0}, {"step": 4}, {"step": 5}]


# --- resuming


@pytest.mark.parametrize("error", [ModelError("lr: 1 -> 2"), KeyboardInterrupt(), ValueError("x")])
def test_a_resume_that_did_not_begin_leaves_the_run_as_it_was(tmp_path, error):
    out = preempted(tmp_path / "run")
    before = records(out)

    def resume():
        with open_run("pretrain", config(out, resume=True)) as run:
            assert json.loads((out / "status.json").read_text())["step"] == 4
            manifest = json.loads((out / "manifest.json").read_text())
            assert (manifest["plan"], manifest["parameters"]) == ({"max_steps": 9}, 7)
            run.record(plan={"max_steps": 5}, inputs=[])
            raise error

    with pytest.raises(type(error)):
        resume()
    assert (out / "error.log").exists() == isinstance(error, ValueError)
    (out / "error.log").unlink(missing_ok=True)
    assert records(out) == before
    assert json.loads((out / "status.json").read_text())["state"] == "preempted"


def test_a_failure_is_kept_also_without_a_checkpoint(tmp_path):
    with pytest.raises(DivergedError):
        train(tmp_path, error=DivergedError("nan"))
    before = records(tmp_path)
    with pytest.raises(ModelError), open_run("pretrain", config(tmp_path, resume=True)):
        raise ModelError("no such tokenizer")
    assert records(tmp_path) == before


def test_a_resume_that_began_says_how_it_ended(tmp_path):
    out = preempted(tmp_path / "run")

    def resume():
        with open_run("pretrain", config(out, resume=True)) as run:
            run.drop_metrics_after(4)
            raise DivergedError("step 5: loss nan")

    with pytest.raises(DivergedError):
        resume()
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("diverged", 4, 7)
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["plan"], manifest["inputs"]) == ({"max_steps": 9}, [{"role": "tokens"}])


def test_what_a_finished_run_recorded_is_not_of_one_that_goes_on(tmp_path):
    with open_run("pretrain", config(tmp_path)) as run:
        run.record(result={"loss": 1.0}, plan={})
    (tmp_path / "status.json").write_text('{"state": "failed"}')
    with open_run("pretrain", config(tmp_path, resume=True)) as run:
        assert not {"result", "finished"} & set(run.manifest)
        assert {"plan", "run_id"} <= set(run.manifest)


def test_the_recipe_is_renewed_only_on_demand(tmp_path):
    out = preempted(tmp_path / "run")
    before = (out / "recipe.yaml").read_text()
    with open_run("pretrain", config(out, resume=True, lr=0.5)) as run:
        assert (out / "recipe.yaml").read_text() == before
        run.keep_recipe(config(out, resume=True, lr=0.5))
        assert "lr: 0.5" in (out / "recipe.yaml").read_text()
        assert "resume" not in (out / "recipe.yaml").read_text()


def test_a_complete_run_says_how_it_is_extended(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(log, "info", lambda text, *facts: said.append(text % facts))
    with open_run("pretrain", config(tmp_path)) as run:
        for step in (9, 20):
            (run.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
        run.record(result={"step": 20})
    before = records(tmp_path)
    finished_already("pretrain", config(tmp_path, resume=True))
    assert said.pop() == f"{tmp_path} is already complete"
    flags = {"resume": True, "resume_allow": ["max_steps"], "max_steps": 40}
    assert finished_already("pretrain", config(tmp_path, **flags)) == {"step": 20}
    place = tmp_path / "checkpoints" / "checkpoint-20"
    assert f"--resume-from {place} -o NEW --resume-allow max_steps" in said.pop()
    assert records(tmp_path) == before


@pytest.mark.parametrize("after", [5, 7])
def test_the_command_shown_resumes_what_was_changed(cli, tokens, tmp_path, monkeypatch, after):
    """Also where no checkpoint was saved since the change, and the newest is from before it."""
    from llmctl.training import fault_tolerance

    out, save, last = tmp_path / "run", fault_tolerance.save, []
    flags = ("--max-steps", 8, "--save-every", 2, "--threads", 1, "-o", out)

    def dying(job, meter):
        if job.progress.step > last[-1]:
            raise ZeroDivisionError
        save(job, meter)

    with monkeypatch.context() as patch:
        patch.setattr(fault_tolerance, "save", dying)
        for number, changes in ((4, ()), (after, ("--lr", 0.123, "--resume-allow", "lr"))):
            last.append(number)
            with pytest.raises(ZeroDivisionError):
                cli("pretrain", "--tokens", tokens, *SMALL, *flags, "--resume", *changes)
    (row,) = json.loads(cli("runs", out, "--json").out)["runs"]
    result = cli(*shlex.split(row["resume"])[1:])
    assert result.code == 0, result.err
    assert read_manifest(out)["plan"]["lr"] == 0.123


def test_a_wrong_flag_leaves_a_run_as_it_was(cli, tokens, tmp_path, monkeypatch):
    flags = ("--tokens", tokens, *SMALL, "--max-steps", 4, "--threads", 1, "-o", tmp_path / "run")
    assert cli("pretrain", *flags).code == 0
    (tmp_path / "run" / "status.json").write_text('{"state": "preempted", "step": 4}')
    before = records(tmp_path / "run")
    result = cli("pretrain", *flags, "--lr", 0.123, "--resume")
    assert result.code == 4, result.err
    assert records(tmp_path / "run") == before


# --- numbers


def test_json_holds_no_bare_nan(tmp_path):
    value = {"a": float("nan"), "b": [1.0, (float("inf"), {"c": -float("inf")})], "d": 2}
    clean = {"a": None, "b": [1.0, [None, {"c": None}]], "d": 2}
    assert finite(value) == clean
    write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail) == clean
    with open_run("pretrain", config(tmp_path / "run")) as run:
        run.log({"step": 1, "deep": [float("nan")]})
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["deep"] == [None]
