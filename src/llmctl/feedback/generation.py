"""Generate the responses of a ranking with a model.

In: a model's name, the prompts of all entries, and how to sample. Out: the responses to one of them
at a time, which depend on the seed and the prompt's place, not on earlier ones.
"""

from collections.abc import Callable, Sequence

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from llmctl.config.commands import RankConfig
from llmctl.decode.loop import Prompt, choose_forward, decode, load_for_generation
from llmctl.decode.prompts import PromptEncoder, build_prompts
from llmctl.feedback.question_queue import Generate, GenerationCancelled
from llmctl.feedback.questions import Entry
from llmctl.hardware import memory_errors, pick_device
from llmctl.models.loading import load_config, load_tokenizer, stop_tokens


def encode_entries(
    config: RankConfig, model: str, entries: Sequence[Entry]
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase, dict[int, list[Prompt]]]:
    """Encode the prompts without responses, by place; return configuration and tokenizer, too.

    Raises:
        DataError: a prompt longer than the model's context.
        ModelError: the model is broken, or has no chat template for messages.
    """
    shape, tokenizer = load_config(model), load_tokenizer(model)
    chat = tokenizer.chat_template is not None if config.chat is None else config.chat
    encoder, count = PromptEncoder(tokenizer, chat), config.responses
    places = [place for place, entry in enumerate(entries) if entry.responses is None]
    examples = [entries[place].example for place in places]
    prompts = build_prompts(examples, encoder, shape, config.max_new_tokens, count)
    by_place = {place: prompts[i * count : (i + 1) * count] for i, place in enumerate(places)}
    return shape, tokenizer, by_place


def load_generator(config: RankConfig, model: str, entries: Sequence[Entry]) -> Generate:
    """Load a model, and return the function that generates responses with it.

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

    def generate(place: int, is_over: Callable[[], bool]) -> list[str]:
        def check(_: int, __: str) -> None:
            if is_over():
                raise GenerationCancelled

        with memory_errors(batch_size=1):
            responses = decode(
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
            return [r.text for r in sorted(responses, key=lambda response: response.index)]

    return generate
