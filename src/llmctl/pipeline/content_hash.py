"""Hash all that decides a stage's result, which is its content address.

That is its resolved recipe, the addresses of the stages it reads, the contents of what else it
reads, and the code of llmctl. Hub ids and built-in data count by name.
"""

import json
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from llmctl import __version__
from llmctl.data.sources import split_weight
from llmctl.files import sha256_file, sha256_folder
from llmctl.pipeline.references import Stage
from llmctl.runs.directory import read_manifest

CODE = Path(__file__).parents[1]
RULE = "python:"


def content_hash(stage: Stage, addresses: Mapping[str, str]) -> str:
    """Return the address of a stage, from those of the stages it reads."""
    values = stage.config.recipe(stage.stage)
    recipe = {k: v for k, v in values.items() if k not in stage.references}
    parts = {
        "recipe": recipe,
        "read": {
            field: [_spelling_and_address(text, stage, addresses) for text in texts]
            for field, texts in stage.references.items()
        },
        "code": code_hash(),
    }
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@cache
def code_hash() -> str:
    """Hash version and sources of llmctl."""
    digest = sha256(__version__.encode())
    for path in sorted(CODE.rglob("*")):
        if path.suffix in (".py", ".jinja"):
            digest.update(f"{path.relative_to(CODE)}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def content(text: str) -> str:
    """Hash the content of something that is no stage; return the name where there is none."""
    if text.startswith(RULE):
        return _module_hash(text.removeprefix(RULE).partition(".")[0]) or text
    stem, _ = split_weight(text)
    path = Path(stem).expanduser()
    if path.is_file():
        return sha256_file(path)
    if path.is_dir():
        outputs = read_manifest(path).get("outputs")
        return _hash(outputs) if outputs else sha256_folder(path)
    if any(sign in stem for sign in "*?["):
        root = Path(path.anchor)
        files = sorted(p for p in root.glob(str(path.relative_to(root))) if p.is_file())
        return _hash([[str(p), sha256_file(p)] for p in files])
    return stem


def _spelling_and_address(text: str, stage: Stage, addresses: Mapping[str, str]) -> list[str]:
    """Return the part of a reference that counts as it is written, and the content behind it.

    Of a stage these are the weight and its address, of anything else the name and a hash.
    """
    stem, weight = split_weight(text)
    return [weight, addresses[stem]] if stem in stage.inputs else [text, content(text)]


def _module_hash(module: str) -> str | None:
    """Hash a user's module in the working directory; None where there is none."""
    file, folder = Path(f"{module}.py"), Path(module)
    if file.is_file():
        return sha256_file(file)
    return sha256_folder(folder) if folder.is_dir() else None


def _hash(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
