"""What tests of PPO share."""

from pathlib import Path

import pytest

from tests.conftest import SUBJECTS, VERBS
from tests.run_files import write_rows


@pytest.fixture(scope="session")
def prompts(tmp_path_factory) -> Path:
    """Beginnings of the corpus's sentences, as rows."""
    texts = [f"{subject} {verb}" for subject in SUBJECTS for verb in VERBS]
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    return write_rows(path, ({"prompt": text} for text in texts))
