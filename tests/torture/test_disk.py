"""Disks that are too small, fill up, cannot be written, or go away; files' modes and odd names."""

import shutil
import signal
from functools import partial

import pytest

from llmctl.runs.resume import defect
from tests.torture.conftest import tally
from tests.torture.harness import checkpoints, fill, mounted, stop_at, unfinished
from tests.torture.plants import count_steps, fill_disk_at_event
from tests.torture.subjects import cases, every_subject
from tests.torture.test_damage import error_of

pytestmark = pytest.mark.slow
LONGER = ("--max-steps", 40)


@every_subject
def test_too_little_space_is_said_before_any_training(run, tmp_path, subject):
    with mounted(tmp_path / "disk", "size=1m") as disk:
        steps = tmp_path / "steps"
        trial = run(subject, "small", disk / "run", plant=partial(count_steps, steps))
        assert trial.wait() == 5, trial.err
        message = error_of(trial)
        assert "no space left" in message
        assert "bytes needed" in message
        assert "bytes free" in message
        assert not steps.exists(), "it trained for nothing"
        assert not checkpoints(disk / "run")


@every_subject
@pytest.mark.parametrize("moment", ["between saves", "inside a save"])
def test_a_disk_that_fills_up_stops_the_run_and_resume_ends_in_the_same_bits(
    run, reference, tmp_path, subject, moment
):
    whole = reference(subject, "small", *LONGER)
    with mounted(tmp_path / "disk", "size=24m") as disk:
        out = disk / "run"
        plant = partial(fill_disk_at_event, 60, disk) if moment == "inside a save" else None
        trial = run(subject, "small", out, *LONGER, plant=plant)
        if moment == "between saves":
            stop_at(trial, out, 4)
            fill(disk)
            trial.send(signal.SIGCONT)
        assert trial.wait() == 5, trial.err
        tally("the disk fills up", subject, "tried")
        assert "no space left" in error_of(trial)
        assert not unfinished(out)
        left = checkpoints(out)
        assert left
        assert {p.name: defect(p) for p in left.values() if defect(p)} == {}
        (disk / "filler").unlink()
        again = run(subject, "small", out, *LONGER, "--resume")
        assert again.wait() == 0, again.err
        tally("the disk fills up", subject, "survived")
        assert whole.matches(out)
        tally("the disk fills up", subject, "bit-identical")


@every_subject
def test_a_read_only_disk_and_a_file_in_the_way(run, tmp_path, subject):
    with mounted(tmp_path / "disk", "ro") as disk:
        trial = run(subject, "small", disk / "run")
        assert trial.wait() == 3, trial.err
        assert "Read-only file system" in error_of(trial)
    (tmp_path / "file").write_text("x")
    trial = run(subject, "small", tmp_path / "file")
    assert trial.wait() == 3, trial.err
    error_of(trial)
    assert (tmp_path / "file").read_text() == "x"


@every_subject
def test_a_directory_that_is_deleted_ends_the_run(run, tmp_path, subject):
    out = tmp_path / "run"
    trial = run(subject, "small", out, *LONGER)
    stop_at(trial, out, 4)
    shutil.rmtree(out)
    trial.send(signal.SIGCONT)
    assert trial.wait(60) in (3, 5), trial.err
    error_of(trial)
    assert not out.exists(), sorted(out.rglob("*"))


@cases("name", ["späße 中文 " + "a" * 190, "a" * 200], short=["späße 中文 " + "a" * 190])
def test_odd_names(run, reference, tmp_path, subject, name):
    whole = reference(subject, "small", *LONGER)
    out = tmp_path / name
    trial = run(subject, "small", out, *LONGER)
    stop_at(trial, out, 4)
    trial.kill()
    again = run(subject, "small", out, *LONGER, "--resume")
    assert again.wait() == 0, again.err
    assert whole.matches(out)


@every_subject
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_follow_the_umask(run, tmp_path, subject, umask):
    out = tmp_path / "run"
    assert run(subject, "small", out, umask=umask).wait() == 0
    for path in (out, *out.rglob("*")):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert path.stat().st_mode & 0o777 == wanted, path
