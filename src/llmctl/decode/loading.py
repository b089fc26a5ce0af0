"""A model that is to write: loaded as `Loading` says, with the threads that its work is worth."""

from transformers import PreTrainedConfig, PreTrainedModel

from llmctl.config.sections import Loading
from llmctl.decode.loop import best_threads
from llmctl.hardware import set_threads, usable_cores
from llmctl.models import load_causal_lm, parameter_count, parse_dtype
from llmctl.quantized import LoadIn


def load_to_write(
    reference: str, config: Loading, shape: PreTrainedConfig, *, device: str, rows: int
) -> PreTrainedModel:
    """The model of a run, a folder or a Hub id.

    Args:
        reference: names it.
        config: how to load it.
        shape: its configuration.
        device: where to.
        rows: most sequences that it writes at once.

    Raises:
        ModelError: it is broken, not trusted, or no language model.
        NetworkError: a Hub id that cannot be had.
    """
    load_in: LoadIn = "8bit" if config.load_in_8bit else "4bit" if config.load_in_4bit else "full"
    dtype = parse_dtype(config.dtype, device, shape.dtype)
    model = load_causal_lm(reference, dtype=dtype, device=device, load_in=load_in)
    cores = usable_cores()
    set_threads(config.threads or best_threads(parameter_count(model), rows, cores))
    return model
