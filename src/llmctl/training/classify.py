"""`llmctl sft --task classify`: labelled texts and any model in, a classifier or an adapter out."""

from dataclasses import asdict, dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import TrainingArguments

from llmctl import hardware
from llmctl.adapters import save_adapter
from llmctl.config.stages import SftConfig
from llmctl.console import log
from llmctl.data.labelled import Labelled, load_labelled, log_labelled
from llmctl.embeddings import grow_embeddings
from llmctl.files import writing
from llmctl.headed import load_classifier, require_padding_unseen, require_positions
from llmctl.merging import merge_model
from llmctl.models import write_folder
from llmctl.quantized import HEADS
from llmctl.rundir import Run
from llmctl.training.adapters import adapt
from llmctl.training.base import Base, base_of, require_whole
from llmctl.training.classifier import Batches, Classifier
from llmctl.training.export import best_weights
from llmctl.training.guard import together
from llmctl.training.trl import Terms
from llmctl.training.tuned import announce, common_arguments, make_plan
from llmctl.training.tuning import TuningPlan, rhythm_of


@dataclass(frozen=True)
class Classification:
    """What is known once the model is loaded."""

    model: Any
    plan: TuningPlan
    train: Batches
    val: Batches | None
    parameters: int
    trained_parameters: int
    base: Base


def run_classifier(
    config: SftConfig, run: Run, accelerator: Accelerator, device: str
) -> dict[str, Any]:
    """Train, export; what came of it. Collective.

    Raises:
        DataError: data that would train a wrong model.
        ModelError: a model that does not load, or cannot classify.
    """
    with together(accelerator):
        data, found = check_classifier(config, accelerator, device)
    run.record(
        inputs=[found.base.as_input(), *data.split.inputs],
        device=hardware.device_name(device),
        parameters=found.parameters,
        plan=asdict(found.plan),
        labels=list(data.labels),
        audit=data.facts(),
        held_out=[example.name for example in data.split.val],
    )
    with hardware.memory_errors(found.plan.batch_size, found.plan.grad_accum):
        trainer = _build(config, data, found, run, device)
        metrics = trainer.fit(config)
    counts = {"parameters": found.parameters, "trained_parameters": found.trained_parameters}
    return {**counts, **_export(config, trainer, found, data), **metrics}


def check_classifier(
    config: SftConfig, accelerator: Accelerator, device: str
) -> tuple[Labelled, Classification]:
    """Load data and model, find them to be sound, and make the plan: all that a dry run does.

    Raises:
        DataError: data that would train a wrong model.
        ModelError: a model that does not load, cannot classify, or whose answer padding changes.
        UserError: settings that do not go together.
        ResourceError: an optimizer or a precision that does not run here.
    """
    require_whole(accelerator, "sft")
    data = load_labelled(config)
    if accelerator.is_main_process:
        log_labelled(data)
    set_seed(config.seed)
    loaded = load_classifier(config.model, data.labels)
    model: Any = loaded.model
    grow_embeddings(model, data.tokenizer)
    pad = model.config.get_text_config().pad_token_id = int(data.tokenizer.pad_token_id)
    train = Batches(data.train, pad)
    val = None if data.val is None else Batches(data.val, pad)
    require_positions(model, max(int(texts.texts.lengths.max()) for texts in (train, val or train)))
    order = data.train.lengths.argsort()
    shortest, longest = (data.train.text(int(number)).tolist() for number in order[[0, -1]])
    require_padding_unseen(model.to(device), shortest, longest, pad)
    if config.has_adapter:
        model = adapt(
            model, config, task="classify", new_modules=sorted(loaded.new_modules - set(HEADS))
        )
    plan, trained, parameters = make_plan(config, model, len(train), accelerator, device)
    if accelerator.is_main_process:
        announce(plan, trained, parameters, "texts")
    base = base_of(config.model)
    return data, Classification(model, plan, train, val, parameters, trained, base)


def _build(
    config: SftConfig, data: Labelled, found: Classification, run: Run, device: str
) -> Classifier:
    """The trainer, ready to fit."""
    identity = {
        **found.plan.identity(),
        "data": data.train.digest(),
        "validation": None if data.val is None else data.val.digest(),
        "model": found.base.sha256,
        "max_length": data.max_length,
    }
    terms = Terms(run, rhythm_of(config, found.plan), identity, config.group_by_length)
    arguments = TrainingArguments(**common_arguments(config, found.plan, device))
    return Classifier(found.model, found.train, found.val, found.plan, arguments, terms)


def _export(
    config: SftConfig, trainer: Classifier, found: Classification, data: Labelled
) -> dict[str, Any]:
    """Write the weights that validated best, the last where none did; say where. Collective.

    Raises:
        ModelError: an adapter and its merged model do not agree.
        ResourceError: the disk is full.
    """
    job = trainer.job
    state = best_weights(trainer, has_adapter=config.has_adapter)
    with together(job.accelerator), writing(job.run.path):
        if job.rank != 0:
            return {}
        # without the autocast that Accelerate puts around it
        model = job.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        folder, adapter = job.run.path / "model", job.run.path / "adapter"
        if not config.has_adapter:
            write_folder(model, state, data.tokenizer, folder)
            return {"model": str(folder)}
        save_adapter(
            model,
            data.tokenizer,
            adapter,
            base=found.base.reference,
            base_sha256=found.base.sha256,
            generation_config=None,
        )
        model.config.save_pretrained(adapter)  # nothing else names the labels
        if not config.merge:
            return {"model": str(adapter)}
        merged, difference = merge_model(model.to("cpu"))
        write_folder(merged, merged.state_dict(), data.tokenizer, folder)
        log.info("merged: logits differ from the adapter's by at most %.2g", difference)
        return {
            "model": str(folder),
            "adapter": str(adapter),
            "merge_difference": difference,
        }
