"""Plain texts among what `--data` names: each file is a document, read at once.

In: names of files, folders, Hub ids. Out: the texts, and the names of what holds rows instead.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmctl.data.readers import read_pieces
from llmctl.data.sources import Source, find_sources
from llmctl.errors import DataError
from llmctl.files import sha256_file


def read_texts(data: Sequence[str], most: int) -> tuple[list[str], list[str], list[dict[str, Any]]]:
    """The documents of plain text files.

    Args:
        data: what `--data` names.
        most: characters of each file after which no more is read.

    Returns:
        The documents, the names that are not plain text, and inputs for the manifest.

    Raises:
        DataError: a file that is missing, not UTF-8, or holds nothing but white space.
    """
    texts: list[str] = []
    rows: list[str] = []
    inputs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="llmctl-") as spool:
        for name in data:
            sources = find_sources([name], Path(spool))
            if any(source.kind != "text" for source in sources):
                rows.append(name)
                continue
            for source in sources:
                assert source.path is not None
                text = _opening(source, most)
                if not text.strip():
                    raise DataError("an empty file: there is no text in it", file=source.name)
                texts.append(text)
                digest = sha256_file(source.path)
                inputs.append({"role": "data", "path": source.name, "sha256": digest})
    return texts, rows, inputs


def _opening(source: Source, most: int) -> str:
    text = ""
    for piece in read_pieces(source, "text"):
        text += piece.text
        if len(text) >= most:
            break
    return text[:most]
