"""What a fine-tuning run leaves: a plain model, or an adapter, or both."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llmctl.adapters import save_adapter
from llmctl.config.supervised import LowRank
from llmctl.console import log
from llmctl.files import writing
from llmctl.merging import find_mergeable, merge, save_merged
from llmctl.models import save_model
from llmctl.resume import load_weights
from llmctl.training.base import Base
from llmctl.training.guard import together
from llmctl.training.state import weights
from llmctl.training.tuned import Tuned


def export(
    config: LowRank, trainer: Tuned, base: Base, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Write the weights that validated best, the last where none did; say where. Collective.

    Raises:
        ModelError: an adapter and its merged model do not agree.
        ResourceError: the disk is full.
    """
    job = trainer.job
    state = best_weights(trainer, has_adapter=config.has_adapter)
    with together(job.accelerator), writing(job.run.path):
        if job.rank != 0:
            return {}
        model = job.accelerator.unwrap_model(trainer.model)
        model.config.use_cache = True  # Trainer's switch for training, of no use to others
        if not config.has_adapter:
            save_model(model, state, tokenizer, job.run.path / "model")
            return {"model": str(job.run.path / "model")}
        folder = job.run.path / "adapter"
        save_adapter(
            model,
            tokenizer,
            folder,
            base=base.reference,
            base_sha256=base.sha256,
            generation_config=model.generation_config,
        )
        if not config.merge:
            return {"model": str(folder)}
        merged = merge(find_mergeable(str(folder)), job.device)
        save_merged(merged, job.run.path / "model")
        log.info("merged: logits differ from the adapter's by at most %.2g", merged.difference)
        facts = {f"merge_{name}": value for name, value in merged.facts().items()}
        return {"model": str(job.run.path / "model"), "adapter": str(folder), **facts}


def best_weights(trainer: Tuned, *, has_adapter: bool) -> dict[str, torch.Tensor]:
    """Bring back the best; all weights on rank 0 where they are to be written whole. Collective."""
    with together(trainer.job.accelerator):
        _put_best(trainer)
    return {} if has_adapter else weights(trainer.model, trainer.job.rank)


def _put_best(trainer: Tuned) -> None:
    """Give the model the weights of the best checkpoint, where one was better than the last."""
    done = trainer.job.progressed
    if done.best_step is None or done.best_step == done.step:
        return
    found = load_weights(trainer.job.run.checkpoints / f"checkpoint-{done.best_step}")
    named = dict(trainer.model.named_parameters()) | dict(trainer.model.named_buffers())
    with torch.no_grad():
        for name, tensor in found.items():
            named[name].copy_(tensor)
