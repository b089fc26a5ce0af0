"""Text that every Python carries: the language's help topics and its library's docstrings."""

import ast
import sysconfig
import warnings
from functools import cache
from pathlib import Path

SHORTEST = 200
"""Characters; a shorter document teaches little."""

NOT_PROSE = {"__pycache__", "ensurepip", "idlelib", "lib2to3", "site-packages", "test", "tests"}


@cache
def python_docs() -> tuple[str, ...]:
    """Help topics by name, then a document of docstrings per module, none of them imported."""
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if not NOT_PROSE & {*p.relative_to(root).parts})
    documents = [topics[name] for name in sorted(topics)] + [_docstrings(path) for path in files]
    return tuple(text for text in documents if len(text) >= SHORTEST)


def _docstrings(path: Path) -> str:
    """A module's docstrings, outermost first, with a blank line after each."""
    with warnings.catch_warnings(action="ignore"):
        tree = ast.parse(path.read_bytes())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return "".join(f"{text}\n\n" for text in found if text)
