"""Chat templates by name or file, and the special tokens that they need.

In: the value of `--chat-template`, and a tokenizer. Out: the tokenizer with its chat template set,
and the names of the tokens that were added to it, for which a model needs embeddings.
"""

import difflib
import re
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from llmctl.data.chat.sandbox import CHATML_TEMPLATE, TEMPLATE_SIZE
from llmctl.errors import DataError, ModelError, UserError

EOS = "</s>"
"""EOS token of a tokenizer that had none."""

_FOLDER = Path(__file__).with_name("chat_templates")

TEMPLATES = {
    "chatml": CHATML_TEMPLATE,
    **{file.stem: file.read_text(encoding="utf-8") for file in sorted(_FOLDER.glob("*.jinja"))},
}
"""Conversation formats of well-known models; the jinja is llmctl's own."""


def ending_at_turn(template: str, after: str) -> str:
    """Rewrite a template so that it leaves out `after` at the end of a whole conversation.

    The text is captured and shortened, whatever the template is made of. Markers of what the
    assistant wrote become blocks without a meaning: in a captured text they have no place.
    """
    body = re.sub(r"(\r\n|\r|\n)\Z", "", template)  # which jinja leaves out
    body = re.sub(r"\{%([-+]?)\s*generation\b", r"{%\1 if true", body)
    body = re.sub(r"\{%([-+]?)\s*endgeneration\b", r"{%\1 endif", body)
    text = "conversation_text"
    return (
        f"{{% set {text} +%}}{body}{{%+ endset %}}"
        f"{{%- if not add_generation_prompt and {text}.endswith({after!r}) %}}"
        f"{{{{- {text}[:-{len(after)}] }}}}"
        f"{{%- else %}}{{{{- {text} }}}}{{%- endif %}}"
    )


TRUSTED = frozenset(
    [
        *TEMPLATES.values(),
        *(ending_at_turn(text, after) for text in TEMPLATES.values() for after in ("\n", "\n\n")),
    ]
)
"""Templates of llmctl's, also as reward models have them."""

TEMPLATE_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "phi-3": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
}
"""Special tokens that templates write by name; the others end turns with `eos_token`."""


def set_chat_template(tokenizer: PreTrainedTokenizerBase, choice: str | None) -> list[str]:
    """Set the chat template of this name or file, else keep the tokenizer's own, else set ChatML.

    Returns:
        The special tokens added to it: those that a named template writes and it lacked. Those of
        a template from a file are not guessed.

    Raises:
        UserError: neither a name nor a file.
        DataError: a file that cannot be read.
        ModelError: a template too long to be one.
    """
    if choice is None and tokenizer.chat_template is not None:
        return []
    name = "chatml" if choice is None else choice
    tokenizer.chat_template = read_template(name)
    if name not in TEMPLATES:
        return []
    added = []
    if "eos_token" in tokenizer.chat_template and tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": EOS})
        added.append(EOS)
    known = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    missing = [token for token in TEMPLATE_TOKENS.get(name, ()) if token not in known]
    if missing:
        tokenizer.add_special_tokens(
            {"extra_special_tokens": missing}, replace_extra_special_tokens=False
        )
    return added + missing


def read_template(choice: str) -> str:
    """Read the jinja text of a named template, or of a file.

    Raises:
        UserError: neither a name nor a file.
        DataError: the file cannot be read, or is not UTF-8.
        ModelError: it is too long.
    """
    if choice in TEMPLATES:
        return TEMPLATES[choice]
    file = Path(choice)
    try:
        with file.open("rb") as stream:
            content = stream.read(4 * TEMPLATE_SIZE + 1)
        text = content.decode()
    except FileNotFoundError:
        close = difflib.get_close_matches(choice.lower(), TEMPLATES, n=1)
        raise UserError(
            f"--chat-template {choice}: neither a file nor the name of a template",
            hint=f"did you mean {close[0]}?" if close else f"names are {', '.join(TEMPLATES)}",
        ) from None
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror}", file=file) from None
    except UnicodeDecodeError as error:
        if len(content) > TEMPLATE_SIZE:
            raise _too_long(file) from None
        raise DataError(
            f"not UTF-8 at byte {error.start}", file=file, hint="a chat template is jinja text"
        ) from None
    if len(text) > TEMPLATE_SIZE:
        raise _too_long(file)
    return text


def _too_long(file: Path) -> ModelError:
    return ModelError(f"the chat template is larger than {TEMPLATE_SIZE:,} characters", file=file)
