"""Trackers hold what metrics.jsonl holds, also after a resume, and never end a run."""

import json
import os
import sqlite3
import struct
import subprocess
import sys

import pytest

from llmctl import errors
from llmctl.config.commands.ppo import PpoConfig
from llmctl.config.commands.pretrain import PretrainConfig
from llmctl.errors import UserError
from llmctl.runs import trackers
from tests.conftest import SMALL
from tests.run_files import metrics

TRAINING = (*SMALL, "--max-steps", 6, "--log-every", 1, "--threads", 1)


def points(run, name):
    """(step, value) of every line that has the figure."""
    return [(row["step"], row[name]) for row in metrics(run) if row.get(name) is not None]


@pytest.fixture
def homes(tmp_path, monkeypatch):
    """Where Trackio and W&B keep their runs."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_PROJECT", "WANDB_PROJECT", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def text(found, tag):
    (event,) = found.Tensors(tag)
    return json.loads(event.tensor_proto.string_val[0])


def approximately(pairs):
    return [(step, pytest.approx(value, rel=1e-6)) for step, value in pairs]


def test_tensorboard_has_every_figure_at_its_step(cli, tokens, tmp_path):
    out = tmp_path / "run"
    result = cli("pretrain", "--tokens", tokens, *TRAINING, "--report-to", "tensorboard", "-o", out)
    assert result.code == 0, result.err
    found = events(out / "tensorboard")
    for name in ("loss", "lr", "val_loss", "tokens_per_second"):
        scalars = [(scalar.step, scalar.value) for scalar in found.Scalars(name)]
        assert scalars == approximately(points(out, name)), name
    final = json.loads((out / "manifest.json").read_text())["result"]
    assert found.Scalars("final/val_loss")[0].value == pytest.approx(final["val_loss"])
    assert text(found, "recipe")["report_to"] == ["tensorboard"]
    assert text(found, "result")["best_step"] == final["best_step"]


def test_ppo_reports_alike(cli, roomy, tmp_path):
    out = tmp_path / "run"
    task = ("--data", "builtin:tasks", "--reward-rule", "length:3", "--max-new-tokens", 4)
    size = ("--batch-size", 4, "--minibatches", 1, "--ppo-epochs", 1, "--max-steps", 2)
    flags = (*task, *size, "--val-size", 2, "--threads", 1, "--report-to", "tensorboard")
    result = cli("ppo", "--model", roomy, *flags, "-o", out)
    assert result.code == 0, result.err
    found = events(out / "tensorboard")
    for name in ("score", "kl", "clip_fraction"):
        scalars = [(scalar.step, scalar.value) for scalar in found.Scalars(name)]
        assert scalars == approximately(points(out, name)), name
        assert scalars


def interrupted(tokens, out, names):
    """A run that ended after more steps than its checkpoint holds, as a kill leaves it."""
    first = [*map(str, TRAINING), "--save-every", "3", "--report-to", names, "-o", str(out)]
    killed = (
        "import os, signal, sys; from llmctl.runs.directory import Run; log = Run.log\n"
        "def until_five(self, metrics, name='metrics.jsonl'):\n"
        "    log(self, metrics, name)\n"
        "    if metrics.get('step') == 5 and name == 'metrics.jsonl':\n"
        "        import time; time.sleep(1); os.kill(os.getpid(), signal.SIGKILL)\n"
        "Run.log = until_five\n"
        f"sys.argv = ['llmctl', 'pretrain', '--tokens', {str(tokens)!r}, *{first!r}]\n"
        "from llmctl.cli import main; main()"
    )
    ran = subprocess.run([sys.executable, "-c", killed], capture_output=True, text=True)
    assert ran.returncode == -9, ran.stderr
    return first


@pytest.mark.slow
def test_a_resumed_run_goes_on_and_no_step_is_there_twice(cli, tokens, homes):
    out = homes / "run"
    first = interrupted(tokens, out, "tensorboard,trackio,wandb")
    known = json.loads((out / "manifest.json").read_text())["trackers"]
    assert [row["step"] for row in metrics(out) if "loss" in row][-1] == 5
    ran = cli("pretrain", "--tokens", tokens, *first, "--resume")
    assert ran.code == 0, ran.err
    assert ran.out == f"{out}\n", "trackers say nothing on stdout"
    then = json.loads((out / "manifest.json").read_text())["trackers"]
    for name, key in (("trackio", "run"), ("wandb", "id"), ("wandb", "project")):
        assert then[name][key] == known[name][key]

    expected = points(out, "loss")
    assert [step for step, _ in expected] == [1, 2, 3, 4, 5, 6]
    scalars = events(out / "tensorboard").Scalars("loss")
    assert [(scalar.step, scalar.value) for scalar in scalars] == approximately(expected)

    assert in_trackio(homes, then["trackio"]["run"], "loss") == expected
    (final,) = in_trackio(homes, then["trackio"]["run"], "final/val_loss")
    assert final[0] == 6
    runs = sorted((homes / "wandb").glob(f"offline-run-*-{then['wandb']['id']}"))
    assert len(runs) == 2, "the second part goes on under the same id"
    assert in_wandb(runs[1])[0] == expected
    assert in_wandb(runs[1])[1]["best_step"] is not None


def test_wandb_has_written_its_file_when_the_run_is_over(cli, tokens, homes, monkeypatch):
    """Also where its own process is slow to: it is told that a run ended, and answers nothing."""
    told = []
    connection = "wandb.sdk.lib.service.service_connection.ServiceConnection"
    monkeypatch.setattr(f"{connection}.inform_finish", lambda _, run_id: told.append(run_id))
    out = homes / "run"
    ran = cli("pretrain", "--tokens", tokens, *TRAINING, "--report-to", "wandb", "-o", out)
    assert ran.code == 0, ran.err
    known = json.loads((out / "manifest.json").read_text())["trackers"]["wandb"]
    assert told == [known["id"]]
    (folder,) = (homes / "wandb").glob(f"offline-run-*-{known['id']}")
    losses, summary = in_wandb(folder)
    assert losses == points(out, "loss")
    assert summary["best_step"] is not None


def in_trackio(homes, name, figure):
    with sqlite3.connect(homes / "trackio" / "llmctl.db") as database:
        found = database.execute(
            "select step, metrics from metrics where run_name = ? order by id", (name,)
        ).fetchall()
        (config,) = database.execute("select config from configs").fetchone()
    assert json.loads(config)["stage"] == "pretrain"
    logged = [(step, json.loads(metrics)) for step, metrics in found]
    return [(step, metrics[figure]) for step, metrics in logged if figure in metrics]


def in_wandb(folder):
    """(step, loss) of an offline run, and its summary."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    losses, summary = [], {}
    for data in chunks(file.read_bytes()):
        record = Record.FromString(data)
        items = {item.key or item.nested_key[0]: item for item in record.history.item}
        if "loss" in items:
            step = json.loads(items["_step"].value_json)
            losses.append((step, json.loads(items["loss"].value_json)))
        for item in record.summary.update:
            summary[item.key or item.nested_key[0]] = json.loads(item.value_json)
    return losses, summary


def chunks(content, block=32768):
    """Records of a file in LevelDB's log format, which W&B writes after a header of 7 bytes."""
    at, record = 7, b""
    while at + 7 <= len(content):
        if block - at % block < 7:
            at += block - at % block
            continue
        size, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the whole of it, or its last part
            yield record
            record = b""


def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(cli, tokens, tmp_path, monkeypatch):
    def broken(*_):
        def fail(*_):
            raise RuntimeError("the disk of the tracker is full")

        return trackers.Tracker("wandb", {}, fail, fail)

    monkeypatch.setattr(trackers, "_wandb", broken)
    flags = ("--report-to", "wandb", "-o", tmp_path / "run")
    result = cli("pretrain", "--tokens", tokens, *TRAINING, *flags)
    assert result.code == 0, result.err
    told = [line for line in result.err.splitlines() if "tracker" in line]
    assert told == [
        "warning: wandb failed, and the run goes on without it: the disk of the tracker is full"
    ]
    assert len(points(tmp_path / "run", "loss")) == 6


def test_a_tracker_that_would_end_the_process_does_not():
    """As W&B does where its own process ended badly."""
    assert trackers._safely("wandb", sys.exit, 1) is None


@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_a_missing_library_is_refused_before_the_start(cli, tokens, tmp_path, monkeypatch, flags):
    find = errors.find_spec
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == "trackio" else find(name))
    out = tmp_path / "run"
    result = cli("sft", "--model", "x", "--data", "y", "--report-to", "trackio", *flags, "-o", out)
    assert result.code == 5
    assert result.err == (
        "error: --report-to trackio needs trackio, which is not installed\n"
        'run: pip install "llmctl[trackio]"\n'
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["tensorboard,wandb"], ["tensorboard", "wandb"]),
        (["wandb", "wandb, trackio"], ["wandb", "trackio"]),
        ("tensorboard", ["tensorboard"]),
        (["none"], []),
        ("none", []),
    ],
)
def test_names_come_with_commas_or_one_by_one(given, names):
    for config in (PretrainConfig, PpoConfig):
        required = {} if config is PretrainConfig else {"model": "m", "data": ["d"]}
        required |= {"reward_rule": ["exact"]} if config is PpoConfig else {"tokens": "t"}
        assert config(report_to=given, **required).report_to == names


def test_an_unknown_tracker_is_a_usage_error(cli):
    result = cli("pretrain", "--tokens", "x", "--report-to", "mlflow", "-o", "y")
    assert result.code == 2
    assert result.err.startswith(
        "error: --report-to: should be 'tensorboard', 'trackio' or 'wandb', got 'mlflow'"
    )
    with pytest.raises(UserError):
        PretrainConfig.load("pretrain", None, {"tokens": "x", "report_to": "3"})


def test_events_of_a_run_that_was_replaced_are_gone(cli, tokens, tmp_path):
    out = tmp_path / "run"
    flags = ("pretrain", "--tokens", tokens, *TRAINING, "-o", out)
    assert cli(*flags, "--report-to", "tensorboard").code == 0
    before = set((out / "tensorboard").iterdir())
    result = cli(*flags, "--overwrite", "--report-to", "tensorboard")
    assert result.code == 0, result.err
    assert before.isdisjoint((out / "tensorboard").iterdir())
    assert cli(*flags, "--overwrite").code == 0
    assert not (out / "tensorboard").exists()


def test_wandb_is_offline_where_the_hub_is(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert trackers._wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert trackers._wandb_mode() == "disabled"
