"""The model that a run trains further: loaded, fitted to its tokenizer, adapted, made ready.

In: a reference to a model and what its data needs. Out: the model with its rows and its
hyperparameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llmctl import hardware
from llmctl.config.commands.dpo import DpoConfig
from llmctl.config.commands.ppo import PpoConfig
from llmctl.config.commands.reward import RewardConfig
from llmctl.config.commands.sft import SftConfig
from llmctl.config.finetuning import Quantized, Samples, Tuning
from llmctl.console import log
from llmctl.errors import ModelError, UserError
from llmctl.models import presets
from llmctl.models.adapters import is_adapted, weights_sha256
from llmctl.models.classifiers import load_classifier, require_padding_unseen, require_positions
from llmctl.models.hub import model_input
from llmctl.models.loading import (
    grow_embeddings,
    load_causal_lm,
    load_config,
    local_folder,
    set_generation_tokens,
    trainable_parameters,
)
from llmctl.models.quantized import HEADS, LoadIn, require_full
from llmctl.numbers import counted, short_number
from llmctl.runs.directory import Run, resolve_model
from llmctl.runs.resume import earlier_manifest
from llmctl.training.batches import Batch, Order, RowBatches, Rows, on_device, validation_shares
from llmctl.training.distributed import autocast, is_sharded
from llmctl.training.evaluation_share import (
    TRAINED,
    Work,
    announce_evaluation,
    plan_rows,
    spread,
)
from llmctl.training.hyperparameters import Hyperparameters, for_finetuning
from llmctl.training.loop import Trainer, assemble
from llmctl.training.objective import Loss, Objective, Validation
from llmctl.training.probe import agreed_batch, checkpoint_activations, fitting_batch
from llmctl.training.samples import sampled_tokens
from llmctl.training.state import architecture

if TYPE_CHECKING:
    from llmctl.data.classification import ClassificationData
    from llmctl.data.preference_pairs import PreferenceData
    from llmctl.data.sft import SftData

    LanguageData = SftData | PreferenceData
    """Encoded for a language model, in which a chat template may have added tokens."""


@dataclass(frozen=True)
class Base:
    """The model that a run starts from."""

    reference: str
    """As it was given."""
    sha256: str
    """Digest of its weights."""

    def as_input(self) -> dict[str, Any]:
        """For the manifest."""
        return model_input("model", self.reference, self.sha256)


def base_of(reference: str) -> Base:
    """Identify a model by reference and weights, for manifest and checkpoints."""
    return Base(reference, weights_sha256(local_folder(resolve_model(reference))))


def load_language_model(
    config: SftConfig | DpoConfig, data: LanguageData, device: str
) -> tuple[Any, list[int]]:
    """Load the model, with a row for every token and an adapter where one is to be trained.

    Also returns the tokens that end what it writes.

    Raises:
        ModelError: the model does not load, or is an adapter.
        UserError: targets of an adapter that do not go.
    """
    set_seed(config.seed)
    model = load_base(config, device)
    grow_embeddings(model, data.tokenizer)
    stops = set_generation_tokens(model, data.tokenizer, data.end_of_turn)
    if config.has_adapter:
        from llmctl.training.adapters import adapt  # peft, which takes long to import

        model = adapt(model, config, added_tokens=new_tokens_of(model, data))
    return model, stops


def load_with_head(
    config: SftConfig | RewardConfig,
    labels: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    texts: tuple[Sequence[int], Sequence[int]],
    device: str,
    *,
    longest: int,
    new_tokens: Callable[[Any], Sequence[int]] = lambda model: (),
    drops: bool = True,
) -> Any:
    """Load the model with a head for these labels, with an adapter where one is to be trained.

    Padding must not change the answer to `texts`, the shortest and the longest as tokens; `longest`
    also counts those of validation. `new_tokens` gives the rows of the grown model that an adapter
    trains by themselves; `drops` says whether the model keeps its dropout.

    Raises:
        ModelError: the model does not load, has no such head, or padding changes its answer.
        UserError: texts longer than the model's positions, or targets of an adapter that do not go.
    """
    set_seed(config.seed)
    loaded = load_classifier(config.model, labels)
    model: Any = loaded.model
    grow_embeddings(model, tokenizer)
    pad = model.config.get_text_config().pad_token_id = int(tokenizer.pad_token_id)
    if not drops:
        without_dropout(model)
    require_positions(model, longest)
    require_padding_unseen(model.to(device), *texts, pad)
    if config.has_adapter:
        from llmctl.training.adapters import adapt  # peft, which takes long to import

        model = adapt(
            model,
            config,
            added_tokens=new_tokens(model),
            task="classify",
            new_modules=sorted(loaded.new_modules - set(HEADS)),
        )
    return model


def without_dropout(model: nn.Module) -> None:
    """Switch dropout off: layers, and numbers that attention is called with, as in LLaMA.

    With any of it two passes of one model differ, and tell two responses apart that are the same.
    Call it before an adapter is added to keep the adapter's own.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def new_tokens_of(model: Any, data: LanguageData) -> list[int]:
    """Rows of the grown embedding that are new, tokens of the chat template among them."""
    added = set(data.tokenizer.convert_tokens_to_ids(list(data.added_tokens)))
    grown = range(data.embedding_rows, model.get_input_embeddings().weight.shape[0])
    return sorted({*added, *grown})


def load_in(config: Quantized) -> LoadIn:
    """How the weights are to be held."""
    return "4bit" if config.load_in_4bit else "8bit" if config.load_in_8bit else "full"


@dataclass(frozen=True)
class Loaded:
    """A run once its model is loaded."""

    hyperparameters: Hyperparameters
    base: Base
    parameters: int
    trained_parameters: int

    @property
    def sizes(self) -> dict[str, int]:
        """Parameters, for the result."""
        return {"parameters": self.parameters, "trained_parameters": self.trained_parameters}

    def facts(self, inputs: Sequence[dict[str, Any]], device: str, **more: Any) -> dict[str, Any]:
        """Return the manifest's entries, and `more` that only one method has."""
        return {
            "inputs": [self.base.as_input(), *inputs],
            "device": hardware.device_name(device),
            "parameters": self.parameters,
            "plan": self.hyperparameters.as_json(),
            **more,
        }


@dataclass(frozen=True)
class Prepared(Loaded):
    """A run with its model and rows."""

    model: Any
    """With its adapter, where one is to be trained; in training mode, on the device."""
    train: Rows
    val: Rows | None
    stops: list[int]
    """Tokens that end a response, for the generation config; of a classifier none."""
    is_classifier: bool
    """Whether it gives numbers for a text, and no next token."""

    @property
    def batch(self) -> tuple[int, int]:
        """Batch size and accumulation of a step."""
        return self.hyperparameters.batch_size, self.hyperparameters.grad_accum

    def identity(self, data: LanguageData | ClassificationData, config: Tuning) -> dict[str, Any]:
        """Return what decides the weights beside hyperparameters: a resumed run must share it."""
        model = self.model
        adapters = model.peft_config.values() if is_adapted(model) else ()
        return {
            "data": data.train.digest(),
            "validation": None if data.val is None else data.val.digest(),
            "model": self.base.sha256,
            "max_length": data.max_length,
            "group_by_length": config.group_by_length,
            "architecture": architecture(model.config),
            "adapter": [_adapter_identity(adapter.to_dict()) for adapter in adapters],
        }

    def validation(self, accelerator: Accelerator, device: str) -> Validation | None:
        """Validation over the rows in batches of like length, each row on one process."""
        rows, values = self.val, self.hyperparameters
        if rows is None:
            return None
        rank, world = accelerator.process_index, accelerator.num_processes
        read = spread(len(rows), values.eval_rows or len(rows))
        lengths = [rows.lengths[number] for number in read]

        def batches() -> Iterator[tuple[Batch, bool]]:
            for places, counts in validation_shares(lengths, values.batch_size, rank, world):
                yield rows.batch([read[place] for place in places]), counts

        return Validation(batches, accelerator, device, values.precision)

    def assemble(
        self,
        config: Tuning,
        data: LanguageData | ClassificationData,
        run: Run,
        accelerator: Accelerator,
        device: str,
        objective: Objective,
        *,
        settings: Mapping[str, Any],
        sample: Callable[[int], None] = lambda step: None,
        watch: Callable[[dict[str, float]], None] = lambda figures: None,
    ) -> Trainer:
        """Put the trainer together; `settings` are what the method adds to the identity."""
        values, lengths = self.hyperparameters, self.train.lengths
        order = Order(
            len(self.train),
            batch_size=values.batch_size,
            grad_accum=values.grad_accum,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            seed=config.seed,
            lengths=lengths if config.group_by_length else None,
        )
        return assemble(
            config,
            run,
            accelerator,
            device,
            self.model,
            values,
            objective,
            RowBatches(self.train, order),
            identity={**self.identity(data, config), **settings},
            tokenizer=data.tokenizer,
            validates=self.val is not None,
            flops_per_token=flops_of(self.model, round(sum(lengths) / len(self.train)), device),
            sample=sample,
            watch=watch,
        )


def prepare(
    config: SftConfig | RewardConfig | DpoConfig,
    unit: str,
    model: Any,
    train: Rows,
    val: Rows | None,
    accelerator: Accelerator,
    device: str,
    *,
    loss: Callable[[Any, Batch], Loss],
    check: Callable[[], None] = lambda: None,
    stops: Sequence[int] = (),
    is_classifier: bool = False,
) -> Prepared:
    """Fill in the hyperparameters and check the model, on its device; say what will train.

    `loss` of a model on a batch shows how large a batch fits; `check` looks at the model, under
    autocast. `unit` is what a batch is made of, for the announcement.

    Raises:
        ModelError: a check failed.
        UserError: quantized weights under FSDP.
        ResourceError: an optimizer or a precision that does not run here.
    """
    _require_shardable(config, accelerator)
    trained, total = trainable_parameters(model)
    world = accelerator.num_processes
    values = for_finetuning(
        config, parameters=total, rows=len(train), world_size=world, device=device
    )
    if values.precision == "pure-bf16":
        to_pure_bf16(model, values.lr)
    model.to(device)
    with autocast(values.precision, device):
        check()
    if config.find_batch_size:
        values = _with_largest_batch(config, values, model, train, loss, accelerator, device)
    writes = isinstance(config, Samples) and not is_classifier
    values = _with_evaluation(config, values, train, val, writes=writes)
    if config.activation_checkpointing:
        checkpoint_activations(model)
    if accelerator.is_main_process:
        _announce(values, trained, total, unit)
        rows = 0 if val is None else len(val)
        announce_evaluation(
            values, read=values.eval_rows or rows, total=rows, unit=unit.removesuffix("s")
        )
    set_seed(config.seed)  # what the checks drew must not change what training draws
    loaded = (values, base_of(config.model), total, trained)
    return Prepared(*loaded, model.train(), train, val, list(stops), is_classifier)


def require_prompts(config: SftConfig | DpoConfig, val: object, unit: str) -> None:
    """Raise a UserError for prompts of samples that would never be answered."""
    if config.sample_prompt and val is None:
        raise UserError(
            "--sample-prompt is answered at every evaluation, and there is no validation data",
            hint=f"drop it, or hold some {unit} out: --val-size",
        )


def flops_of(model: Any, length: int, device: str) -> float | None:
    """Training FLOPs of a model for a token; None where no peak is known to compare them with.

    What is frozen needs no gradient of its weights, a third of the products.
    """
    if hardware.peak_flops(device) is None:
        return None
    total = sum(weight.numel() for weight in model.parameters())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    active = presets.active_parameters(model)
    config = model.config.get_text_config()
    return presets.flops_per_token(active, config, length, trained=active * trained / total)


def to_pure_bf16(model: nn.Module, lr: float) -> None:
    """Give a model weights in bf16, and say what that means."""
    log.warning(
        "pure bf16 weights: updates smaller than 1/256 of a weight vanish, and at a learning rate "
        "of %g most of them may be",
        lr,
    )
    for weight in model.parameters():  # buffers such as rotary frequencies stay exact
        weight.data = weight.data.to(torch.bfloat16)


def _require_shardable(config: Tuning, accelerator: Accelerator) -> None:
    if is_sharded(accelerator) and isinstance(config, Quantized) and config.is_quantized:
        raise UserError(
            "FSDP is in force, and quantized weights have not been made to work under it",
            hint="drop --load-in-4bit and --load-in-8bit, or use DDP (recipes/accelerate/ddp.yaml)",
        )


def _with_largest_batch(
    config: Tuning,
    values: Hyperparameters,
    model: Any,
    train: Rows,
    loss: Callable[[Any, Batch], Loss],
    accelerator: Accelerator,
    device: str,
) -> Hyperparameters:
    """Cut a step into the largest micro-batches that fit. Collective."""

    def loss_of(copied: Any, numbers: list[int]) -> Tensor:
        with autocast(values.precision, device):
            return loss(copied, on_device(train.batch(numbers), device)).total

    return agreed_batch(
        lambda total: fitting_batch(model, loss_of, train.lengths, total, config),
        values,
        earlier_manifest(config).get("plan"),
        accelerator,
        device,
    )


def _with_evaluation(
    config: SftConfig | RewardConfig | DpoConfig,
    values: Hyperparameters,
    train: Rows,
    val: Rows | None,
    *,
    writes: bool,
) -> Hyperparameters:
    """Plan the evaluations on validation rows, and the texts that it `writes` at them.

    A pair is taken for two texts as long as its longer side. Of rows that were held out by default
    an evaluation may read a part; those that the user gave or counted are all read.
    """
    lengths = [] if val is None else val.lengths
    sides = 1 if isinstance(config, SftConfig) else 2
    # the reference below an adapter is asked at each step; another one has read all pairs before
    passes = 1 if isinstance(config, DpoConfig) and config.has_adapter else 0
    pieces = [sides * length for length in lengths]
    samples = 0.0
    if writes and lengths:
        assert isinstance(config, Samples)
        samples = sampled_tokens(config, sum(lengths) / len(lengths))
    work = Work(
        step=(TRAINED + passes) * values.rows_per_step * sides * sum(train.lengths) / len(train),
        pieces=pieces,
        samples=samples,
        # dpo's reference reads the validation pairs, and a reward model is judged on them
        once=0 if isinstance(config, SftConfig) else sum(pieces),
    )
    is_open = not (config.val_data or config.val_fraction or config.val_size)
    return plan_rows(values, config, work, is_open=is_open)


def _announce(values: Hyperparameters, trained: int, parameters: int, unit: str) -> None:
    """Say what trains, for how long and how; `unit` is what a batch is made of."""
    log.info(
        "%s parameters, %s of them trained (%.3g %%); %s of %d x %d %s, %s, peak learning "
        "rate %g, %s, %s",
        short_number(parameters),
        short_number(trained),
        100 * trained / parameters,
        counted(values.max_steps, "step"),
        values.batch_size,
        values.grad_accum,
        unit,
        values.optimizer,
        values.lr,
        values.schedule,
        values.precision,
    )


def _adapter_identity(config: dict[str, Any]) -> Any:
    """A PEFT configuration as JSON, the same in every process, without where its base lies."""
    elsewhere = ("base_model_name_or_path", "revision")
    return _as_json({name: value for name, value in config.items() if name not in elsewhere})


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _as_json(part) for name, part in value.items()}
    if isinstance(value, set):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_as_json(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def load_base(config: SftConfig | DpoConfig | PpoConfig, device: str) -> Any:
    """The model as it is: in float32 on the CPU, or quantized where it is to run.

    Raises:
        ModelError: it does not load, is an adapter, or is quantized.
    """
    how = load_in(config)
    require_full(load_config(config.model), config.model, "be trained")
    if how == "full":
        model = load_causal_lm(config.model, dtype=torch.float32)
    else:
        halves = device == "cuda" and hardware.has_bf16(device) and config.precision != "fp32"
        dtype = torch.bfloat16 if halves else torch.float32
        model = load_causal_lm(config.model, dtype=dtype, device=device, load_in=how)
    if is_adapted(model):
        is_prompt = model.active_peft_config.is_prompt_learning
        raise ModelError(
            "this model is an adapter, and a second one on it could not be loaded again",
            file=Path(config.model),
            hint="its virtual tokens cannot be merged: fine-tune its base"
            if is_prompt
            else f"merge it first: llmctl merge --model {config.model} -o runs/merged",
        )
    return model
