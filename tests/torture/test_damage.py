"""Every file of the newest checkpoint, damaged in every way: told by name, same final weights."""

import random

import pytest

from llmctl.files import sha256_file
from tests.torture.conftest import SEED, tally
from tests.torture.harness import checkpoints
from tests.torture.subjects import LONG, cases, every_subject

pytestmark = pytest.mark.slow
FILES = (
    "model.safetensors",
    "optimizer.safetensors",
    "rng-0.safetensors",
    "state.json",
    "manifest.json",
)
DAMAGES = {
    "flip": lambda raw: (
        raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :]
    ),
    "halve": lambda raw: raw[: len(raw) // 2],
    "zero": lambda raw: bytes(len(raw)),
    "empty": lambda raw: b"",
    "delete": None,
}
MATRIX = [(name, damage) for name in FILES for damage in DAMAGES]
if not LONG:  # each file once, each kind of damage once
    MATRIX = list(zip(FILES, random.Random(SEED).sample(list(DAMAGES), len(FILES)), strict=True))
GROUP = "a file of the newest checkpoint damaged"


def spoil(path, damage):
    change = DAMAGES[damage]
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))


def tree(folder):
    return {str(p.relative_to(folder)): sha256_file(p) for p in folder.rglob("*") if p.is_file()}


@every_subject
@pytest.mark.parametrize(("name", "damage"), MATRIX)
def test_a_damaged_file_is_named_and_the_run_falls_back(
    run, reference, copy_of, subject, name, damage
):
    whole = reference(subject, "small")
    out = copy_of(whole.path)
    newest = list(checkpoints(out).values())[-1]
    spoil(newest / name, damage)
    tally(GROUP, subject, "tried")
    explicit = run(subject, "small", out, "--resume-from", newest)
    assert explicit.wait() == 4, explicit.err
    assert name in error_of(explicit)
    again = run(subject, "small", out, "--resume")
    assert again.wait() == 0, again.err
    told = [line for line in again.err.splitlines() if newest.name in line and name in line]
    assert told, again.err
    tally(GROUP, subject, "survived")
    assert whole.matches(out)
    tally(GROUP, subject, "bit-identical")


@cases("number", range(25), short=range(1))
def test_any_bit_of_the_manifest_matters(run, reference, copy_of, draw, subject, number):
    """What vouches for the other files is itself vouched for."""
    group = "a random bit of the newest manifest flipped"
    whole = reference(subject, "small")
    out = copy_of(whole.path)
    newest = list(checkpoints(out).values())[-1]
    raw = bytearray((newest / "manifest.json").read_bytes())
    raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    (newest / "manifest.json").write_bytes(raw)
    tally(group, subject, "tried")
    again = run(subject, "small", out, "--resume")
    assert again.wait() == 0, again.err
    assert "manifest.json" in again.err
    tally(group, subject, "survived")
    assert whole.matches(out)
    tally(group, subject, "bit-identical")


@every_subject
def test_all_damaged_is_an_error_with_the_reasons_and_deletes_nothing(
    run, reference, copy_of, subject
):
    out = copy_of(reference(subject, "small").path)
    damages = {}
    for path, name, damage in zip(checkpoints(out).values(), FILES, DAMAGES, strict=False):
        spoil(path / name, damage)
        damages[path.name] = name
    assert len(damages) == len(checkpoints(out))
    before = tree(out / "checkpoints")
    trial = run(subject, "small", out, "--resume")
    assert trial.wait() == 4, trial.err
    for path, name in damages.items():
        assert any(path in line and name in line for line in trial.err.splitlines()), trial.err
    assert tree(out / "checkpoints") == before
    assert not (out / "model").exists()


def error_of(trial):
    """The last error on stderr: one to three lines, and no traceback."""
    assert "Traceback" not in trial.err, trial.err
    text = trial.err[trial.err.index("error:") :]
    assert len(text.strip().splitlines()) <= 3, text
    return text
