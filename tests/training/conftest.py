"""Inputs of every objective, made once, and runs of them."""

from pathlib import Path
from typing import Any

import pytest

from tests.training.objectives import RECORDER, Objective, Whole, documents, keep_gradients, ranked


@pytest.fixture(scope="session")
def inputs(cli, tmp_path_factory) -> Path:
    """Models and data of all objectives."""
    folder = tmp_path_factory.mktemp("objectives")
    RECORDER.prepare(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RECORDER, "LAYERS", 1)
        RECORDER.write_model(folder / "llama-1", "llama")
    RECORDER.write_rows(folder / "ranked.jsonl", ranked())
    RECORDER.write_rows(folder / "documents.jsonl", documents())
    data = ("--data", folder / "documents.jsonl", "--val-fraction", 0.2)
    made = cli("tokenize", "--tokenizer", folder / "llama", *data, "-o", folder / "tokens")
    assert made.code == 0, made.err
    return folder


@pytest.fixture
def train(cli, inputs):
    """Run an objective: `train(objective, out, "--resume")` -> code, stdout, stderr."""

    def run(objective: Objective, out: Path, *flags: object) -> Any:
        return cli(*objective.arguments(inputs, out, *flags))

    return run


@pytest.fixture(scope="session")
def whole(cli, inputs, tmp_path_factory):
    """Give the undisturbed run of an objective, trained once: `whole(objective)`."""
    made: dict[str, Whole] = {}
    folder = tmp_path_factory.mktemp("whole")

    def get(objective: Objective) -> Whole:
        if objective.name not in made:
            run = Whole(folder / objective.name)
            with pytest.MonkeyPatch.context() as patch:
                keep_gradients(patch, run.gradients)
                result = cli(*objective.arguments(inputs, run.out))
            assert result.code == 0, result.err
            made[objective.name] = run
        return made[objective.name]

    return get
