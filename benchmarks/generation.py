"""Tokens per second of llmctl's decode loop against `model.generate` with its default settings.

    python benchmarks/generation.py --model FOLDER [--dtype bf16] [--tokens 48] [--rows 1,16,64]

Both sides take turns in one process; medians over the rounds, the first of each thrown away. Only
tokens that belong to a response count: none of the padding that `generate` adds after a row's end.
Greedy, so that both sides write the same; run it on idle cores. The floor of one row is the bytes
of the weights over the rate at which the machine reads memory, measured before.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import machine
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llmctl.config.commands.generate import GenerateConfig
from llmctl.config.sections import Sampling
from llmctl.decode.llama import PlainModel
from llmctl.decode.loop import (
    Prompt,
    best_threads,
    config_for_generation,
    decode,
    load_for_generation,
)
from llmctl.hardware import usable_cores
from llmctl.models.loading import stop_tokens

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Tokens = list[list[int]]
PROMPT_LENGTHS = (4, 60)
RESPONSE_LENGTHS = (16, 256)


def ours(
    model: PreTrainedModel | PlainModel, prompts: Tokens, limits: list[int], eos: list[int]
) -> Tokens:
    threads = torch.get_num_threads()
    torch.set_num_threads(best_threads(model.num_parameters(), len(prompts), usable_cores()))
    asked = [Prompt(p, i, limit) for i, (p, limit) in enumerate(zip(prompts, limits, strict=True))]
    sampling = Sampling(greedy=True, max_new_tokens=max(limits))
    responses = decode(model, asked, sampling, eos=eos)
    ordered = sorted(responses, key=lambda response: response.index)
    torch.set_num_threads(threads)
    return [response.tokens for response in ordered]


def theirs(model: PreTrainedModel, prompts: Tokens, limits: list[int], eos: list[int]) -> Tokens:
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    output = model.generate(
        padded,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max(limits),
    )
    rows = [row[:limit] for row, limit in zip(output[:, width:].tolist(), limits, strict=True)]
    return [cut(row, eos) for row in rows]


def cut(tokens: list[int], eos: list[int]) -> list[int]:
    """The tokens up to and including the first that ends a response."""
    end = next((i for i, token in enumerate(tokens) if token in eos), len(tokens) - 1)
    return tokens[: end + 1]


def rate(run: Callable[..., Tokens], *arguments: object) -> tuple[float, Tokens]:
    started = time.perf_counter()
    tokens = run(*arguments)
    return sum(map(len, tokens)) / (time.perf_counter() - started), tokens


def mixed_prompts(
    model: PreTrainedModel | PlainModel, start: list[int], eos: list[int], count: int
) -> Tokens:
    """Beginnings of the model's own text, of different lengths."""
    begin = [start] * count
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=PROMPT_LENGTHS[1])
    prompts = [Prompt(tokens, i) for i, tokens in enumerate(begin)]
    texts = sorted(decode(model, prompts, sampling, eos=eos), key=lambda response: response.index)
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(PROMPT_LENGTHS[0], PROMPT_LENGTHS[1], (count,), generator=draw).tolist()
    return [
        begin[0] + [t for t in text.tokens if t not in eos][: length - 1]
        for text, length in zip(texts, lengths, strict=True)
    ]


def read_rate() -> float:
    """Bytes a second that all cores read of what no cache holds."""
    numbers = torch.ones(1 << 27)
    taken = []
    for _ in range(7):
        started = time.perf_counter()
        numbers.sum()
        taken.append(time.perf_counter() - started)
    return 4 * numbers.numel() / min(taken)


def measure(
    name: str,
    fast: PreTrainedModel | PlainModel,
    model: PreTrainedModel,
    prompts: Tokens,
    limits: list[int],
    rounds: int,
) -> None:
    eos = stop_tokens(model, AutoTokenizer.from_pretrained(model.name_or_path))
    rates: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(rounds + 1):
        first, our_tokens = rate(ours, fast, prompts, limits, eos)
        second, their_tokens = rate(theirs, model, prompts, limits, eos)
        rates["ours"].append(first)
        rates["theirs"].append(second)
    same = sum(a == b for a, b in zip(our_tokens, their_tokens, strict=True))
    left, right = (statistics.median(values[1:]) for values in rates.values())
    count = sum(map(len, our_tokens))
    print(
        f"| {name} | {count:,} | {left:,.0f} | {right:,.0f} | {left / right:.2f} "
        f"| {same} of {len(prompts)} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--tokens", type=int, default=RESPONSE_LENGTHS[1], help="of a response")
    parser.add_argument("--rows", default="1,64")
    arguments = parser.parse_args()
    dtype = DTYPES[arguments.dtype]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
    config = GenerateConfig(
        model=arguments.model, prompt=["-"], device="cpu", dtype=arguments.dtype
    )
    shape = config_for_generation(config)
    fast = load_for_generation(config.model, config, shape, device="cpu", rows=1)
    torch.set_num_threads(usable_cores())
    size = model.num_parameters() * dtype.itemsize
    floor = read_rate() / size
    eos = stop_tokens(model, AutoTokenizer.from_pretrained(arguments.model))
    print(
        f"{machine()}; {model.num_parameters():,} parameters, {arguments.dtype}, greedy, "
        f"medians of {arguments.rounds} after one warm-up, alternating; "
        f"{floor:,.0f} tokens/s read the weights once each, at {floor * size / 1e9:.0f} GB/s\n"
    )
    print("| prompts | tokens | llmctl tokens/s | generate tokens/s | ratio | same text |")
    print("|---|---|---|---|---|---|")
    begin = [[model.config.bos_token_id or 0]]
    for count in map(int, arguments.rows.split(",")):
        if count == 1:
            measure("1, from BOS", fast, model, begin, [arguments.tokens], arguments.rounds)
            continue
        draw = torch.Generator().manual_seed(1)
        lengths = (min(RESPONSE_LENGTHS[0], arguments.tokens - 1), arguments.tokens)
        limits = torch.randint(*lengths, (count,), generator=draw).tolist()
        prompts = mixed_prompts(fast, begin[0], eos, count)
        name = f"{count} of 4 to 60 tokens, ends differ"
        measure(name, fast, model, prompts, limits, arguments.rounds)


if __name__ == "__main__":
    main()
