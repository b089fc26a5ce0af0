"""Merge an adapter into its base: one plain model that gives the same logits.

PEFT merges some adapters wrongly without a word (one on tied embeddings moves logits by whole
units), so every merged model is compared with its adapter before anything is written.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmctl.errors import ModelError
from llmctl.models.adapters import CONFIG, AdapterInfo, put_adapter, read_adapter, require_base
from llmctl.models.classifiers import SCORE, load_classifier
from llmctl.models.loading import (
    context_size,
    find_base,
    grow_embeddings,
    load_causal_lm,
    load_tokenizer,
    local_folder,
    save_model,
    write_folder,
)
from llmctl.models.quantized import LoadIn, copy_dequantized
from llmctl.models.vetting import BROKEN, first_line, read_object
from llmctl.runs.directory import resolve_model

if TYPE_CHECKING:
    from peft import PeftModel

TOLERANCE = 1e-3
"""Largest difference of a logit, in float32, that counts as rounding."""
ROWS, LONGEST = 4, 64
"""Shape of the tokens that the models are compared on."""


@dataclass(frozen=True)
class Mergeable:
    """An adapter that can be merged, and the folder of its base."""

    adapter: AdapterInfo
    base: Path


@dataclass(frozen=True)
class Merged:
    """A model with the adapter in its weights, in float32."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    difference: float
    """Largest difference between its logits and the adapter's, on the same weights of the base."""
    trained_in: LoadIn
    """Precision of the base's weights while the adapter was trained."""
    quantized_difference: float | None
    """Likewise to the adapter on the quantized base; None where the base was not quantized."""

    def as_result(self) -> dict[str, Any]:
        """Return the differences, for a result."""
        result: dict[str, Any] = {"difference": self.difference}
        if self.quantized_difference is not None:
            result["dequantized"] = self.trained_in
            result["quantized_difference"] = self.quantized_difference
        return result


def find_mergeable(reference: str, base: str | None = None) -> Mergeable:
    """Check an adapter and its base before anything is loaded.

    `base` is the base, where it is not the one that the adapter names.

    Raises:
        ModelError: no adapter, one of virtual tokens, or a base that is gone or another.
    """
    run = Path(reference).expanduser()
    # a run that was merged already has both, and `model` comes first elsewhere
    folder = (
        run / "adapter" if (run / "adapter").is_dir() else local_folder(resolve_model(reference))
    )
    adapter = read_adapter(folder)
    if adapter.is_prompt:
        raise ModelError(
            "virtual tokens cannot be merged: no weight of the base can hold them",
            file=folder,
            hint="use the adapter as it is, or train one with --lora",
        )
    base_folder = find_base(adapter, base)
    require_base(adapter, base_folder)
    return Mergeable(adapter, base_folder)


def merge(mergeable: Mergeable, device: str = "cpu") -> Merged:
    """Merge an adapter into the weights of its base.

    A base that was quantized in training is quantized again and its values taken from there, since
    they are what the adapter learned to correct; on the original ones it is a little worse.

    Raises:
        ModelError: adapter and base do not fit, or the merged model gives other logits.
    """
    adapter, folder = mergeable.adapter, str(mergeable.base)
    has_tokenizer = (adapter.folder / "tokenizer_config.json").exists()
    tokenizer = load_tokenizer(str(adapter.folder if has_tokenizer else mergeable.base))
    if read_object(adapter.folder / CONFIG).get("task_type") == "SEQ_CLS":
        classifier = _base_classifier(mergeable, tokenizer).to(device)
        model, difference = merge_model(put_adapter(classifier, adapter, "SEQ_CLS"))
        return Merged(model, tokenizer, difference, "full", None)
    base = load_causal_lm(folder, dtype=torch.float32, device=device)
    quantized = None
    if adapter.trained_in != "full":
        quantized = load_causal_lm(
            folder, dtype=torch.float32, device=device, load_in=adapter.trained_in
        )
        copy_dequantized(quantized, base)
    model, difference = merge_model(put_adapter(base, adapter))
    quantized_difference = None
    if quantized is not None:
        quantized_difference = _distance(_logits(put_adapter(quantized, adapter)), _logits(model))
    if quantized_difference is not None and adapter.trained_in == "4bit":
        # 8 bits round activations too
        _require_close(quantized_difference, f"the adapter on the {adapter.trained_in} base")
    return Merged(model, tokenizer, difference, adapter.trained_in, quantized_difference)


def merge_model(model: "PeftModel") -> tuple[PreTrainedModel, float]:
    """Merge an adapter in place into its float32 model; return how much logits differ at most, too.

    Raises:
        ModelError: more than rounding.
    """
    before = _logits(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the logits tell
            merged: Any = model.merge_and_unload(safe_merge=True)
    except BROKEN as error:
        raise ModelError(f"this adapter does not merge: {first_line(error)}") from None
    difference = _distance(before, _logits(merged))
    _require_close(difference, "the adapter")
    return merged, difference


def save_merged(merged: Merged, folder: Path) -> None:
    """Write a folder that `from_pretrained` opens, whole or not at all."""
    write = save_model if merged.model.can_generate() else write_folder
    write(merged.model, merged.model.state_dict(), merged.tokenizer, folder)


def _base_classifier(mergeable: Mergeable, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Load the base of an adapter that classifies or scores, with the labels saved beside it."""
    labels = score_at = None
    if (mergeable.adapter.folder / "config.json").exists():
        config = AutoConfig.from_pretrained(mergeable.adapter.folder, trust_remote_code=False)
        labels = tuple(str(config.id2label[number]) for number in sorted(config.id2label))
        score_at = config.to_dict().get("score_at")
    model: Any = load_classifier(str(mergeable.base), labels or SCORE).model
    grow_embeddings(model, tokenizer)
    if score_at is not None:
        model.config.score_at = score_at
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model


def _require_close(difference: float, other: str) -> None:
    if not difference <= TOLERANCE:  # NaN is not
        raise ModelError(
            f"the merged model's logits differ from those of {other} by {difference:.3g}, more "
            f"than {TOLERANCE:g}: nothing was written",
            hint="use the adapter as it is",
        )


def _distance(logits: Tensor, others: Tensor) -> float:
    return float((logits - others).abs().max())


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    """Compute logits on fixed tokens; the last row has the newest ones of the vocabulary."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    length = min(LONGEST, vocabulary, context_size(model.config) or LONGEST)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (ROWS, length), generator=draw)
    tokens[-1] = torch.arange(vocabulary - length, vocabulary)
    logits: Tensor = model.eval()(input_ids=tokens.to(model.device), use_cache=False).logits
    return logits.float()
