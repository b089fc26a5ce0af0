"""Sample texts of models: those that runs kept for the same prompts, before and after.

In: records, and files of `llmctl generate`. Out: groups of samples, which a template escapes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmctl import metrics
from llmctl.reporting.records import RunRecord
from llmctl.reporting.tables import truncate

MOST = 8
"""Most prompts of a run that are shown."""


@dataclass(frozen=True)
class SampleText:
    """One response."""

    label: str
    text: str
    score: str = ""
    ended: bool = True
    """Whether the model ended it itself."""


@dataclass(frozen=True)
class PromptSamples:
    """A prompt with its responses, the earliest first."""

    prompt: str
    texts: tuple[SampleText, ...]


@dataclass(frozen=True)
class SampleGroup:
    """The samples of one run or file."""

    title: str
    rows: tuple[PromptSamples, ...]
    left_out: int = 0


def samples_of(record: RunRecord) -> Iterator[SampleGroup]:
    """Yield a run's samples of the same prompts over training, and those of an evaluation."""
    rows = [row for row in record.samples if isinstance(row.get("prompt"), str)]
    if rows:
        steps = sorted({row["step"] for row in rows if isinstance(row.get("step"), int)})
        best = record.result.get("best_step")
        last = best if best in steps else steps[-1] if steps else None
        compares = any("before" in row for row in rows)
        samples = list(
            _ppo_samples(rows, last) if compares else _training_samples(rows, steps, last)
        )
        yield _group("Texts before and after", samples)
    pairs = [row for row in record.result.get("samples") or [] if isinstance(row, dict)]
    if pairs:
        ends = ("before", "after")
        both = [[SampleText(e, truncate(str(row[e]))) for e in ends if e in row] for row in pairs]
        prompts = map(_prompt, pairs)
        samples = [PromptSamples(p, tuple(texts)) for p, texts in zip(prompts, both, strict=True)]
        yield _group("Texts before and after", samples)
    measured: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in record.rows:
        if "response" in row:
            measured.setdefault((str(row.get("row")), _prompt(row)), []).append(row)
    if measured:
        samples = [
            PromptSamples(key[1], tuple(_evaluation_texts(rows))) for key, rows in measured.items()
        ]
        yield _group("What was judged", samples)


def samples_of_all(records: Sequence[RunRecord]) -> Iterator[SampleGroup]:
    """Yield the samples of one stage's runs; of several runs, their last texts side by side."""
    if len(records) == 1:
        yield from samples_of(records[0])
        return
    by_title: dict[str, dict[str, list[SampleText]]] = {}
    for record in records:
        for group in samples_of(record):
            prompts = by_title.setdefault(group.title, {})
            for sample in group.rows:
                last = sample.texts[-1]
                named = replace(last, label=f"{record.name}, {last.label}")
                prompts.setdefault(sample.prompt, []).append(named)
    for prompts in by_title.values():
        samples = [PromptSamples(prompt, tuple(texts)) for prompt, texts in prompts.items()]
        yield _group("Side by side", samples, 2 * MOST)


def generated_samples(name: str, rows: Sequence[Mapping[str, Any]]) -> SampleGroup:
    """Group the rows of a file that `llmctl generate` wrote by prompt."""
    by_prompt: dict[str, list[SampleText]] = {}
    for row in rows:
        ended = row.get("finish_reason") != "length"
        text = SampleText("response", truncate(str(row["response"])), ended=ended)
        by_prompt.setdefault(_prompt(row), []).append(text)
    samples = [PromptSamples(prompt, tuple(texts)) for prompt, texts in by_prompt.items()]
    return _group(name, samples)


def _group(title: str, samples: Sequence[PromptSamples], most: int = MOST) -> SampleGroup:
    return SampleGroup(title, tuple(samples[:most]), len(samples[most:]))


def _ppo_samples(rows: Sequence[Mapping[str, Any]], last: int | None) -> Iterator[PromptSamples]:
    """Yield samples of ppo, whose rows have the reference's response, too."""
    for row in rows:
        if row.get("step") == last:
            before, now = (truncate(str(row.get(side, ""))) for side in ("before", "now"))
            texts = (
                SampleText("before", before, _score(row, "score_before")),
                SampleText(f"now, step {last}", now, _score(row, "score")),
            )
            yield PromptSamples(truncate(row["prompt"]), texts)


def _training_samples(
    rows: Sequence[Mapping[str, Any]], steps: Sequence[int], last: int | None
) -> Iterator[PromptSamples]:
    """Yield samples of fine-tuning, a row for each prompt and evaluation: first and best."""
    wanted = dict.fromkeys([*steps[:1], last]) if last is not None else {None: None}
    by_prompt: dict[str, list[SampleText]] = {}
    for step in wanted:
        for row in (row for row in rows if row.get("step") == step):
            label = "response" if step is None else f"step {step:,}" if step else "before"
            ended = row.get("finish_reason") != "length"
            text = SampleText(label, truncate(str(row.get("response", ""))), ended=ended)
            by_prompt.setdefault(truncate(row["prompt"]), []).append(text)
    yield from (PromptSamples(prompt, tuple(texts)) for prompt, texts in by_prompt.items())


def _evaluation_texts(rows: Sequence[Mapping[str, Any]]) -> Iterator[SampleText]:
    """Yield the reference, and each model's response with the metrics of its row."""
    if "reference" in rows[0]:
        yield SampleText("reference", truncate(str(rows[0]["reference"])))
    for row in rows:
        figures = [
            f"{metrics.label(key).lower()} {metrics.value(key, value)}"
            for key, value in metrics.figures(row)
            if key not in ("row", "line", "seed")
        ]
        side = str(row.get("side", "response"))
        ended = row.get("finish_reason") != "length"
        yield SampleText(side, truncate(str(row["response"])), ", ".join(figures), ended)


def _prompt(row: Mapping[str, Any]) -> str:
    """Return the prompt as one text; of messages, all their contents."""
    prompt = row.get("prompt", row.get("messages", ""))
    if isinstance(prompt, list):
        turns = [turn for turn in prompt if isinstance(turn, dict)]
        return truncate("\n\n".join(str(turn.get("content", "")) for turn in turns))
    return truncate(str(prompt))


def _score(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return f"score {value:.2f}" if isinstance(value, int | float) else ""
