"""Write the result of a training run: a plain model, or an adapter, or both."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llmctl.config.finetuning import Tuning
from llmctl.console import log
from llmctl.files import writing
from llmctl.models.adapters import save_adapter
from llmctl.models.loading import save_model, write_folder
from llmctl.models.merging import find_mergeable, merge, merge_model, save_merged
from llmctl.runs.resume import load_weights
from llmctl.training.base_model import Base, Prepared
from llmctl.training.fault_tolerance import together
from llmctl.training.loop import Trainer
from llmctl.training.run_state import RunState
from llmctl.training.state import put_weights, weights

Check = Callable[[Any], Callable[[dict[str, Any]], dict[str, Any]]]
"""Shown the model before it is written, on every process; what it returns is told on the main
process which folders were written, and gives further metrics."""


def export(
    config: Tuning,
    trainer: Trainer,
    prepared: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    check: Check | None = None,
) -> dict[str, Any]:
    """Write the weights that validated best, the last where none did; say where. Collective.

    Raises:
        ModelError: an adapter and its merged model do not agree, or the check fails.
        ResourceError: the disk is full.
    """
    state = trainer.state
    put_best(state, trainer.model)
    tensors = weights(trainer.model, state.rank, trained_only=config.has_adapter)
    judge = check(_exact(trainer.bare_model)) if check else None
    with together(state.accelerator), writing(state.run.path):
        if state.rank != 0:
            return {}
        model = state.accelerator.unwrap_model(trainer.model)
        base, folder = prepared.base, state.run.path / "model"
        written: dict[str, Any] = {"model": str(folder)}
        if prepared.is_classifier:
            written = _write_classifier(config, model, tensors, base, tokenizer, state)
        elif config.has_adapter:
            written = write_adapter(model, tensors, tokenizer, state, base, merges=config.merge)
        else:
            save_model(model, tensors, tokenizer, folder)
        return {**written, **(judge(written) if judge else {})}


def export_pretrained(trainer: Trainer, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Write `model/`: the weights that validated best, the last where none did. Collective.

    Raises:
        ResourceError: the disk is full.
    """
    state = trainer.state
    put_best(state, trainer.model)
    tensors, folder = weights(trainer.model, state.rank), state.run.path / "model"
    with together(state.accelerator), writing(state.run.path):
        if state.rank == 0:
            save_model(state.accelerator.unwrap_model(trainer.model), tensors, tokenizer, folder)
    return {"model": str(folder)}


def write_adapter(
    model: Any,
    tensors: dict[str, Tensor] | None,
    tokenizer: PreTrainedTokenizerBase,
    state: RunState,
    base: Base,
    *,
    merges: bool,
) -> dict[str, Any]:
    """Write `adapter/`, and `model/` with it merged where that is wanted; say where.

    `tensors` are its trained weights; None for those that it holds.

    Raises:
        ModelError: an adapter and its merged model do not agree.
    """
    folder = state.run.path / "adapter"
    save_adapter(
        model,
        tokenizer,
        folder,
        base=base.reference,
        base_sha256=base.sha256,
        generation_config=model.generation_config,
        tensors=tensors,
    )
    if not merges:
        return {"model": str(folder)}
    merged = merge(find_mergeable(str(folder)), state.device)
    save_merged(merged, state.run.path / "model")
    log.info("merged: logits differ from the adapter's by at most %.2g", merged.difference)
    facts = {f"merge_{name}": value for name, value in merged.as_result().items()}
    return {"model": str(state.run.path / "model"), "adapter": str(folder), **facts}


def put_best(state: RunState, model: nn.Module) -> None:
    """Give the model the weights of the best checkpoint, where one was better than the last.

    Collective.
    """
    done = state.progress
    if done.best_step is None or done.best_step == done.step:
        return
    with together(state.accelerator):
        best = load_weights(state.run.checkpoints / f"checkpoint-{done.best_step}")
        put_weights(model, best)


def _write_classifier(
    config: Tuning,
    model: Any,
    tensors: dict[str, Tensor],
    base: Base,
    tokenizer: PreTrainedTokenizerBase,
    state: RunState,
) -> dict[str, Any]:
    """The model, or the adapter and the model that it makes; where they are."""
    model.config.use_cache = True  # off in training
    folder, adapter = state.run.path / "model", state.run.path / "adapter"
    if not config.has_adapter:
        write_folder(model, tensors, tokenizer, folder)
        return {"model": str(folder)}
    save_adapter(
        model,
        tokenizer,
        adapter,
        base=base.reference,
        base_sha256=base.sha256,
        generation_config=None,
        tensors=tensors,
    )
    model.config.architectures = [type(model.get_base_model()).__name__]
    model.config.save_pretrained(adapter)  # nothing else names the labels
    if not config.merge:
        return {"model": str(adapter)}
    merged, difference = merge_model(model.to("cpu"))
    write_folder(merged, merged.state_dict(), tokenizer, folder)
    log.info("merged: logits differ from the adapter's by at most %.2g", difference)
    return {"model": str(folder), "adapter": str(adapter), "merge_difference": difference}


def _exact(model: Any) -> Any:
    """The model with what is in bf16 in float32, to be looked at."""
    model.eval()
    if any(weight.dtype == torch.bfloat16 for weight in model.parameters()):
        model.float()
    return model
