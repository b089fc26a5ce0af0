"""Tokens per second of `llmctl pretrain` over a bare PyTorch loop on the same model and batch.

    python benchmarks/step_overhead.py

The bare loop is nothing but batch, forward, backward, clip, AdamW, zero_grad. Both sides train the
same architecture from the same tokens in this process, in turn; ours has its finite check, metrics,
signals and schedule in force, evaluation and saving once at the end and not counted.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from common import alternate, machine, ratio, show, table
from torch.nn.utils import clip_grad_norm_

from llmctl import console, hardware
from llmctl.commands import pretrain, tokenize
from llmctl.config.commands.pretrain import PretrainConfig
from llmctl.config.commands.tokenize import TokenizeConfig
from llmctl.data.shards import open_tokens
from llmctl.models import presets
from llmctl.models.loading import load_tokenizer
from llmctl.training.batches import Windows

CASES = {  # name -> dials, sequences, context, steps
    "0.8M": ({"size": "nano"}, 12, 64, 200),
    "10M": ({"layers": 6, "hidden": 384, "heads": 6}, 8, 128, 15),
}


def bare(config: PretrainConfig, steps: int) -> float:
    """Tokens per second of the shortest loop that trains."""
    torch.manual_seed(config.seed)
    index = open_tokens(Path(str(config.tokens)))
    tokenizer = load_tokenizer(str(config.tokens))
    model = presets.new_model(presets.new_config(config, "nano", index.vocab_size, tokenizer))
    assert config.context is not None
    assert config.batch_size is not None
    windows = Windows(index.train, config.context, config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    started = time.perf_counter()
    for step in range(steps):
        batch = windows.batch(step * config.batch_size, config.batch_size)
        inputs, targets = batch["input_ids"], batch["targets"]
        loss = model(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    taken = time.perf_counter() - started
    return steps * config.batch_size * config.context / taken


def ours(config: PretrainConfig) -> float:
    """Tokens per second that the command reports."""
    result = pretrain.run(config)
    assert result is not None
    return float(result["tokens_per_second"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=CASES)
    options = parser.parse_args()
    console.set_up(quiet=True)
    hardware.set_threads(None)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = folder / "tokens"
        tokenize.run(TokenizeConfig(data=["builtin:python-docs"], algorithm="byte", out=tokens))
        for case, (dials, size, context, steps) in CASES.items():
            if options.only not in (None, case):
                continue
            config = PretrainConfig(
                tokens=str(tokens),
                out=folder / case,
                overwrite=True,
                optimizer="adamw",
                batch_size=size,
                context=context,
                max_steps=steps,
                precision="fp32",
                eval_every=steps,
                save_every=steps,
                eval_tokens=1024,
                **dials,
            )
            sides = {
                "bare": lambda config=config, steps=steps: bare(config, steps),
                "llmctl": lambda config=config: ours(config),
            }
            alternate(sides, 1)
            found = alternate(sides, options.rounds)
            rows.append(
                [
                    case,
                    f"{size} x {context}",
                    show(found["bare"], 0),
                    show(found["llmctl"], 0),
                    f"{ratio(found['llmctl'], found['bare']):.3f}",
                ]
            )
    print(f"{machine()}; {options.rounds} rounds after one warm-up, alternating, medians\n")
    print(table(["parameters", "batch", "bare loop, tok/s", "llmctl, tok/s", "ratio"], rows))


if __name__ == "__main__":
    main()
