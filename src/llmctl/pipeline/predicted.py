"""What a stage's result will be like, from its config and from what it starts from.

None stands for what is not known before the stage has run; nothing is refused for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from llmctl.config.commands import GenerateConfig, PretrainConfig, TokenizeConfig
from llmctl.errors import DataError, ModelError, UserError
from llmctl.models import presets
from llmctl.models.loading import context_size, load_config, load_tokenizer
from llmctl.pipeline.references import Stage

BYTES = 256
VOCABULARY = 8192
"""Where a tokenizer chooses its size by the corpus: about what it comes to."""


@dataclass(frozen=True)
class Foretold:
    """What can be said of a tokenizer or a model."""

    tokenizer: str | None = None
    """The stage or the reference that it is from."""
    vocab_size: int | None = None
    shape: PreTrainedConfig | None = None
    """The model's configuration."""
    has_template: bool | None = None
    """Whether it can hold a conversation."""

    @property
    def context(self) -> int | None:
        """Positions of the model."""
        return None if self.shape is None else context_size(self.shape)


def foretell(stage: Stage, known: Mapping[str, Foretold]) -> Foretold:
    """What a stage will make."""
    config = stage.config
    match config:
        case TokenizeConfig():
            if config.tokenizer is not None:
                return _of(stage, "tokenizer", known)
            size = BYTES if config.algorithm == "byte" else config.vocab_size
            return Foretold(tokenizer=stage.name, vocab_size=size, has_template=False)
        case PretrainConfig() if config.model is None:
            return _untrained(stage, config, known)
        case _ if "model" in stage.spelled:
            made = type(config).makes
            base = _of(stage, "model", known)
            chats = base.has_template if stage.stage in ("pretrain", "merge") else None
            return replace(base, has_template=chats) if made else Foretold()
    return Foretold()


def trained(stage: Stage, known: Mapping[str, Foretold]) -> Foretold:
    """What a stage trains: the model it is given, or the one it makes."""
    return _of(stage, "model", known) if "model" in stage.spelled else known[stage.name]


def require_fitting(stage: Stage, known: Mapping[str, Foretold]) -> None:
    """Refuse what does not go with the models and tokenizers that the stage gets.

    Raises:
        DataError: tokens of another tokenizer than the model's.
        ModelError: a conversation with a model that will have no chat template.
        UserError: more tokens than the model has positions.
    """
    config, base = stage.config, _of(stage, "model", known)
    values = dict(config)
    for name in ("max_length", "context", "max_new_tokens"):
        wanted, most = values.get(name), base.context
        reserved = 1 if name == "max_new_tokens" else 0
        if wanted is not None and most is not None and wanted + reserved > most:
            if name == "max_new_tokens" and "max_new_tokens" not in config.given():
                continue  # commands bound their default themselves
            raise UserError(
                f"{config.flag(name)} {wanted:,}: `{values['model']}` has {most:,} positions",
                file=stage.file,
                line=stage.line,
            )
    if isinstance(config, GenerateConfig) and config.chat and base.has_template is False:
        raise ModelError(
            f"`{values['model']}` will have no chat template",
            file=stage.file,
            line=stage.line,
            hint="fine-tune it with a stage `sft` first, or drop what needs conversations",
        )
    if isinstance(config, PretrainConfig) and config.model and config.tokens:
        tokens = _of(stage, "tokens", known)
        if None not in (tokens.tokenizer, base.tokenizer) and tokens.tokenizer != base.tokenizer:
            raise DataError(
                "these tokens are of another tokenizer than the model's",
                file=stage.file,
                line=stage.line,
                hint="give the stage that makes them `tokenizer`: the one of the model",
            )


def _untrained(stage: Stage, config: PretrainConfig, known: Mapping[str, Foretold]) -> Foretold:
    """A model from scratch: of the preset or the dials that the config names."""
    made_by = _of(stage, "tokens" if config.tokens else "tokenizer", known)
    made_by = replace(made_by, has_template=False)
    if names := stage.needs.get("config_from"):
        return replace(made_by, shape=known[names[0]].shape)
    if config.size is None and config.config_from is None and config.layers is None:
        return made_by  # the corpus will say
    vocabulary = made_by.vocab_size or VOCABULARY
    return replace(
        made_by, shape=presets.new_config(config, config.size or "nano", vocabulary, None)
    )


def _of(stage: Stage, field: str, known: Mapping[str, Foretold]) -> Foretold:
    """What a field's stage will make, or what stands outside."""
    if names := stage.needs.get(field):
        return known.get(names[0]) or _outside(str(stage.out.parent / names[0]))
    named = stage.outside.get(field)
    return _outside(named[0]) if named else Foretold()


def _outside(reference: str) -> Foretold:
    """What a run or folder is; nothing of what is not on this machine."""
    folder = Path(reference).expanduser()
    if not folder.is_dir() or (folder / "tokenizer").is_dir():
        return Foretold(tokenizer=reference)
    tokenizer: Any = load_tokenizer(reference)
    has_template = tokenizer.chat_template is not None
    return Foretold(reference, len(tokenizer), load_config(reference), has_template)
