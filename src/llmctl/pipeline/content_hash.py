"""The content address of a stage: what decides its result in, one hash out.

Its resolved recipe, the addresses of the stages it reads, the contents of what else it reads, and
the code of llmctl. Hub ids and built-in data count by name.
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


def address_of(stage: Stage, addresses: Mapping[str, str]) -> str:
    """The address of a stage.

    Args:
        stage: its config says what it does.
        addresses: of the stages it reads.
    """
    read = {*stage.needs, *stage.outside}
    recipe = {k: v for k, v in stage.config.recipe(stage.stage).items() if k not in read}
    facts = {
        "recipe": recipe,
        "read": {
            field: [[_name(text, stage), _of(text, stage, addresses)] for text in stage.read(field)]
            for field in sorted(read)
        },
        "code": code_version(),
    }
    return sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


@cache
def code_version() -> str:
    """Version and sources of llmctl."""
    digest = sha256(__version__.encode())
    for path in sorted(CODE.rglob("*")):
        if path.suffix in (".py", ".jinja"):
            digest.update(f"{path.relative_to(CODE)}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def content(text: str) -> str:
    """What tells a thing that is no stage from another: the hash of its content, else its name."""
    if text.startswith(RULE):
        return _code_of(text.removeprefix(RULE).partition(".")[0]) or text
    stem, _ = split_weight(text)
    path = Path(stem).expanduser()
    if path.is_file():
        return sha256_file(path)
    if path.is_dir():
        outputs = read_manifest(path).get("outputs")
        return _hash(outputs) if outputs else sha256_folder(path)
    if any(sign in stem for sign in "*?["):
        root = Path(path.anchor)
        found = sorted(p for p in root.glob(str(path.relative_to(root))) if p.is_file())
        return _hash([[str(p), sha256_file(p)] for p in found])
    return stem


def _of(text: str, stage: Stage, addresses: Mapping[str, str]) -> str:
    """The address of a stage, the content of anything else."""
    stem, _ = split_weight(text)
    return addresses[stem] if stem in stage.inputs else content(text)


def _name(text: str, stage: Stage) -> str:
    """How it is spelled, where that can matter: a weight, or the name of a file."""
    stem, weight = split_weight(text)
    return weight if stem in stage.inputs else text


def _code_of(module: str) -> str | None:
    """Hash of a user's module in the working directory."""
    file, folder = Path(f"{module}.py"), Path(module)
    if file.is_file():
        return sha256_file(file)
    return sha256_folder(folder) if folder.is_dir() else None


def _hash(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
