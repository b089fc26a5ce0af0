"""Stages in order, in one process: `llmctl demo`.

Reads the text that every Python carries; writes a run of each stage, prints samples.
"""

import json
import time
from pathlib import Path
from typing import Any

from llmctl.claim import SAMPLES
from llmctl.config.stages import (
    DemoConfig,
    GenerateConfig,
    PretrainConfig,
    SftConfig,
    TokenizeConfig,
)
from llmctl.console import duration, log
from llmctl.dryrun import show_recipes
from llmctl.stages import generate, pretrain, sft, tokenize

DATA = "builtin:python-docs"
TASKS = "builtin:tasks"
PROMPTS = ["The for statement", "Return a", "If the object is"]


def run(config: DemoConfig) -> dict[str, Any] | None:
    """Tokenize, pretrain, generate, fine-tune; then say what to try next."""
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
    tuning = SftConfig(
        model=str(out / "base"),
        data=[TASKS],
        out=out / "sft",
        max_steps=config.max_steps,
        samples=3,
        sample_tokens=16,
        threads=config.threads,
        **common,
    )
    if config.dry_run:
        recipes = [("tokenize", tokenizing), ("pretrain", training), ("sft", tuning)]
        return show_recipes(recipes, as_json=config.as_json)
    started = time.monotonic()
    log.info("1/4  tokenize: Python's own documentation -> %s", out / "tok")
    tokenize.run(tokenizing)
    log.info("2/4  pretrain: a small language model, from scratch -> %s", out / "base")
    result = pretrain.run(training)
    assert result is not None
    log.info("3/4  generate: what it writes now")
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
    log.info("4/4  sft: it learns to answer, on small tasks made on the spot -> %s", out / "sft")
    sft.run(tuning)
    for answer in _answers(out / "sft"):
        log.info("  %s  ->  %s", answer["prompt"], answer["response"])
    log.info("%s", _next_steps(out, time.monotonic() - started))
    return {**result, "stage": "demo", "out": str(out), "samples": samples}


def _answers(run: Path) -> list[dict[str, Any]]:
    """What the fine-tuned model said last."""
    rows = [json.loads(line) for line in (run / SAMPLES).read_text().splitlines()]
    return [row for row in rows if row["step"] == rows[-1]["step"]]


def _next_steps(out: Path, seconds: float) -> str:
    return f"""
Done in {duration(seconds)}: from text to a model that writes. Try next:
  llmctl generate --model {out / "base"} --prompt "A string is" --temperature 0.7
  llmctl chat --model {out / "sft"}
  llmctl tokenize --data YOUR.txt -o runs/tok
  llmctl pretrain --tokens runs/tok -o runs/base
  llmctl pretrain --help"""
