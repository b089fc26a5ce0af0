"""What the site needs beyond the pages: the README as its first page, and links that stay inside.

Pages are written to be read in the repository as well, where they may point to files outside docs/.
"""

import re
from pathlib import Path
from posixpath import normpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}
"""Page of the site -> file of the repository."""
INLINE_LINK = re.compile(r"\[([^\]]+)\]\(([^)#:\s]+)(#[^)]*)?\)")
COMMANDS, GUIDES = "Commands", "Guides"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put a page for each command, and pages that no one listed, into the navigation."""
    sections = {name: part for entry in config.nav or [] for name, part in entry.items()}
    listed = {page for part in sections.values() for page in _pages(part)}
    docs = Path(config.docs_dir)
    sections[COMMANDS] += [f"commands/{p.name}" for p in sorted((docs / "commands").glob("*.md"))]
    sections[GUIDES] += [p.name for p in sorted(docs.glob("*.md")) if p.name not in listed]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside of docs/."""
    for page, file in OUTSIDE.items():
        text = (ROOT / file).read_text()
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to other files of the repository into pages of the site, or into their text."""
    outside = OUTSIDE.get(page.file.src_uri)
    here = Path("." if outside else f"docs/{page.file.src_uri}").parent

    def mend(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        place = normpath(f"{'.' if outside else here.as_posix()}/{target}")
        page_of = {file: name for name, file in OUTSIDE.items()}
        if place.startswith("docs/"):
            return f"[{text}]({place.removeprefix('docs/')}{anchor})" if outside else match[0]
        if place in page_of:
            return f"[{text}]({page_of[place]}{anchor})"
        return f"`{text}`" if "`" not in text else text

    return INLINE_LINK.sub(mend, markdown)


def _pages(part: Any) -> list[str]:
    """The pages under a section, however deep."""
    if isinstance(part, str):
        return [part]
    if isinstance(part, dict):
        return [page for inner in part.values() for page in _pages(inner)]
    return [page for inner in part for page in _pages(inner)]
