"""Shape of a model: its configuration in, the numbers that memory and FLOPs follow from out.

The model is built on the meta device, without weights, so that parameters are counted and not
computed. `KNOWN` names shapes with published parameter counts.
"""

import difflib
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmctl.errors import UserError
from llmctl.models import presets
from llmctl.models.loading import context_size, load_config
from llmctl.models.presets import PRESETS, llama_config
from llmctl.models.quantized import BLOCK, input_width
from llmctl.training.optimizers import STACKED, block_matrices

PARTS = ("embedding", "attention", "mlp", "norms", "head", "other")
COMPOSED = {"gelu_new": 4, "gelu_fast": 4, "quick_gelu": 3}
"""Tensors that an activation function of several operations saves for its backward pass; a single
operation saves its input."""

KNOWN = {  # layers and width: Radford et al., 2019, table 2; heads as released
    "gpt2-124m": lambda: GPT2Config(n_layer=12, n_embd=768, n_head=12),
    "gpt2-355m": lambda: GPT2Config(n_layer=24, n_embd=1024, n_head=16),
    "gpt2-774m": lambda: GPT2Config(n_layer=36, n_embd=1280, n_head=20),
    "gpt2-1.5b": lambda: GPT2Config(n_layer=48, n_embd=1600, n_head=25),
    # widths, heads, layers: Touvron et al., 2023, arXiv:2302.13971, table 2; context and grouped
    # queries: arXiv:2307.09288, table 1; the rest as released
    "llama-7b": lambda: _llama(32, 4096, 32, 11_008, context=2048),
    "llama-2-7b": lambda: _llama(32, 4096, 32, 11_008, context=4096),
    "llama-2-13b": lambda: _llama(40, 5120, 40, 13_824, context=4096),
    "llama-2-70b": lambda: _llama(80, 8192, 64, 28_672, context=4096, kv_heads=8),
}
VOCABULARY = 50_257
"""GPT-2's, assumed for presets, which have that of their tokenizer."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model, those of layers for one layer."""

    kind: str
    parts: dict[str, int]
    """Parameters by part, tied ones once."""
    active: int
    """Parameters that one token meets: fewer than all in a mixture of experts."""
    layers: int
    hidden: int
    query: int
    """Width of all query heads together."""
    key_value: int
    """Width of all heads of keys together, and of values."""
    heads: int
    intermediate: int
    """Width of the feed-forward layer, of all experts that a token is sent to."""
    vocabulary: int
    context: int | None
    is_gated: bool
    has_rms_norm: bool
    has_query_norm: bool
    has_joint_projection: bool
    """Whether queries, keys and values come out of one matrix, as GPT-2's do."""
    activation: int
    """Tensors of the intermediate width that the activation function saves."""
    dropout: float
    attention_dropout: float
    matrices: int
    """Elements of the linear layers of all blocks, experts included."""
    quantizable: int
    """Those of layers that NF4 can hold."""
    head_matrix: int
    """Elements of the output layer, tied or not."""
    muon: int
    """Elements that Muon updates."""
    muon_stack: int
    """Most of them that it orthogonalises at once."""
    muon_gram: int
    """Elements of the Gram matrices of that stack."""

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.query // self.heads

    @property
    def parameters(self) -> int:
        """Parameters in all."""
        return sum(self.parts.values())

    @property
    def layer_parameters(self) -> int:
        """Parameters of one block."""
        blocks = self.parts["attention"] + self.parts["mlp"] + self.parts["norms"]
        return blocks // self.layers


def shape_of(config: PreTrainedConfig, *, labels: int = 0) -> ModelShape:
    """Shape of a language model, or of a classifier with a number of labels."""
    if labels:
        config = deepcopy(config)
        config.num_labels = labels
    model = presets.meta_model(config, scores=bool(labels))
    text = config.get_text_config()
    heads = text.num_attention_heads
    fields = text.to_dict()
    head_size = fields.get("head_dim") or text.hidden_size // heads
    output = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not output]
    modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    width = fields.get("intermediate_size") or fields.get("n_inner") or 4 * text.hidden_size
    function = fields.get("hidden_act") or fields.get("activation_function") or "gelu"
    muon_stack, muon_gram = _largest_stack(model)
    experts = sum(  # those that are one tensor for all, and no linear layers
        weight.numel()
        for name, weight in model.named_parameters()
        if ".experts." in name and weight.ndim == 3
    )
    return ModelShape(
        kind=text.model_type,
        parts=_parts(model),
        active=presets.active_parameters(model),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        query=heads * head_size,
        key_value=(fields.get("num_key_value_heads") or heads) * head_size,
        heads=heads,
        intermediate=int(width) * int(fields.get("num_experts_per_tok") or 1),
        vocabulary=text.vocab_size,
        context=context_size(config),
        is_gated=bool(experts) or "gate_proj" in modules or "gate_up_proj" in modules,
        has_rms_norm=any("RMSNorm" in type(m).__name__ for m in model.modules()),
        has_query_norm="q_norm" in modules,
        has_joint_projection=bool({"c_attn", "query_key_value", "qkv_proj"} & modules),
        activation=COMPOSED.get(str(function), 1),
        dropout=float(fields.get("resid_pdrop") or fields.get("hidden_dropout_prob") or 0.0),
        attention_dropout=float(
            fields.get("attn_pdrop")
            or fields.get("attention_dropout")
            or fields.get("attention_probs_dropout_prob")
            or 0.0
        ),
        matrices=sum(m.weight.numel() for m in linear) + experts,
        quantizable=sum(m.weight.numel() for m in linear if not input_width(m) % BLOCK),
        head_matrix=0 if output is None else output.weight.numel(),
        muon=sum(weight.numel() for weight in block_matrices(model)),
        muon_stack=muon_stack,
        muon_gram=muon_gram,
    )


def too_long(shape: ModelShape, length: int) -> tuple[str, ...]:
    """Note that sequences are longer than the model's context, if they are; 0 is unknown."""
    if shape.context is None or length <= shape.context:
        return ()
    return (f"the model has {shape.context:,} positions, fewer than the {length:,} of a sequence",)


def _parts(model: PreTrainedModel) -> dict[str, int]:
    """Parameters by part, tied ones with the first."""
    parts = dict.fromkeys(PARTS, 0)
    output = model.get_output_embeddings()
    seen: set[int] = set()
    for path, module in model.named_modules():
        own = {id(weight): weight.numel() for weight in module.parameters(recurse=False)}
        if isinstance(module, nn.Embedding):
            part = "embedding"
        elif module is output or path.rpartition(".")[2] in ("score", "classifier"):
            part = "head"
        elif "Norm" in type(module).__name__:
            part = "norms"
        elif "attn" in path or "attention" in path:
            part = "attention"
        elif any(f".{number}." in f".{path}." for number in range(model.config.num_hidden_layers)):
            part = "mlp"
        else:
            part = "other"
        parts[part] += sum(size for key, size in own.items() if key not in seen)
        seen |= own.keys()
    return parts


def _largest_stack(model: nn.Module) -> tuple[int, int]:
    """Elements of the largest stack that Muon makes, and of its Gram matrices."""
    shapes = Counter(tuple(sorted(weight.shape)) for weight in block_matrices(model))
    largest = gram = 0
    for (rows, columns), count in shapes.items():
        together = min(count, max(1, STACKED // (rows * columns)))
        if together * rows * columns > largest:
            largest, gram = together * rows * columns, together * rows * rows
    return largest, gram


def _llama(
    layers: int, hidden: int, heads: int, intermediate: int, *, context: int, kv_heads: int = 0
) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        max_position_embeddings=context,
        tie_word_embeddings=False,
    )


def config_of(name: str) -> PreTrainedConfig:
    """Find the configuration of a published shape, a preset, a folder or a Hub id.

    Raises:
        UserError: it is none of them.
    """
    if name.lower() in KNOWN:
        return KNOWN[name.lower()]()
    if name in PRESETS:
        return llama_config(PRESETS[name], VOCABULARY)
    if Path(name).expanduser().exists() or "/" in name:
        return load_config(name)
    names = [*KNOWN, *PRESETS]
    close = difflib.get_close_matches(name.lower(), names, n=1)
    raise UserError(
        f"--shape: unknown shape {name!r}" + (f": did you mean {close[0]}?" if close else ""),
        hint=f"one of {', '.join(names)}, or a run, a folder or a Hub id",
    )
