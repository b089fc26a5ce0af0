"""What models said: the texts that runs kept, before and after, for the same prompts.

In: records, and files of `llmctl generate`. Out: samples of texts, which a template escapes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmctl import metrics
from llmctl.reporting.records import Record
from llmctl.reporting.tables import cut

MOST = 8
"""Prompts of a run that are shown."""


@dataclass(frozen=True)
class Said:
    """One text."""

    label: str
    text: str
    score: str = ""
    ended: bool = True
    """Whether the model ended it itself."""


@dataclass(frozen=True)
class Sample:
    """A prompt with what was said to it, the earliest first."""

    prompt: str
    said: tuple[Said, ...]


@dataclass(frozen=True)
class Samples:
    """The samples of one run or file."""

    title: str
    rows: tuple[Sample, ...]
    left_out: int = 0


def samples_of(record: Record) -> Iterator[Samples]:
    """What a run wrote to the same prompts as it learned, and what an evaluation judged."""
    rows = [row for row in record.samples if isinstance(row.get("prompt"), str)]
    if rows:
        steps = sorted({row["step"] for row in rows if isinstance(row.get("step"), int)})
        best = record.result.get("best_step")
        last = best if best in steps else steps[-1] if steps else None
        compares = any("before" in row for row in rows)
        found = list(_compared(rows, last) if compares else _grown(rows, steps, last))
        yield Samples("Texts before and after", tuple(found[:MOST]), len(found[MOST:]))
    twice = [row for row in record.result.get("samples") or [] if isinstance(row, dict)]
    if twice:
        both = [Sample(_prompt(row), tuple(_both(row))) for row in twice]
        yield Samples("Texts before and after", tuple(both[:MOST]), len(both[MOST:]))
    judged: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in record.rows:
        if "response" in row:
            judged.setdefault((str(row.get("row")), _prompt(row)), []).append(row)
    if judged:
        both = [Sample(key[1], tuple(_judged(rows))) for key, rows in judged.items()]
        yield Samples("What was judged", tuple(both[:MOST]), len(both[MOST:]))


def samples_of_all(records: Sequence[Record]) -> Iterator[Samples]:
    """The samples of runs of one stage; of several, the last text of each beside the others'."""
    if len(records) == 1:
        yield from samples_of(records[0])
        return
    by_title: dict[str, dict[str, list[Said]]] = {}
    for record in records:
        for samples in samples_of(record):
            prompts = by_title.setdefault(samples.title, {})
            for sample in samples.rows:
                last = sample.said[-1]
                said = replace(last, label=f"{record.name}, {last.label}")
                prompts.setdefault(sample.prompt, []).append(said)
    for prompts in by_title.values():
        found = [Sample(prompt, tuple(said)) for prompt, said in prompts.items()]
        yield Samples("Side by side", tuple(found[: 2 * MOST]), len(found[2 * MOST :]))


def generated_samples(name: str, rows: Sequence[Mapping[str, Any]]) -> Samples:
    """The rows of a file that `llmctl generate` wrote."""
    by_prompt: dict[str, list[Said]] = {}
    for row in rows:
        ended = row.get("finish_reason") != "length"
        said = Said("response", cut(str(row["response"])), ended=ended)
        by_prompt.setdefault(_prompt(row), []).append(said)
    found = [Sample(prompt, tuple(said)) for prompt, said in by_prompt.items()]
    return Samples(name, tuple(found[:MOST]), len(found[MOST:]))


def _compared(rows: Sequence[Mapping[str, Any]], last: int | None) -> Iterator[Sample]:
    """Those of ppo: each row carries what the reference said."""
    for row in rows:
        if row.get("step") == last:
            before = Said("before", cut(str(row.get("before", ""))), _score(row, "score_before"))
            now = Said(f"now, step {last}", cut(str(row.get("now", ""))), _score(row, "score"))
            yield Sample(cut(row["prompt"]), (before, now))


def _grown(
    rows: Sequence[Mapping[str, Any]], steps: Sequence[int], last: int | None
) -> Iterator[Sample]:
    """Those of fine-tuning: one row a prompt and evaluation; the first beside the kept one."""
    wanted = dict.fromkeys([*steps[:1], last]) if last is not None else {None: None}
    by_prompt: dict[str, list[Said]] = {}
    for step in wanted:
        for row in (row for row in rows if row.get("step") == step):
            label = "response" if step is None else f"step {step:,}" if step else "before"
            ended = row.get("finish_reason") != "length"
            said = Said(label, cut(str(row.get("response", ""))), ended=ended)
            by_prompt.setdefault(cut(row["prompt"]), []).append(said)
    yield from (Sample(prompt, tuple(said)) for prompt, said in by_prompt.items())


def _judged(rows: Sequence[Mapping[str, Any]]) -> Iterator[Said]:
    """The reference, and what each model said with the figures of its row."""
    if "reference" in rows[0]:
        yield Said("reference", cut(str(rows[0]["reference"])))
    for row in rows:
        figures = [
            f"{metrics.label(key).lower()} {metrics.value(key, value)}"
            for key, value in metrics.figures(row)
            if key not in ("row", "line", "seed")
        ]
        side = str(row.get("side", "response"))
        ended = row.get("finish_reason") != "length"
        yield Said(side, cut(str(row["response"])), ", ".join(figures), ended)


def _both(row: Mapping[str, Any]) -> Iterator[Said]:
    """Those of quantize."""
    yield from (Said(side, cut(str(row[side]))) for side in ("before", "after") if side in row)


def _prompt(row: Mapping[str, Any]) -> str:
    """The prompt as one text; the last turn's where it is a list of messages."""
    prompt = row.get("prompt", row.get("messages", ""))
    if isinstance(prompt, list):
        turns = [turn for turn in prompt if isinstance(turn, dict)]
        return cut("\n\n".join(str(turn.get("content", "")) for turn in turns))
    return cut(str(prompt))


def _score(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return f"score {value:.2f}" if isinstance(value, int | float) else ""
