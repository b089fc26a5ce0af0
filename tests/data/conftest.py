"""Where pipes are copied to, and what is logged, for all tests of data."""

import pytest

from llmctl.console import log, say_once


@pytest.fixture
def spool(tmp_path):
    path = tmp_path / "spool"
    path.mkdir()
    return path


@pytest.fixture
def said(caplog, monkeypatch):
    """What llmctl logs, with what it says with -v."""
    monkeypatch.setattr(log, "propagate", True)
    say_once.cache_clear()
    with caplog.at_level("DEBUG", "llmctl"):
        yield caplog
