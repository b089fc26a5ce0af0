"""Read a GGUF file back with transformers, and say what its weights lost.

The reader of transformers is another's code than the writer here, so what both agree on is right.
"""

from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

UNREAD = ("head_dim", "rope_parameters", "attention_bias", "mlp_bias")
"""What the file says and the reader passes over, for some or all of the architectures."""


@dataclass(frozen=True)
class RoundTrip:
    """How the file's model differs from the one that it was made of, over all positions."""

    top1: float
    """Share of positions at which both find the same token the most likely."""

    max_abs: float
    """Largest difference between two logits."""

    mean_kl: float
    """Mean divergence KL(model || file) of the next token's distributions, in nats."""


def read_back(path: Path, original: PreTrainedConfig) -> PreTrainedModel:
    """The model of a GGUF file, dequantized to float32, in eval mode.

    Args:
        path: of the file.
        original: configuration of the model that it was made of; gives what transformers does not
            read from the file.
    """
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    known = original.to_dict()
    config.update({name: known[name] for name in UNREAD if known.get(name) is not None})
    with redirect_stderr(StringIO()):  # its progress bar cannot be switched off
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=config, dtype=torch.float32
        )
    return model.eval()


@torch.inference_mode()
def compare(model: PreTrainedModel, path: Path, windows: Sequence[Tensor]) -> RoundTrip:
    """Compare a model with the file made of it.

    Args:
        model: what was written.
        path: of the file.
        windows: token ids (length,), no longer than the model's context.
    """
    copy = read_back(path, model.config).to(model.device)
    same, largest, divergence, count = 0, 0.0, 0.0, 0
    for window in windows:
        tokens = window[None].to(model.device)
        wanted, found = (m(tokens).logits[0].float() for m in (model, copy))
        same += int((wanted.argmax(-1) == found.argmax(-1)).sum())
        largest = max(largest, float((wanted - found).abs().max()))
        ours, theirs = wanted.log_softmax(-1), found.log_softmax(-1)
        divergence += float((ours.exp() * (ours - theirs)).sum())
        count += len(window)
    return RoundTrip(same / count, largest, divergence / count)
