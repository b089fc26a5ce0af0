"""Causal language modelling from scratch or continued.

Reads token shards (or text and a tokenizer); writes the best checkpoint as `model/`.
"""

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from llmctl import checkpoint, hardware, rundir
from llmctl.config.stages import PretrainConfig
from llmctl.console import log, short
from llmctl.data.corpus import open_corpus
from llmctl.data.tokenizer import load_vocabulary
from llmctl.files import sha256_file
from llmctl.models import save_model
from llmctl.rundir import Run, open_run
from llmctl.training.loop import fit, resume
from llmctl.training.placement import make_accelerator
from llmctl.training.setup import Setup, build, prepare
from llmctl.training.state import weights
from llmctl.training.trainer import Trainer


def run(config: PretrainConfig) -> dict[str, Any] | None:
    """Train and return the final metrics; a finished run that is resumed is left untouched."""
    if (config.resume or config.resume_from) and rundir.is_complete(config.out):
        assert config.out is not None
        log.info("%s is already complete", config.out)
        return rundir.read_manifest(config.out)["result"]  # type: ignore[no-any-return]
    threads = hardware.set_threads(config.threads or _earlier_threads(config))
    accelerator, device = make_accelerator(config)
    if config.dry_run:
        _show(config, accelerator, device)
        return None
    with open_run("pretrain", config) as run:
        tokens, inputs = _tokens(config, run)
        accelerator.wait_for_everyone()
        setup = prepare(config, tokens, accelerator, device)
        run.record(threads=threads, inputs=inputs, **setup.facts())
        trainer = build(config, setup, run)
        _resume(config, trainer)
        with hardware.memory_errors():
            metrics = fit(trainer)
        _export(trainer, setup)
        accelerator.wait_for_everyone()
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
    with open_corpus(config) as corpus:
        inputs = corpus.inputs()
        if not (config.resume and (run.path / "tokens" / "index.json").exists()):
            vocabulary, save_tokenizer = load_vocabulary(str(config.tokenizer or config.model))
            save_tokenizer(run.path / "tokenizer")
            corpus.write(run.path / "tokens", vocabulary)
    return run.path, inputs


def _earlier_threads(config: PretrainConfig) -> int | None:
    """The threads of the run that is resumed: another number sums in another order."""
    if not config.resume or config.out is None:
        return None
    return rundir.read_manifest(config.out).get("threads")


def _show(config: PretrainConfig, accelerator: Accelerator, device: str) -> None:
    """Check what can be checked without writing; print the recipe, and the plan on stderr."""
    if config.tokens is not None:
        prepare(config, Path(config.tokens).expanduser(), accelerator, device)
    else:
        load_vocabulary(str(config.tokenizer or config.model))
        with open_corpus(config) as corpus:
            documents, size = corpus.scan.documents, corpus.bytes
        log.info("would first encode %s documents, %sB of text", f"{documents:,}", short(size))
    if accelerator.is_main_process:
        print(config.to_yaml("pretrain"), end="")


def _resume(config: PretrainConfig, trainer: Trainer) -> None:
    root = trainer.run.checkpoints
    if trainer.rank == 0 and root.is_dir():
        checkpoint.clean(root)
    trainer.accelerator.wait_for_everyone()
    path = config.resume_from or (checkpoint.newest(root) if config.resume else None)
    if path is not None:
        resume(trainer, checkpoint.load(path, trainer.identity, trainer.rank))
        if path.resolve().parent != root.resolve():
            trainer.progressed.forget_best()  # its weights are not in this run
        log.info("resuming from %s", path)
    trainer.run.forget_metrics_after(trainer.progressed.step)


def _export(trainer: Trainer, setup: Setup) -> None:
    """Write `model/`: the best checkpoint by validation loss, the last where none was measured."""
    best, current = trainer.progressed.best_step, weights(trainer.model)
    if trainer.rank != 0:
        return
    if best is not None and best != trainer.progressed.step:
        current = checkpoint.load_weights(trainer.run.checkpoints / f"checkpoint-{best}")
    model = trainer.accelerator.unwrap_model(trainer.model)
    save_model(model, current, setup.tokenizer, trainer.run.path / "model")
