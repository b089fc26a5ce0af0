"""A model as the writer of responses.

In: a model's name, the prompts of all entries, and how to sample. Out: the responses to one of them
at a time, which depend on the seed and the prompt's place, not on what was written before.
"""

from collections.abc import Callable, Sequence

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from llmctl.config.commands import RankConfig
from llmctl.decode.loop import Prompt, choose_forward, decode, load_for_generation
from llmctl.decode.prompts import PromptEncoder, build_prompts
from llmctl.feedback.questions import Entry
from llmctl.feedback.supply import GivenUp, Write
from llmctl.hardware import memory_errors, pick_device
from llmctl.models.loading import load_config, load_tokenizer, stop_tokens


def encode_entries(
    config: RankConfig, model: str, entries: Sequence[Entry]
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase, dict[int, list[Prompt]]]:
    """A model's configuration and tokenizer, and by place the prompts that it is to answer.

    Raises:
        DataError: a prompt longer than the model's context.
        ModelError: the model is broken, or has no chat template for messages.
    """
    shape, tokenizer = load_config(model), load_tokenizer(model)
    chat = tokenizer.chat_template is not None if config.chat is None else config.chat
    encoder, count = PromptEncoder(tokenizer, chat), config.responses
    places = [place for place, entry in enumerate(entries) if entry.responses is None]
    asks = [entries[place].ask for place in places]
    prompts = build_prompts(asks, encoder, shape, config.max_new_tokens, count)
    found = {place: prompts[i * count : (i + 1) * count] for i, place in enumerate(places)}
    return shape, tokenizer, found


def load_writer(config: RankConfig, model: str, entries: Sequence[Entry]) -> Write:
    """A function that writes the responses to the entry at a place.

    Raises:
        DataError: a prompt longer than the model's context.
        ModelError: the model is broken, not trusted, or no language model.
    """
    shape, tokenizer, prompts = encode_entries(config, model, entries)
    device = pick_device(config.device)
    lm = load_for_generation(model, config, shape, device=device, rows=config.responses)
    first = next(iter(prompts.values()))[0]
    with memory_errors(batch_size=1):
        forward = choose_forward(lm, first.tokens)

    def write(place: int, is_over: Callable[[], bool]) -> list[str]:
        def check(_: int, __: str) -> None:
            if is_over():
                raise GivenUp

        with memory_errors(batch_size=1):
            found = decode(
                lm,
                prompts[place],
                config,
                eos=stop_tokens(lm, tokenizer),
                forward=forward,
                seed=config.seed,
                batch_size=config.responses,
                tokenizer=tokenizer,
                on_text=check,
            )
            return [r.text for r in sorted(found, key=lambda response: response.index)]

    return write
