"""The site builds strictly, leads to every page, and loads nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmctl.cli import COMMANDS

ROOT = Path(__file__).parents[1]
LOADED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=[\"']?(https?:)?//[^>]*>")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return build(ROOT / "mkdocs.yml", tmp_path_factory.mktemp("site"))


def build(settings, out, *, fails=False):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", settings, "-d", out]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=quiet)
    assert (ran.returncode != 0) == fails, ran.stderr
    return ran.stderr if fails else out


def test_every_page_and_every_command_is_there(site):
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    for name in (*pages, *(f"commands/{command}" for command in COMMANDS)):
        assert (site / name / "index.html").is_file(), name
        link = name.removeprefix("commands/")
        assert re.search(rf'href="(?:\.\./)*(?:{name}|{link})/"', first(site)), name


def first(site):
    return (site / "index.html").read_text()


def test_the_first_page_is_the_readme_with_links_that_stay_inside(site):
    assert "Three promises" in first(site)
    assert 'href="guide/"' in first(site)
    assert 'href="changelog/"' in first(site)
    assert "docs/" not in re.findall(r'href="([^"]*)"', first(site))
    guide = (site / "guide" / "index.html").read_text()
    assert "../recipes" not in guide


def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.rglob("*.html"):
        assert not LOADED.search(page.read_text()), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", sheet.read_text()), sheet


def test_hooks_are_not_published(site):
    assert not list(site.rglob("*.py"))


def test_a_dead_link_or_anchor_fails_the_build(tmp_path):
    docs = tmp_path / "docs"
    (docs / "commands").mkdir(parents=True)
    settings = (ROOT / "mkdocs.yml").read_text()
    settings = settings[: settings.index("\nnav:") + 1] + (
        "nav:\n  - Guides: [index.md, page.md]\n  - Commands: []\n  - Changelog: changelog.md\n"
    )
    settings = settings.replace("docs/hooks.py", str(ROOT / "docs" / "hooks.py"))
    (tmp_path / "mkdocs.yml").write_text(settings)
    for name in re.findall(r"\]\(docs/([^)]+)\)", (ROOT / "README.md").read_text()):
        (docs / name).write_text("# A page\n")
    for link in ("[gone](nowhere.md)", "[gone](index.md#nowhere)"):
        (docs / "page.md").write_text(f"# A page\n\n{link}\n")
        told = build(tmp_path / "mkdocs.yml", tmp_path / "out", fails=True)
        assert "nowhere" in told
    (docs / "page.md").write_text("# A page\n\n[here](index.md)\n")
    build(tmp_path / "mkdocs.yml", tmp_path / "out")
