"""Predict a stage's model or tokenizer, from its config and from what it starts from.

None stands for what is not known before the stage has run; nothing is refused for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from llmctl.config.commands.generate import GenerateConfig
from llmctl.config.commands.pretrain import PretrainConfig
from llmctl.config.commands.tokenize import TokenizeConfig
from llmctl.errors import DataError, ModelError, UserError
from llmctl.models import presets
from llmctl.models.loading import context_size, load_config, load_tokenizer
from llmctl.pipeline.references import Stage

BYTES = 256
VOCABULARY = 8192
"""Estimate where a tokenizer chooses its size by the corpus."""


@dataclass(frozen=True)
class PredictedModel:
    """The known properties of a tokenizer or a model."""

    tokenizer: str | None = None
    """The stage or the reference that it comes from."""
    vocab_size: int | None = None
    shape: PreTrainedConfig | None = None
    """The model's configuration."""
    has_template: bool | None = None
    """Whether it can hold a conversation."""

    @property
    def context(self) -> int | None:
        """Positions of the model."""
        return None if self.shape is None else context_size(self.shape)


def predict(stage: Stage, known: Mapping[str, PredictedModel]) -> PredictedModel:
    """Predict the result of a stage."""
    config = stage.config
    match config:
        case TokenizeConfig():
            if config.tokenizer is not None:
                return _model_of(stage, "tokenizer", known)
            size = BYTES if config.algorithm == "byte" else config.vocab_size
            return PredictedModel(tokenizer=stage.name, vocab_size=size, has_template=False)
        case PretrainConfig() if config.model is None:
            return _new_model(stage, config, known)
        case _ if "model" in stage.references:
            made = type(config).makes
            base = _model_of(stage, "model", known)
            chats = base.has_template if stage.stage in ("pretrain", "merge") else None
            return replace(base, has_template=chats) if made else PredictedModel()
    return PredictedModel()


def trained_model(stage: Stage, known: Mapping[str, PredictedModel]) -> PredictedModel:
    """Return the model that a stage trains: the one it is given, or the one it makes."""
    return _model_of(stage, "model", known) if "model" in stage.references else known[stage.name]


def require_fitting(stage: Stage, known: Mapping[str, PredictedModel]) -> None:
    """Refuse settings that do not go with the models and tokenizers of the stage.

    Raises:
        DataError: tokens of another tokenizer than the model's.
        ModelError: a conversation with a model that will have no chat template.
        UserError: more tokens than the model has positions.
    """
    config, base = stage.config, _model_of(stage, "model", known)
    values = dict(config)
    for name in ("max_length", "context", "max_new_tokens"):
        wanted, most = values.get(name), base.context
        reserved = 1 if name == "max_new_tokens" else 0
        if wanted is not None and most is not None and wanted + reserved > most:
            if name == "max_new_tokens" and "max_new_tokens" not in config.given():
                continue  # commands bound their default themselves
            text = f"{config.flag(name)} {wanted:,}: `{values['model']}` has {most:,} positions"
            raise stage.error(UserError, text)
    if isinstance(config, GenerateConfig) and config.chat and base.has_template is False:
        hint = "fine-tune it with a stage `sft` first, or drop what needs conversations"
        raise stage.error(ModelError, f"`{values['model']}` will have no chat template", hint)
    if isinstance(config, PretrainConfig) and config.model and config.tokens:
        tokens = _model_of(stage, "tokens", known)
        if None not in (tokens.tokenizer, base.tokenizer) and tokens.tokenizer != base.tokenizer:
            text = "these tokens are of another tokenizer than the model's"
            hint = "give the stage that makes them `tokenizer`: the one of the model"
            raise stage.error(DataError, text, hint)


def _new_model(
    stage: Stage, config: PretrainConfig, known: Mapping[str, PredictedModel]
) -> PredictedModel:
    """Predict a model from scratch: of the preset or the sizes in the config."""
    base = _model_of(stage, "tokens" if config.tokens else "tokenizer", known)
    base = replace(base, has_template=False)
    if names := stage.needs.get("config_from"):
        return replace(base, shape=known[names[0]].shape)
    if config.size is None and config.config_from is None and config.layers is None:
        return base  # the corpus will say
    vocabulary = base.vocab_size or VOCABULARY
    return replace(base, shape=presets.new_config(config, config.size or "nano", vocabulary, None))


def _model_of(stage: Stage, field: str, known: Mapping[str, PredictedModel]) -> PredictedModel:
    """Return the model of a field: of the stage that it names, or of a run or folder."""
    if names := stage.needs.get(field):
        return known.get(names[0]) or _read_external(str(stage.out.parent / names[0]))
    named = stage.external.get(field)
    return _read_external(named[0]) if named else PredictedModel()


def _read_external(reference: str) -> PredictedModel:
    """Read a run's or folder's model; of one that is not on this machine nothing is known."""
    folder = Path(reference).expanduser()
    if not folder.is_dir() or (folder / "tokenizer").is_dir():
        return PredictedModel(tokenizer=reference)
    tokenizer: Any = load_tokenizer(reference)
    has_template = tokenizer.chat_template is not None
    return PredictedModel(reference, len(tokenizer), load_config(reference), has_template)
