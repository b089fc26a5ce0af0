"""Stages in order, in one process: `llmctl demo`.

Reads the text that every Python carries; writes a tokenize run and a pretrain run, prints samples.
"""

import json
import time
from pathlib import Path
from typing import Any

from llmctl.config.stages import DemoConfig, GenerateConfig, PretrainConfig, TokenizeConfig
from llmctl.console import duration, log
from llmctl.stages import generate, pretrain, tokenize

DATA = "builtin:python-docs"
PROMPTS = ["The for statement", "Return a", "If the object is"]


def run(config: DemoConfig) -> dict[str, Any] | None:
    """Tokenize, pretrain, generate; then say what to try next."""
    out = config.out or Path("runs/demo")
    common: dict[str, Any] = {"seed": config.seed, "overwrite": config.overwrite}
    tokenizing = TokenizeConfig(data=[DATA], out=out / "tok", **common)
    training = PretrainConfig(
        tokens=str(out / "tok"),
        out=out / "base",
        size="nano",
        momentum=0.9,
        eval_tokens=32_768,
        max_steps=config.max_steps,
        threads=config.threads,
        **common,
    )
    if config.dry_run:
        print(tokenizing.to_yaml("tokenize") + "---\n" + training.to_yaml("pretrain"), end="")
        return None
    started = time.monotonic()
    log.info("1/3  tokenize: Python's own documentation -> %s", out / "tok")
    tokenize.run(tokenizing)
    log.info("2/3  pretrain: a small language model, from scratch -> %s", out / "base")
    result = pretrain.run(training)
    assert result is not None
    log.info("3/3  generate: what it writes now")
    written = out / "samples.jsonl"
    generate.run(
        GenerateConfig(
            model=str(out / "base"),
            prompt=PROMPTS,
            max_new_tokens=60,
            seed=config.seed,
            out=written,
            overwrite=config.overwrite,
        )
    )
    samples = [json.loads(line) for line in written.read_text().splitlines()]
    for row in samples:
        log.info("\n  %s|%s", row["prompt"], "\n  ".join(row["response"].splitlines()))
    log.info("%s", _next_steps(out, time.monotonic() - started))
    return {**result, "stage": "demo", "out": str(out), "samples": samples}


def _next_steps(out: Path, seconds: float) -> str:
    return f"""
Done in {duration(seconds)}: from text to a model that writes. Try next:
  llmctl generate --model {out / "base"} --prompt "A string is" --temperature 0.7
  llmctl tokenize --data YOUR.txt -o runs/tok
  llmctl pretrain --tokens runs/tok -o runs/base
  llmctl pretrain --help"""
