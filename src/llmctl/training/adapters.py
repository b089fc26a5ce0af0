"""Adapters to train: a model and what was asked for in, the model with a PEFT adapter on it out.

What PEFT would do wrongly without a word is refused here: a low-rank update of weights that are
tied merges into another model, and new tokens whose rows stay frozen are never learned.
"""

import difflib
import warnings
from collections.abc import Sequence
from typing import Any, Literal

from peft import (
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_model,
)
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmctl.config.finetuning import Adapter, LowRank
from llmctl.console import log
from llmctl.errors import ModelError, UserError
from llmctl.models.patched_lora import fuse_lora
from llmctl.models.quantized import HEADS, loaded_in
from llmctl.numbers import counted

ALL_LINEAR = "all-linear"
TASKS = {"chat": TaskType.CAUSAL_LM, "classify": TaskType.SEQ_CLS}


def adapt(
    model: PreTrainedModel,
    config: LowRank,
    *,
    added_tokens: Sequence[int] = (),
    task: Literal["chat", "classify"] = "chat",
    new_modules: Sequence[str] = (),
) -> PeftModel:
    """Freeze the model and put a new adapter on it, in float32 and ready to train.

    The model is grown to its tokenizer already. Rows of `added_tokens` train by themselves, and so
    do those of an output layer that is not tied to the embedding. `new_modules` are further layers
    that the base lacks, trained and kept in full, as is a classifier's output layer.

    Raises:
        UserError: targets that are not there or cannot be adapted, or DoRA on 8 bits.
        ModelError: new tokens that the adapter could not learn.
    """
    quantized = loaded_in(model) != "full"
    for weight in model.parameters():
        weight.requires_grad_(False)
        if quantized and weight.ndim == 1 and weight.is_floating_point():
            weight.data = weight.data.float()  # norms, as QLoRA keeps them
    about: Any
    if isinstance(config, Adapter) and config.prompt_tuning is not None:
        about = _virtual_tokens(config, added_tokens)
    else:
        if added_tokens and not config.merge:
            log.warning(
                "the adapter trains the rows of %s: vLLM and llama.cpp load no such adapter; "
                "--merge also writes a plain model, which they do",
                counted(len(added_tokens), "added token"),
            )
        about = _low_rank(model, config, added_tokens, task)
        about.modules_to_save = list(new_modules) or None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
        adapted = get_peft_model(model, about)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()  # small updates vanish in bf16
    assert isinstance(adapted, PeftModel)
    return fuse_lora(adapted)


def _low_rank(
    model: PreTrainedModel, config: LowRank, added_tokens: Sequence[int], task: str
) -> LoraConfig:
    if config.dora and loaded_in(model) == "8bit":
        raise UserError(
            "--dora does not go with --load-in-8bit: PEFT spoils the weights when it measures them",
            hint="use --load-in-4bit",
        )
    targets = _targets(model, config.lora_targets, added_tokens)
    return LoraConfig(
        task_type=TASKS[task],
        r=config.lora_r,
        lora_alpha=2 * config.lora_r if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        use_rslora=config.rslora,
        use_dora=config.dora,
        fan_in_fan_out=_has_turned_layers(model, targets),
        trainable_token_indices=_new_rows(model, added_tokens),
    )


def _virtual_tokens(config: Adapter, added_tokens: Sequence[int]) -> PromptTuningConfig:
    """Virtual tokens that start as words of the vocabulary, drawn at random: seed before.

    Noise, PEFT's default, does worse (Lester et al., 2021, arXiv:2104.08691, section 3.2).
    """
    if added_tokens:
        raise ModelError(
            f"--prompt-tuning cannot teach the model {counted(len(added_tokens), 'token')} that "
            "the chat template adds: all its weights stay frozen",
            hint="use --lora, or a --chat-template made of tokens that the model has",
        )
    return PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=config.prompt_tuning,
        prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
    )


def _targets(
    model: PreTrainedModel, wanted: Sequence[str], added_tokens: Sequence[int]
) -> list[str] | str:
    """The layers to adapt, as PEFT takes them, each checked."""
    if not wanted or list(wanted) == [ALL_LINEAR]:
        return ALL_LINEAR
    if ALL_LINEAR in wanted:
        raise UserError("--lora-targets all-linear stands alone", hint="drop the other names")
    for name in wanted:
        modules = [m for path, m in model.named_modules() if f".{path}".endswith(f".{name}")]
        _check_target(model, name, modules, added_tokens)
    return list(wanted)


def _check_target(
    model: PreTrainedModel, name: str, modules: list[nn.Module], added_tokens: Sequence[int]
) -> None:
    """Refuse a target that is nowhere, no layer of weights, or one that would go wrong unseen."""
    others = "leave it out: by default every linear layer but the output is adapted"
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if any(module is head for module in modules):
        raise UserError(
            f"--lora-targets {name} is the output layer, whose weight the loss works on",
            hint=others,
        )
    if any(module is embedding for module in modules):
        if head is not None and head.weight is embedding.weight:
            raise UserError(
                f"--lora-targets {name} is tied to the output layer: merging it would give another "
                "model",
                hint=others,
            )
        if added_tokens:
            raise UserError(
                f"--lora-targets {name} does not go with tokens that the chat template adds: their "
                "rows train by themselves",
                hint=others,
            )
    if name.rpartition(".")[2] in HEADS:
        raise UserError(f"--lora-targets {name} is trained in full anyway", hint=others)
    if not any(isinstance(module, nn.Linear | Conv1D | nn.Embedding) for module in modules):
        there = _layer_names(model)
        close = difflib.get_close_matches(name.rpartition(".")[2], there, n=1)
        what = "is no linear layer" if modules else "matches no layer"
        raise UserError(
            f"--lora-targets {name} {what} of this model, which has {', '.join(there)}",
            hint=f"did you mean {close[0]}?" if close else others,
        )


def _layer_names(model: PreTrainedModel) -> list[str]:
    """Last parts of the names of the linear layers, without the output."""
    head = model.get_output_embeddings()
    return sorted(
        {
            path.rpartition(".")[2]
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and module is not head
        }
        - set(HEADS)
    )


def _has_turned_layers(model: PreTrainedModel, targets: list[str] | str) -> bool:
    """Whether the targets are GPT-2's, whose weights are (in, out)."""
    names = (
        _layer_names(model) if targets == ALL_LINEAR else [t.rpartition(".")[2] for t in targets]
    )
    return any(
        isinstance(module, Conv1D) and path.rpartition(".")[2] in names
        for path, module in model.named_modules()
    )


def _new_rows(model: PreTrainedModel, added_tokens: Sequence[int]) -> dict[str, list[int]] | None:
    """Rows that train by themselves, by the layer that has them; a tied one follows the other."""
    if not added_tokens:
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight
    if not tied and getattr(head, "bias", None) is not None:  # PEFT computes without it
        raise ModelError(
            "the chat template adds tokens, and an adapter cannot train their rows in this model's "
            "output layer, which has a bias",
            hint="train in full, or give a --chat-template of tokens that the model has",
        )
    layers = [embedding] if tied else [embedding, head]
    rows = sorted(set(added_tokens))
    return {
        path: rows
        for path, module in model.named_modules()
        if any(module is layer for layer in layers)
    }
