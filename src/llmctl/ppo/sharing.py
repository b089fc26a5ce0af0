"""Several models on one set of weights: each has layers of its own to put adapters on, no copy.

In: a model without adapters, frozen. Out: another model, of any head, whose every weight of the
body is the first one's.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from llmctl.errors import ModelError


def language_model_on(base: Any) -> Any:
    """Another causal language model on the weights of this one."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(deepcopy(base.config), trust_remote_code=False)
    _adopt(model, base)
    return model.eval().requires_grad_(False)


def classifier_on(base: Any) -> Any:
    """A classifier of one number on the body of this language model; its head gives 0.

    Raises:
        ModelError: transformers has no classifier of this architecture, or none with such a head.
    """
    config = deepcopy(base.config)
    config.num_labels, config.problem_type = 1, None
    config.architectures = None
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except ValueError:
        raise ModelError(
            f"transformers has no classifier of the architecture {config.model_type}, and so no "
            "value model"
        ) from None
    _adopt(model.base_model, base.base_model)
    head = dict(model.named_children()).get("score")
    if not isinstance(head, nn.Linear):
        raise ModelError(f"a value model of the architecture {config.model_type} is not supported")
    score = nn.Linear(head.in_features, 1, bias=False, device=base.device)
    nn.init.zeros_(score.weight)
    model.score = score
    return model.eval()


def _adopt(shell: nn.Module, base: nn.Module) -> None:
    """Give a model without weights the layers of another, which are not copied.

    Layers without layers in them are taken whole, so that quantized ones are too; of the others,
    into which adapters are put, only what they hold themselves.
    """
    places = dict(shell.named_modules())
    for name, module in base.named_modules():
        parent, _, last = name.rpartition(".")
        if name and next(module.children(), None) is None:
            setattr(places[parent], last, module)
            continue
        here = places[name]
        for key, weight in module.named_parameters(recurse=False):
            here.register_parameter(key, weight)
        for key, buffer in module.named_buffers(recurse=False):
            here.register_buffer(key, buffer, persistent=key in module.state_dict())
