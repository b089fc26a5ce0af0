"""Plan an evaluation: a config in; data, few-shot prompts, metrics and inspected models out.

No weights are loaded, so that a refusal costs seconds.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from llmctl.config.commands.evaluate import GENERATED, EvaluateConfig
from llmctl.data.audit.rules import RowRules, texts_of
from llmctl.data.bad_rows import BadRows
from llmctl.data.chat.render import encode_text
from llmctl.data.classification import list_labels
from llmctl.errors import DataError, ModelError, UserError
from llmctl.evaluate.few_shot import (
    ChooseShots,
    FewShotFormat,
    FewShotPrompt,
    choose_shots,
    require_room_to_answer,
    require_whole_references,
    without_system,
)
from llmctl.evaluate.inputs import (
    EvaluationData,
    EvaluationExample,
    Kind,
    read_data,
    read_references,
)
from llmctl.evaluate.scorers import ANSWER_METRICS, Scorer, make_scorer
from llmctl.models import hub
from llmctl.models.adapters import is_adapter, weights_sha256
from llmctl.models.causality import is_encoder
from llmctl.models.classifiers import classifier_labels
from llmctl.models.loading import context_size, load_config, load_tokenizer, local_folder
from llmctl.models.vetting import read_object
from llmctl.runs.directory import resolve_model

MOST_CONTEXT = 2048
"""Tokens of a window, where the model would take more and nothing else was asked for."""
DEFAULTS = {
    "documents": ("perplexity",),
    "questions": ("perplexity",),
    "labels": ("accuracy", "f1"),
}


@dataclass(frozen=True)
class EvaluationPlan:
    """The data, and what is measured on them."""

    data: EvaluationData
    prompts: list[FewShotPrompt]
    choose: ChooseShots
    """Gives the prompts with another number of examples."""
    metrics: tuple[str, ...]
    scorer: Scorer
    inputs: list[dict[str, Any]]
    """For the manifest."""
    clock: str | None

    @property
    def generates(self) -> bool:
        """Whether responses are written."""
        return any(name in (*GENERATED, "reward") for name in self.metrics)


@dataclass(frozen=True)
class EvaluationInputs:
    """What was read, before any model was looked at."""

    data: EvaluationData
    shots_data: list[EvaluationExample] | None
    """Rows that the examples are taken from; None where they are those of the data."""
    metrics: tuple[str, ...]
    entries: list[dict[str, Any]]
    """For the manifest."""
    bad: BadRows


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to evaluate, not loaded yet."""

    reference: str
    shape: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...] | None
    """Labels of a classifier; None for a language model."""
    virtual_tokens: int
    """Positions that an adapter's learned prompt takes."""

    @property
    def positions(self) -> int | None:
        """Tokens that it reads at most; None where it has no limit."""
        positions = context_size(self.shape)
        return positions and positions - self.virtual_tokens

    def few_shot_format(self, config: EvaluateConfig, clock: str | None) -> FewShotFormat:
        """How prompts are written for it."""
        chat = self.tokenizer.chat_template is not None and not config.plain
        return FewShotFormat(self.tokenizer, self.shape, chat, config.system, clock)

    def context_and_stride(self, config: EvaluateConfig) -> tuple[int, int]:
        """Tokens of a window, and from one window to the next.

        Raises:
            UserError: more than it has positions for.
        """
        positions = self.positions
        if config.context and positions and config.context > positions:
            raise UserError(f"--context {config.context:,}: the model has {positions:,} positions")
        context = config.context or min(positions or MOST_CONTEXT, MOST_CONTEXT)
        stride = config.stride or max(1, context // 2)
        if stride > context:
            raise UserError(f"--stride {stride:,}: more than the context of {context:,}")
        return context, stride


def read_inputs(config: EvaluateConfig) -> EvaluationInputs:
    """Read the data, and the rows for examples.

    Raises:
        DataError: rows that are broken, none, or without references.
        UserError: settings that do not go together.
    """
    bad = BadRows(config.skip_bad_rows)
    data = read_data(config, bad)
    metrics = tuple(config.metrics) or (() if config.reward_model else DEFAULTS[data.kind])
    _require_used(config, data.kind, metrics)
    if not config.shots_data:
        return EvaluationInputs(data, None, metrics, data.inputs, bad)
    shots_data, entries = read_references(
        config.shots_data, config, data.kind, bad, ["--shots"], "shots"
    )
    return EvaluationInputs(data, shots_data, metrics, [*data.inputs, *entries], bad)


def make_plan(
    config: EvaluateConfig,
    inputs: EvaluationInputs,
    models: Iterable[EvaluatedModel],
    clock: str | None,
) -> EvaluationPlan:
    """Settle what is measured on which rows: those that every model can be asked.

    Raises:
        DataError: rows that a chat template refuses, that are too long, or too few for the
            examples.
        ModelError: a chat template has no place for a part of a row.
        ResourceError: a library that is not installed.
    """
    metrics, bad = inputs.metrics, inputs.bad
    formats = [m.few_shot_format(config, clock) for m in models if m.labels is None]
    examples, shots_data = inputs.data.examples, inputs.shots_data
    if shots_data is not None:
        shots_data = [without_system(row) for row in shots_data]
    with_reference = "perplexity" in metrics or bool(config.shots)
    for few_shot_format in formats:
        examples = few_shot_format.usable(examples, bad, with_reference=with_reference)
        if shots_data is not None:
            shots_data = few_shot_format.usable(shots_data, bad, with_reference=True)
    bad.report()
    if inputs.data.examples and not examples:
        raise DataError("no row is left to evaluate", file=config.data[0])
    data = replace(inputs.data, examples=examples)

    def choose(count: int) -> list[FewShotPrompt]:
        return choose_shots(data.examples, shots_data, count, config.seed)[: config.limit]

    prompts = choose(config.shots or 0)
    scorer = make_scorer(config, metrics, [prompt.example for prompt in prompts])
    if config.reward_model:
        metrics += ("reward",)
    return EvaluationPlan(data, prompts, choose, metrics, scorer, inputs.entries, clock)


def _require_used(config: EvaluateConfig, kind: Kind, metrics: tuple[str, ...]) -> None:
    """Refuse flags that would change nothing.

    Raises:
        UserError: naming what it goes with.
    """
    given = config.given()
    if kind == "documents" and config.shots:
        raise UserError("--shots goes with questions, and these are texts")
    for name, flag in (("stride", "--stride"), ("end", "--no-end")):
        if name in given and kind != "documents":
            raise UserError(f"{flag} goes with texts, and these are {kind}")
    needs = {
        "context": ("perplexity",),
        "answer_regex": ANSWER_METRICS,
        "labels": ("accuracy", "f1"),
    }
    for name, wanted in needs.items():
        if name in given and not set(wanted) & set(metrics):
            raise UserError(f"{config.flag(name)} goes with --metrics {list_labels(list(wanted))}")


def _require_sound(
    data: EvaluationData, tokenizer: PreTrainedTokenizerBase, *, plain: bool
) -> None:
    """Hold the texts to evaluate against the rules on rows, as one model reads them."""
    in_turns = not plain and tokenizer.chat_template is not None and data.kind == "questions"
    rules = RowRules(tokenizer)
    for row in data.examples:
        texts = texts_of(row.messages, row.reference, tools=row.tools)
        encoded = [encode_text(tokenizer, text) for text in texts]
        rules.see(texts, row.place, row.line, encoded, in_turns=in_turns)
    for document in data.documents:
        tokens = encode_text(tokenizer, document.text)
        rules.see([document.text], document.place, document.line, [tokens])
    rules.enforce()


def inspect_model(reference: str) -> EvaluatedModel:
    """Read a model's configuration and tokenizer.

    Raises:
        ModelError: they do not load, or it neither writes nor classifies.
    """
    shape, tokenizer = load_config(reference), load_tokenizer(reference)
    folder = local_folder(resolve_model(reference))
    adapter = read_object(folder / "adapter_config.json") if is_adapter(folder) else None
    virtual = int((adapter or {}).get("num_virtual_tokens") or 0)
    labels = _labels(folder, shape, adapter)
    if labels is None and is_encoder(shape):
        kind = (shape.architectures or [shape.model_type])[0]
        raise ModelError(
            f"{kind} has no head to judge: it neither writes nor classifies",
            file=reference,
            hint="make a classifier of it: llmctl sft --task classify --model … --data …",
        )
    return EvaluatedModel(reference, shape, tokenizer, labels, virtual)


def require_suited(
    config: EvaluateConfig, plan: EvaluationPlan | None, evaluated: EvaluatedModel
) -> None:
    """See that a model can do what is planned.

    Raises:
        ModelError: it cannot.
        DataError: rows that break a rule, or examples that do not fit its context.
        UserError: metrics that it cannot have.
    """
    if plan is not None:
        _require_sound(plan.data, evaluated.tokenizer, plain=config.plain)
    if evaluated.labels is not None:
        _require_classifier(evaluated, plan)
        return
    if plan is None or "perplexity" in plan.metrics:
        evaluated.context_and_stride(config)
    if plan is not None and plan.data.kind != "documents":
        few_shot_format, shots = evaluated.few_shot_format(config, plan.clock), config.shots or 0
        if plan.generates or not shots:
            new = config.max_new_tokens if plan.generates else 1
            require_room_to_answer(few_shot_format, plan.choose, shots, new)
        if shots and "perplexity" in plan.metrics:
            require_whole_references(
                few_shot_format, plan.choose, shots, evaluated.context_and_stride(config)[0]
            )


def identity(config: EvaluateConfig, inputs: list[dict[str, Any]]) -> dict[str, Any]:
    """All settings that decide the rows: a run that is resumed must have the same."""
    free = ("threads", "require")
    recipe = {k: v for k, v in config.recipe("evaluate").items() if k not in free}
    models = {
        name: weights_sha256(local_folder(resolve_model(reference)))
        for name, reference in _models(config)
    }
    return {
        **recipe,
        "models": models,
        "inputs": [entry.get("sha256") or entry.get("revision") for entry in inputs],
    }


def model_inputs(config: EvaluateConfig, run_identity: dict[str, Any]) -> list[dict[str, Any]]:
    """The models as inputs of the manifest."""
    return [
        hub.model_input(name.replace("_", "-"), reference, run_identity["models"][name])
        for name, reference in _models(config)
    ]


def _models(config: EvaluateConfig) -> list[tuple[str, str]]:
    fields = ("model", "compare", "reward_model")
    return [(name, ref) for name in fields if (ref := getattr(config, name)) is not None]


def _labels(
    folder: Path, shape: PreTrainedConfig, adapter: dict[str, Any] | None
) -> tuple[str, ...] | None:
    """Labels of a classifier; those of an adapter are in the configuration beside it.

    Raises:
        ModelError: an adapter for a classifier, without that.
    """
    if adapter is None:
        return classifier_labels(shape)
    if adapter.get("task_type") != "SEQ_CLS":
        return None
    if not (folder / "config.json").exists():
        raise ModelError(
            "this adapter is a classifier's, and no config.json names its labels", file=folder
        )
    named = AutoConfig.from_pretrained(folder, trust_remote_code=False).id2label
    return tuple(str(named[number]) for number in sorted(named))


def _require_classifier(evaluated: EvaluatedModel, plan: EvaluationPlan | None) -> None:
    """Refuse a classifier that cannot do what is planned.

    Raises:
        ModelError: it is a reward model, or has no language to speak.
        DataError: a label that it does not know.
    """
    labels = evaluated.labels or ()
    if len(labels) == 1:
        raise ModelError(
            "a reward model: it scores, and neither writes nor classifies",
            file=evaluated.reference,
            hint="score texts with llmctl reward --score FILE --model …",
        )
    unfit = [] if plan is None else [m for m in plan.metrics if m not in ("accuracy", "f1")]
    if plan is None or unfit or plan.data.kind != "labels" or any(p.shots for p in plan.prompts):
        what = f"--metrics {unfit[0]}" if unfit else "this"
        raise ModelError(
            f"a classifier writes no text: {what} cannot be measured on it",
            file=evaluated.reference,
            hint="pass rows of `text` and `label`, with --metrics accuracy,f1",
        )
    for prompt in plan.prompts:
        label = prompt.example.reference
        if label not in labels:
            text = f"label `{label}` is none of the model's: {list_labels(labels)}"
            raise prompt.example.error(text)
