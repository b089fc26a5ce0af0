"""A crash after each operation of a save: at every instant there is a valid checkpoint.

The crash is a BaseException, so that no cleanup runs. With a power loss, what was not fsynced is
lost as well.
"""

import itertools
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from llmctl.runs import checkpoint, resume
from llmctl.runs.checkpoint import Owner
from tests.made_runs import checkpoint_content
from tests.torture.conftest import tally
from tests.torture.harness import checkpoints, unfinished
from tests.torture.plants import CRASHED, die_at_event, list_events
from tests.torture.subjects import BRIEF, LONG, LORA, SUBJECTS, every_subject

pytestmark = pytest.mark.slow
OWNER = Owner(run_id="a run", identity={"lr": 0.1, "world_size": 1})
WHOLE_RUNS = 40 if LONG else 2


class Crash(BaseException):
    """What nothing catches."""


def save(root: Path, step: int, best: int | None = None) -> None:
    """As a run that wants to keep a single checkpoint does it."""
    checkpoint.save(root, checkpoint_content(step, (40, 30), best), OWNER)
    checkpoint.rotate(root, 1, step=step, run_id=OWNER.run_id)


class Disk:
    """Notes what a power loss would take, and crashes at one operation."""

    def __init__(self, root: Path, crash_at: int) -> None:
        self.root, self.crash_at = root, crash_at
        self.seen: list[str] = []
        self.unsynced: set[int] = set()
        self.unlisted: set[int] = set()
        self.renamed: list[tuple[Path, Path]] = []

    def __call__(self, event: str, path: Path) -> None:
        self.seen.append(f"{event} {path.relative_to(self.root.parent)}")
        if event == "write":
            self.unsynced.add(path.stat().st_ino)
            self.unlisted.add(path.stat().st_ino)
        elif event == "fsync" and path.is_dir():
            self.unlisted -= {child.stat().st_ino for child in path.iterdir()}
            self.renamed = [pair for pair in self.renamed if pair[1].parent != path]
        elif event == "fsync":
            self.unsynced.discard(path.stat().st_ino)
        elif event == "rename":
            self.renamed.append((before_rename(path), path))
        if len(self.seen) == self.crash_at:
            raise Crash

    def lose_power(self, loss: str) -> None:
        """Files whose content was not synced are cut; new names that were not synced are gone."""
        for file in [p for p in self.root.rglob("*") if p.is_file()]:
            if file.stat().st_ino in self.unsynced:
                raw = file.read_bytes()
                file.write_bytes(raw[: len(raw) // 2] if loss == "half" else b"")
            if loss == "names" and file.stat().st_ino in self.unlisted:
                file.unlink()
        if loss == "names":
            for old, new in reversed(self.renamed):
                if new.exists() and not old.exists():
                    new.rename(old)


def before_rename(path: Path) -> Path:
    """The name that a checkpoint had before it got this one."""
    if path.name.startswith(checkpoint.DOOMED):
        return path.with_name(path.name.removeprefix(checkpoint.DOOMED))
    return path.with_name(checkpoint.STAGED + path.name)


def steady(root: Path) -> None:
    """Five steps saved, the last two and the best kept."""
    for step in range(1, 6):
        save(root, step, best=2 if step > 1 else None)


def damaged(root: Path) -> None:
    """As `steady`, and the checkpoint that is saved next is there, damaged."""
    steady(root)
    shutil.copytree(root / "checkpoint-5", root / "checkpoint-6")
    (root / "checkpoint-6" / "state.json").write_text("")


def fresh_best(root: Path) -> None:
    save(root, 6, best=6)


def same_best(root: Path) -> None:
    save(root, 6, best=2)


@pytest.mark.parametrize("before", [steady, damaged])
@pytest.mark.parametrize("saving", [same_best, fresh_best])
@pytest.mark.parametrize("loss", ["none", "empty", "half", "names"])
def test_at_every_instant_there_is_a_valid_checkpoint(tmp_path, monkeypatch, before, saving, loss):
    group = "crash after each write, fsync, rename, delete"
    group += "" if loss == "none" else f"; power lost ({loss})"
    before(tmp_path / "before")
    for number in itertools.count(1):
        root = tmp_path / str(number) / "checkpoints"
        shutil.copytree(tmp_path / "before", root)
        disk = Disk(root, crash_at=number)
        monkeypatch.setattr(checkpoint, "fault", disk)
        try:
            saving(root)
        except Crash:
            pass
        else:
            break
        finally:
            monkeypatch.setattr(checkpoint, "fault", lambda *_: None)
        tally(group, "save, rotate", "tried")
        if loss != "none":
            disk.lose_power(loss)
        goes_on(root, disk, {"checkpoint-6"} if before is damaged else set())
        tally(group, "save, rotate", "survived")
    assert number > 15, f"too few operations: {disk.seen}"
    assert {e.split()[0] for e in disk.seen} == {"write", "fsync", "rename", "delete"}


def goes_on(root: Path, disk: Disk, known: set[str]) -> None:
    """The newest valid checkpoint is not older than the last complete one; saving works again.

    None but the `known` ones are damaged.
    """
    after = f"after {disk.seen[-1]}"
    reasons = {p.name: resume.defect(p, OWNER.run_id) for p in checkpoint.newest_first(root)}
    assert None in reasons.values(), after
    assert {name for name, reason in reasons.items() if reason} <= known, after
    found, _ = resume.newest_valid(root, OWNER.run_id)
    assert found is not None, after
    assert checkpoint.step_of(found) in (5, 6), after
    if any(event.startswith("fsync") and event.endswith("/checkpoints") for event in disk.seen):
        assert checkpoint.step_of(found) == 6, f"{after}: a save that was through is lost"
    loaded, step = resume.load(found), checkpoint.step_of(found)
    assert torch.equal(
        loaded.model["weight"], checkpoint_content(step, (40, 30)).model["weight"]
    ), after
    checkpoint.clean(root)
    for later in (step + 1, step + 2):
        save(root, later, best=loaded.best)
    left = {p.name for p in root.iterdir()}
    wanted = {f"checkpoint-{n}" for n in (step + 1, step + 2, loaded.best)}
    assert left == wanted, after


@pytest.mark.parametrize("saving", [same_best, fresh_best])
def test_every_checkpoint_that_is_kept_can_be_resumed_from(tmp_path, saving):
    """Whatever happens to the newest: the ones behind it are not kept in vain."""
    steady(tmp_path)
    saving(tmp_path)
    (tmp_path / "checkpoint-6" / "state.json").write_text("")
    assert resume.newest_valid(tmp_path, OWNER.run_id)[0] == tmp_path / "checkpoint-5"


def test_a_crash_while_leftovers_are_removed(tmp_path, monkeypatch):
    for name in (".tmp-checkpoint-6", ".trash-checkpoint-1"):
        steady(tmp_path)
        shutil.copytree(tmp_path / "checkpoint-5", tmp_path / name)
        disk = Disk(tmp_path, crash_at=1)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "fault", disk)
            with pytest.raises(Crash):
                checkpoint.clean(tmp_path)
        assert resume.newest_valid(tmp_path, OWNER.run_id)[0] == tmp_path / "checkpoint-5"
        checkpoint.clean(tmp_path)
        assert not list(tmp_path.glob(".t*"))


@pytest.mark.parametrize(
    "subject", [*SUBJECTS, LORA, *(BRIEF if LONG else [])], ids=lambda subject: subject.name
)
def test_a_run_that_crashes_in_a_save_resumes_to_the_same_bits(
    run, reference, draw, tmp_path, subject
):
    whole, flags = reference(subject, "small"), ("--keep", 1)
    log = tmp_path / "events"
    assert (
        run(subject, "small", tmp_path / "listed", *flags, plant=partial(list_events, log)).wait()
        == 0
    )
    events = log.read_text().splitlines()
    rotating = [n for n, event in enumerate(events, 1) if ".trash-checkpoint" in event]
    assert rotating, "the run never rotated"
    chosen = {draw.choice(rotating), *draw.sample(range(1, len(events) + 1), WHOLE_RUNS)}
    for number in sorted(chosen):
        out = tmp_path / str(number)
        trial = run(subject, "small", out, *flags, plant=partial(die_at_event, number))
        assert trial.wait() == CRASHED, trial.err
        tally("crash in a save of a whole run", subject, "tried")
        had = any(e.startswith("rename checkpoints/checkpoint-") for e in events[:number])
        assert not had or checkpoints(out), events[number - 1]
        assert all(resume.defect(p) is None for p in checkpoints(out).values()), events[number - 1]
        again = run(subject, "small", out, *flags, "--resume")
        assert again.wait() == 0, again.err
        tally("crash in a save of a whole run", subject, "survived")
        assert whole.matches(out), events[number - 1]
        tally("crash in a save of a whole run", subject, "bit-identical")
        assert not unfinished(out)


@every_subject
def test_one_checkpoint_asked_for_means_two(run, tmp_path, subject):
    out = tmp_path / "run"
    assert run(subject, "small", out, "--keep", 1, "--eval-every", 12).wait() == 0
    assert list(checkpoints(out)) == [10, 12]
