"""Load a tokenizer to encode documents with.

In: a run, a folder or a Hub id. Out: a `tokenizers.Tokenizer` and the ids that frame a document. A
plain `tokenizers` folder is loaded without transformers, which takes seconds to import; any other
goes through AutoTokenizer.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llmctl.errors import ModelError
from llmctl.files import FETCH_LFS, is_lfs_pointer
from llmctl.models import hub
from llmctl.models.tokenizer_file import PLAIN_CLASSES, read_tokenizer, switch_off_dropout
from llmctl.runs.directory import resolve_tokenizer

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)
PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and the ids that frame documents."""

    tokenizer: Tokenizer
    """Encodes a text that spells a special token as ordinary text."""

    eos: int
    """Ends every document."""

    bos: int | None
    unknown: int | None

    prefix: tuple[int, ...]
    """Ids that the tokenizer puts before every text, such as bos."""

    @property
    def frame(self) -> tuple[int, ...]:
        """Ids that stand around every document."""
        return (*self.prefix, self.eos)

    @property
    def size(self) -> int:
        """Number of ids: one more than the largest."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def vocabulary_of(
    tokenizer: Tokenizer, *, eos: str | None, bos: str | None = None, unknown: str | None = None
) -> Vocabulary:
    """Prepare a tokenizer to encode documents; raise a ModelError without a token to end them."""
    end = None if eos is None else tokenizer.token_to_id(eos)
    if end is None:
        raise ModelError(
            "the tokenizer has no eos token, which ends every document",
            hint="set `eos_token` in its tokenizer_config.json",
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    added = tokenizer.encode("").ids
    return Vocabulary(
        tokenizer,
        eos=end,
        bos=None if bos is None else tokenizer.token_to_id(bos),
        unknown=None if unknown is None else tokenizer.token_to_id(unknown),
        prefix=tuple(added[:-1] if added[-1:] == [end] else added),
    )


def load_vocabulary(reference: str) -> tuple[Vocabulary, Callable[[Path], None]]:
    """Load a tokenizer from a run, a folder or the Hub, and a function that saves it elsewhere.

    Raises:
        ModelError: there is no tokenizer, or not one that can be used.
        NetworkError: the Hub is needed and cannot be reached.
    """
    folder = Path(resolve_tokenizer(reference))
    if not folder.is_dir():
        if reference.startswith((".", "/", "~")) or not hub.is_hub_id(reference):
            raise ModelError("no such tokenizer folder", file=reference)
        folder = hub.download(reference, PATTERNS, missing=ModelError)
    config = _read_config(folder)
    is_plain = config.get("tokenizer_class") in PLAIN_CLASSES
    if not is_plain or not (folder / "tokenizer.json").is_file():
        return _load_through_transformers(folder)
    if is_lfs_pointer(folder / "tokenizer.json"):
        what = "a pointer of git-lfs, not the file itself"
        raise ModelError(what, file=folder / "tokenizer.json", hint=FETCH_LFS)
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    is_changed = switch_off_dropout(tokenizer, folder)
    names = {role: _token_text(config.get(f"{role}_token")) for role in ("eos", "bos", "unk")}
    vocabulary = vocabulary_of(tokenizer, eos=names["eos"], bos=names["bos"], unknown=names["unk"])

    def save(target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
        if is_changed:
            tokenizer.save(str(target / "tokenizer.json"))

    return vocabulary, save


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        file = folder / "tokenizer_config.json"
        raise ModelError(f"cannot be read: {error}", file=file) from None
    return config if isinstance(config, dict) else {}


def _token_text(token: Any) -> str | None:
    """A token's text; old configs wrap it in an object."""
    text = token["content"] if isinstance(token, dict) else token
    return None if text is None else str(text)


def _load_through_transformers(folder: Path) -> tuple[Vocabulary, Callable[[Path], None]]:
    from llmctl.models.loading import load_tokenizer  # transformers

    loaded: Any = load_tokenizer(str(folder))
    if not loaded.is_fast:
        raise ModelError(
            f"{type(loaded).__name__} has no `tokenizers` form, which encoding needs", file=folder
        )
    vocabulary = vocabulary_of(
        Tokenizer.from_str(loaded.backend_tokenizer.to_str()),
        eos=loaded.eos_token,
        bos=loaded.bos_token,
        unknown=loaded.unk_token,
    )

    def save(target: Path) -> None:
        loaded.save_pretrained(str(target))

    return vocabulary, save
