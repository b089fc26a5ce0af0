"""Causal language modelling from scratch or continued.

Reads token shards (or text and a tokenizer); writes the best checkpoint as `model/`.
"""

from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from llmctl import hardware
from llmctl.config.commands.pretrain import PretrainConfig
from llmctl.console import log
from llmctl.data.corpus import open_corpus, tokenize_once
from llmctl.data.tokenizer.load import load_vocabulary
from llmctl.files import sha256_file
from llmctl.numbers import byte_size, counted
from llmctl.runs.directory import Run
from llmctl.runs.resume import earlier_manifest
from llmctl.training.base_model import base_of
from llmctl.training.consistency import require_same
from llmctl.training.export import export_pretrained
from llmctl.training.fault_tolerance import together
from llmctl.training.loop import train
from llmctl.training.pretrain import build_pretraining, prepare_pretraining, with_largest_batch
from llmctl.training.stage import run_stage


def run(config: PretrainConfig) -> dict[str, Any] | None:
    """Train and return the final metrics."""
    return run_stage("pretrain", config, partial(_show, config), partial(_pretrain, config))


def _pretrain(
    config: PretrainConfig, run: Run, accelerator: Accelerator, device: str
) -> dict[str, Any]:
    """Tokenize where text is given; prepare, train, export; return the result."""
    known = earlier_manifest(config).get("plan")
    with together(accelerator):
        tokens, inputs = _tokens(config, run)
    with together(accelerator):
        prepared = prepare_pretraining(config, tokens, accelerator, device)
    if config.find_batch_size:
        prepared = with_largest_batch(config, prepared, known)
    models = [base_of(config.model)] if config.model else []
    require_same(accelerator, {"model": [model.sha256 for model in models]})
    run.record(inputs=[*inputs, *(model.as_input() for model in models)], **prepared.facts())
    values = prepared.hyperparameters
    with hardware.memory_errors(values.batch_size, values.grad_accum):
        trainer = build_pretraining(config, prepared, run)
        metrics = train(trainer, config)
    written = export_pretrained(trainer, prepared.tokenizer)
    return {**written, "parameters": prepared.parameters, **metrics}


def _tokens(config: PretrainConfig, run: Run) -> tuple[Path, list[dict[str, Any]]]:
    """Return the folder of tokenizer/ and tokens/, and the inputs; --data is tokenized first."""
    if config.tokens is not None:
        folder = Path(config.tokens).expanduser()
        index = folder / "tokens" / "index.json"
        digest = sha256_file(index) if index.is_file() else None
        return folder, [{"role": "tokens", "path": config.tokens, "sha256": digest}]
    if not run.is_main:
        return run.path, []
    written = run.manifest.get("encoded") if config.resume else None
    reference = str(config.tokenizer or config.model)
    inputs, encoded = tokenize_once(config, reference, run.path, written)
    run.record(encoded=encoded)
    return run.path, inputs


def _show(config: PretrainConfig, accelerator: Accelerator, device: str) -> dict[str, Any] | None:
    """Check what can be checked without writing; print the recipe, and the plan on stderr."""
    from llmctl.planning.outlook import show_dry_run  # which training does without
    from llmctl.planning.recipe import corpus_outlook, pretrain_outlook

    if config.tokens is not None:
        prepared = prepare_pretraining(
            config, Path(config.tokens).expanduser(), accelerator, device
        )
        outlook = pretrain_outlook(prepared.hyperparameters, prepared.architecture, device)
    else:
        vocabulary, _ = load_vocabulary(str(config.tokenizer or config.model))
        with open_corpus(config) as corpus:
            documents, size = corpus.scan.documents, corpus.bytes
        documents_text = counted(documents, "document")
        log.info("would first encode %s, %s of text", documents_text, byte_size(size))
        outlook = corpus_outlook(config, vocabulary.size, size, accelerator.num_processes, device)
    return show_dry_run("pretrain", config, outlook)
