"""Config of `rank`."""

import unicodedata
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, Field, model_validator

from llmctl.config.base import Also, Flag, Input
from llmctl.config.sections import Control, Loading, Sampling, StageConfig

MOST_RESPONSES = 9
"""One for each number key."""


def normal_name(text: str) -> str:
    """Return a person's name as it is compared and written: composed (NFC), nothing around it."""
    return unicodedata.normalize("NFC", text).strip()


class RankConfig(Loading, Sampling, StageConfig):
    """Collect rankings of responses from a person."""

    makes: ClassVar = ("data",)

    model: Annotated[str | None, Also("model-name-or-path", "base-model"), Input("model")] = None  # type: ignore[assignment]
    """Model that writes the responses: a run, folder or Hub id. Rows with responses need none."""

    data: Annotated[Path, Also("prompts-file", "prompts", "dataset"), Input("data")]
    """File of prompts: one per line of txt, or `prompt` (or `messages`) of each line of jsonl.
    Rows that carry `responses` are asked as they are."""

    out: Annotated[Path | None, Flag("--out", "-o"), Also("output", "output-file"), Control] = None
    """File of answers (required): a row of jsonl is appended for each; what it holds stays."""

    responses: Annotated[
        int, Field(ge=2, le=MOST_RESPONSES), Also("num-samples", "num-return-sequences")
    ] = 4
    """Responses that the model writes to a prompt."""

    chat: bool | None = None
    """Put text prompts in the model's chat template; by default where it has one."""

    annotator: Annotated[str, AfterValidator(normal_name)] | None = None
    """Name of the person who ranks; by default the user's."""

    terminal: bool = False
    """Ask in the terminal, not on a page in the browser."""

    port: Annotated[int, Field(ge=0, lt=2**16)] = 0
    """Port of the page on 127.0.0.1; 0 takes a free one."""

    browser: Annotated[bool | None, Also("open")] = None
    """Open the page in the browser; by default on a terminal of a desktop."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.overwrite:
            raise ValueError("answers of people are not replaced: choose another --out")
        if self.annotator is not None and not is_name(self.annotator):
            raise ValueError(f"--annotator: expected a name, got {self.annotator!r}")
        if self.terminal:
            self.refuse(("port", "browser"), "{} does not go with --terminal")
        return self


def is_name(text: str) -> bool:
    """Whether a text can name a person: printable, and not blank."""
    return text.isprintable() and bool(text.strip()) and len(text) <= 100
