"""Generate the responses of a ranking with a model.

In: a model's name, the prompts of all entries, and how to sample. Out: the responses to one of them
at a time, which depend on the seed and the prompt's place, not on earlier ones.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from llmctl.config.commands.rank import RankConfig
from llmctl.decode.loop import Prompt, choose_forward, decode, load_for_generation
from llmctl.decode.prompts import PromptEncoder, build_prompts
from llmctl.decode.text import stop_ids
from llmctl.feedback.question_queue import Generate, GenerationCancelled
from llmctl.feedback.questions import Entry
from llmctl.hardware import memory_errors, pick_device
from llmctl.models.loading import load_config, load_tokenizer, stop_tokens


@dataclass(frozen=True)
class EncodedEntries:
    """Prompts to which responses are missing, and what they were encoded with."""

    shape: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    prompts: Mapping[int, list[Prompt]]
    """By place; one prompt for each response."""
    end_of_answer: int | None
    """Id of the token that ends answers in the chat template."""


def encode_entries(config: RankConfig, model: str, entries: Sequence[Entry]) -> EncodedEntries:
    """Encode the prompts without responses.

    Raises:
        DataError: a prompt longer than the model's context.
        ModelError: the model is broken, or has no chat template for messages.
        UserError: a stop string that no text can hold.
    """
    shape, tokenizer = load_config(model), load_tokenizer(model)
    stop_ids(tokenizer, config.stop)  # refused before the model loads
    chat = tokenizer.chat_template is not None if config.chat is None else config.chat
    encoder, count = PromptEncoder(tokenizer, chat), config.responses
    places = [place for place, entry in enumerate(entries) if entry.responses is None]
    examples = [entries[place].example for place in places]
    prompts = build_prompts(examples, encoder, shape, config.max_new_tokens, count)
    by_place = {place: prompts[i * count : (i + 1) * count] for i, place in enumerate(places)}
    return EncodedEntries(shape, tokenizer, by_place, encoder.end_of_answer(examples))


def load_generator(config: RankConfig, model: str, entries: Sequence[Entry]) -> Generate:
    """Load a model, and return the function that generates responses with it.

    Raises:
        DataError: a prompt longer than the model's context.
        ModelError: the model is broken, not trusted, or no language model.
    """
    encoded = encode_entries(config, model, entries)
    device = pick_device(config.device)
    lm = load_for_generation(model, config, encoded.shape, device=device, rows=config.responses)
    first = next(iter(encoded.prompts.values()))[0]
    with memory_errors(batch_size=1):
        forward = choose_forward(lm, first.tokens)

    def generate(place: int, is_over: Callable[[], bool]) -> list[str]:
        def check(_: int, __: str) -> None:
            if is_over():
                raise GenerationCancelled

        with memory_errors(batch_size=1):
            responses = decode(
                lm,
                encoded.prompts[place],
                config,
                eos=stop_tokens(lm, encoded.tokenizer, encoded.end_of_answer),
                forward=forward,
                seed=config.seed,
                batch_size=config.responses,
                tokenizer=encoded.tokenizer,
                on_text=check,
            )
            return [r.text for r in sorted(responses, key=lambda response: response.index)]

    return generate
