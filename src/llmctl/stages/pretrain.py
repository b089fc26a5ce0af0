"""Causal language modelling from scratch or continued.

Reads token shards (or text and a tokenizer); writes the best checkpoint as `model/`.
"""

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from llmctl import hardware
from llmctl.config.stages import PretrainConfig
from llmctl.console import log, short
from llmctl.data.corpus import encode_once, open_corpus
from llmctl.data.tokenizer import load_vocabulary
from llmctl.files import sha256_file, writing
from llmctl.models import save_model
from llmctl.planning.pretraining import foreseen_pretrain, guessed
from llmctl.planning.show import show_dry_run
from llmctl.resume import earlier_manifest, load_weights
from llmctl.rundir import Run
from llmctl.training.base import base_of
from llmctl.training.guard import open_together, together
from llmctl.training.loop import fit, resume
from llmctl.training.placement import make_accelerator
from llmctl.training.setup import Setup, build, prepare, with_largest_batch
from llmctl.training.state import weights
from llmctl.training.trainer import Trainer


def run(config: PretrainConfig) -> dict[str, Any] | None:
    """Train and return the final metrics."""
    earlier = earlier_manifest(config)
    threads = hardware.set_threads(config.threads or earlier.get("threads"))
    accelerator, device = make_accelerator(config)
    if config.dry_run:
        return _show(config, accelerator, device)
    with open_together(accelerator, "pretrain", config) as run:
        with together(accelerator):
            tokens, inputs = _tokens(config, run)
        with together(accelerator):
            setup = prepare(config, tokens, accelerator, device)
        if config.find_batch_size:
            setup = with_largest_batch(config, setup, earlier.get("plan"))
        models = [base_of(config.model).as_input()] if config.model else []
        run.record(threads=threads, inputs=[*inputs, *models], **setup.facts())
        with hardware.memory_errors(setup.plan.batch_size, setup.plan.grad_accum):
            trainer = build(config, setup, run)
            resume(trainer, config)
            run.keep_recipe(config)
            metrics = fit(trainer)
        _export(trainer, setup)
        result = {
            "stage": "pretrain",
            "out": str(run.path),
            "model": str(run.path / "model"),
            "status": "completed",
            "parameters": setup.parameters,
            **metrics,
        }
        run.record(result=result)
    return result


def _tokens(config: PretrainConfig, run: Run) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of tokenizer/ and tokens/, and the run's inputs; --data is tokenized first."""
    if config.tokens is not None:
        folder = Path(config.tokens).expanduser()
        index = folder / "tokens" / "index.json"
        digest = sha256_file(index) if index.is_file() else None
        return folder, [{"role": "tokens", "path": config.tokens, "sha256": digest}]
    if not run.is_main:
        return run.path, []
    written = run.manifest.get("encoded") if config.resume else None
    reference = str(config.tokenizer or config.model)
    inputs, encoded = encode_once(config, reference, run.path, written)
    run.record(encoded=encoded)
    return run.path, inputs


def _show(config: PretrainConfig, accelerator: Accelerator, device: str) -> dict[str, Any] | None:
    """Check what can be checked without writing; print the recipe, and the plan on stderr."""
    if config.tokens is not None:
        setup = prepare(config, Path(config.tokens).expanduser(), accelerator, device)
        found = foreseen_pretrain(setup.plan, setup.architecture, device)
    else:
        vocabulary, _ = load_vocabulary(str(config.tokenizer or config.model))
        with open_corpus(config) as corpus:
            documents, size = corpus.scan.documents, corpus.bytes
        log.info("would first encode %s documents, %sB of text", f"{documents:,}", short(size))
        found = guessed(config, vocabulary.size, size, accelerator.num_processes, device)
    return show_dry_run("pretrain", config, found)


def _export(trainer: Trainer, setup: Setup) -> None:
    """Write `model/`: the best checkpoint by validation loss, the last where none was measured."""
    job = trainer.job
    best, current = job.progressed.best_step, weights(trainer.model, job.rank)
    with together(job.accelerator), writing(job.run.path):
        if job.rank != 0:
            return
        if best is not None and best != job.progressed.step:
            current = load_weights(job.run.checkpoints / f"checkpoint-{best}")
        model = job.accelerator.unwrap_model(trainer.model)
        save_model(model, current, setup.tokenizer, job.run.path / "model")
