"""`llmctl tokenize`: text in, a tokenizer and token shards out."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmctl.config.commands.tokenize import TokenizeConfig
from llmctl.console import log, show_recipe
from llmctl.data.corpus import CheckedCorpus, open_corpus
from llmctl.data.tokenizer.load import Vocabulary, load_vocabulary, vocabulary_of
from llmctl.data.tokenizer.train import BOS, EOS, UNKNOWN, save_tokenizer, train_tokenizer
from llmctl.files import sha256_folder
from llmctl.models.hub import model_input
from llmctl.numbers import counted, short_number
from llmctl.runs.directory import open_run, resolve_tokenizer


def run(config: TokenizeConfig) -> dict[str, Any] | None:
    """Check the data, train or load the tokenizer, encode; None after a dry run."""
    if config.threads is not None:
        os.environ["RAYON_NUM_THREADS"] = str(config.threads)
    if config.dry_run:
        return _dry_run(config)
    with open_run("tokenize", config) as run, open_corpus(config) as corpus:
        vocabulary, save = _vocabulary(config, corpus)
        inputs = corpus.inputs()
        if config.tokenizer is not None:
            folder = Path(resolve_tokenizer(config.tokenizer))
            digest = sha256_folder(folder) if folder.is_dir() else None
            inputs += [model_input("tokenizer", config.tokenizer, digest)]
        run.record(inputs=inputs)
        save(run.path / "tokenizer")
        metrics = corpus.write(run.path / "tokens", vocabulary)
        run.log(metrics)
        _log_metrics(metrics)
        result = {
            "stage": "tokenize",
            "out": str(config.out),
            "tokenizer": str(run.path / "tokenizer"),
            "status": "completed",
            **metrics,
        }
        run.record(result=result)
    return result


def _vocabulary(
    config: TokenizeConfig, corpus: CheckedCorpus
) -> tuple[Vocabulary, Callable[[Path], None]]:
    """Return the tokenizer to encode with, and a function that saves it."""
    if config.tokenizer is not None:
        return load_vocabulary(config.tokenizer)
    tokenizer = train_tokenizer(
        corpus.sample(config.train_bytes),
        config.algorithm,
        vocab_size=config.vocab_size,
        text_bytes=corpus.scan.bytes,
        special_tokens=config.special_token,
        min_frequency=config.min_frequency,
    )
    vocabulary = vocabulary_of(tokenizer, eos=EOS, bos=BOS, unknown=UNKNOWN)
    log.info("tokenizer: %s, %s tokens", config.algorithm, f"{vocabulary.size:,}")
    return vocabulary, lambda folder: save_tokenizer(tokenizer, folder)


def _dry_run(config: TokenizeConfig) -> dict[str, Any] | None:
    """Read and check all data, and log the plan."""
    with open_corpus(config) as corpus:
        if config.tokenizer is not None:
            load_vocabulary(config.tokenizer)
        log.info(
            "would encode %s, %s MB of text, with %s, into %s",
            counted(corpus.scan.documents, "document"),
            f"{corpus.bytes / 1e6:,.1f}",
            config.tokenizer or f"a new {config.algorithm} tokenizer",
            config.out or "--out",
        )
        plan = {"documents": corpus.scan.documents, "bytes": corpus.bytes}
    return show_recipe("tokenize", config, plan)


def _log_metrics(metrics: dict[str, Any]) -> None:
    log.info(
        "%s (%s for validation) of %s, %s MB of text",
        counted(metrics["tokens"], "token"),
        f"{metrics['val_tokens']:,}",
        counted(metrics["documents"], "document"),
        f"{metrics['bytes'] / 1e6:,.1f}",
    )
    log.info(
        "%.3f bytes per token, %s tokens/s, %.3g %% unknown, %.1f %% of %s vocabulary entries used",
        metrics["bytes_per_token"],
        short_number(metrics["tokens_per_second"]),
        100 * metrics["unknown_rate"],
        100 * metrics["vocab_used"],
        f"{metrics['vocab_size']:,}",
    )
    for name in ("longest", "shortest"):
        at = metrics[f"{name}_document"]
        place = f"{at['file']}:{at['line']}" if at["line"] else at["file"]
        log.info("%s document: %s (%s)", name, counted(at["tokens"], "token"), place)
