"""`llmctl generate`: prompts in, text out, as it comes or as rows of jsonl."""

from collections.abc import Iterator
from typing import Any

from llmctl.config.commands.generate import GenerateConfig
from llmctl.console import log, show_recipe
from llmctl.data.prompts import PromptExample, read_prompt_file
from llmctl.decode.loop import (
    Response,
    config_for_generation,
    decode,
    load_for_generation,
)
from llmctl.decode.output import Row, open_rows, write_rows
from llmctl.decode.prompts import (
    PromptEncoder,
    answers_in_template,
    build_prompts,
    read_shots,
    read_stdin,
)
from llmctl.decode.text import stop_ids
from llmctl.files import check_out
from llmctl.hardware import memory_errors, pick_device
from llmctl.models.loading import load_tokenizer, stop_tokens
from llmctl.numbers import counted


def run(config: GenerateConfig) -> dict[str, Any] | None:
    """Generate from every prompt; a single text streams to stdout."""
    check_out(config.out, overwrite=config.overwrite)
    if config.prompts_file:
        asks = read_prompt_file(config.prompts_file)
    elif config.prompt:
        asks = [PromptExample(text, f"prompt {i}") for i, text in enumerate(config.prompt, start=1)]
    else:
        asks = [read_stdin()]
    shots = read_shots(config.shots) if config.shots else []
    device = pick_device(config.device)
    shape, tokenizer = config_for_generation(config), load_tokenizer(config.model)
    stop_ids(tokenizer, config.stop)  # refused before the model loads
    encoder = PromptEncoder(tokenizer, config.chat, config.system, shots)
    prompts = build_prompts(asks, encoder, shape, config.max_new_tokens, config.num_samples)
    end_of_answer = encoder.end_of_answer(asks)
    if config.dry_run:
        lengths = [len(prompt.tokens) for prompt in prompts]
        log.info(
            "would write %s of at most %s on %s; prompts of %d to %d tokens",
            *(counted(len(prompts), "response"), counted(config.max_new_tokens, "token"), device),
            *(min(lengths), max(lengths)),
        )
        return show_recipe("generate", config)
    rows = min(len(prompts), config.batch_size)
    model = load_for_generation(config.model, config, shape, device=device, rows=rows)
    eos = stop_tokens(model, tokenizer, end_of_answer)
    is_open = not (config.model_fields_set & {"chat", "shots"}) and end_of_answer is None
    if is_open and answers_in_template(tokenizer, eos):
        log.info("this model was made to be asked with --chat; without it, it continues the text")
    streams = len(prompts) == 1 and not config.as_json and config.out is None
    responses = decode(
        model,
        prompts,
        config,
        eos=eos,
        seed=config.seed,
        batch_size=config.batch_size,
        tokenizer=tokenizer,
        on_text=(lambda _, piece: print(piece, end="", flush=True)) if streams else None,
    )
    with memory_errors():
        if streams:
            try:
                for _ in responses:
                    pass
            finally:  # the line ends also when the user stops it
                print(flush=True)
            return None
        return _write(config, asks, responses, len(prompts))


def _write(
    config: GenerateConfig, asks: list[PromptExample], responses: Iterator[Response], total: int
) -> dict[str, Any] | None:
    """Write a row or text for each response; return the result where it went to a file."""

    def row_of(response: Response) -> Row:
        ask = asks[response.index // config.num_samples]
        return {
            "prompt": ask.prompt,
            **({"tools": ask.tools} if ask.tools else {}),
            "response": response.text,
            "finish_reason": response.finish_reason,
            "seed": config.seed,
        }

    with open_rows(config.out, as_json=config.as_json) as emit:
        rows, tokens = write_rows(responses, row_of, emit, total)
    if config.out is None:
        return None
    return {"stage": "generate", "out": str(config.out), "rows": rows, "tokens": tokens}
