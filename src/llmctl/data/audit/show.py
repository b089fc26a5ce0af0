"""Print an audit: a table, the findings, and examples with their trained tokens marked.

In: an audit and its examples. Out: text on stdout, in colour on a terminal, plain and aligned
elsewhere. The examples are untrusted: no control character of theirs reaches a terminal.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llmctl.data.audit.audit import Audit
from llmctl.data.audit.rules import AuditFinding, percent
from llmctl.data.audit.statistics import SequenceStatistics, is_in
from llmctl.data.chat.omissions import kinds_of
from llmctl.data.chat.render import special_token_ids
from llmctl.data.examples import Example
from llmctl.data.sft import SftData
from llmctl.errors import UserError
from llmctl.redact import redact

if TYPE_CHECKING:
    from rich.text import Text

COLORS = {"error": "bold red", "warning": "yellow"}
MARKS = ("«", "»")
"""Around trained tokens, where there is no colour."""
SCREEN, SPAN = 1600, 480
"""Characters of an example that are shown, and of one span of it."""
LINE = 60
"""Characters that a line counts for that ends early."""
SHAPES = 6
"""Examples of different shapes that are shown at most."""
DECODED = 4000
"""Tokens at the beginning of an example that are decoded: more than a screen holds."""


class Span(NamedTuple):
    """Successive tokens that are alike: trained or not, special or not."""

    text: str
    is_trained: bool
    is_special: bool


def print_report(report: Audit, data: SftData, example: int | None = None) -> None:
    """Print everything to stdout, with an example (from 1), or one of each shape.

    Raises:
        UserError: there is no such example.
    """
    rows = table(report)
    numbers = choose_examples(data) if example is None else [_sequence_of(data, example)]
    shown = [(str(data.example_of(n).name), list(spans_of(data, n))) for n in numbers]
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        _print_rich(rows, report, shown)
        return
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, *values in rows:
        aligned = (v.rjust(width) for v, width in zip(values, widths[1:], strict=True))
        print("  ".join([name.ljust(widths[0]), *aligned]).rstrip())
    for finding in report.findings:
        print(f"\n{finding.level}: {_finding_line(finding)}\n  {escape_unprintable(finding.hint)}")
    for place, spans in shown:
        print(f"\n{_title(place)}\n{mark_trained(spans)}")


def table(report: Audit) -> list[tuple[str, str, str]]:
    """List a header, and name, training figure and validation figure of each line."""
    train = _lines(report.train, report.max_length)
    val = None if report.val is None else _lines(report.val, report.max_length)
    val_values = [""] * len(train) if val is None else [value for _, value in val]
    packed, turns = report.packing_efficiency, report.turns
    rest = {
        "turns trained on": "-" if turns is None else f"{turns.total:,}",
        "  with no end": "-" if turns is None else f"{turns.open:,}",
        "  with an end that does not stop": "-" if turns is None else f"{turns.foreign:,}",
        "rows that could not be used": f"{report.skipped:,}",
        "lost characters": f"{report.lost_characters:,} ({percent(report.lost_share)})",
        "left out for their length": f"{report.dropped:,}",
        "duplicates, both sides": f"{report.duplicates:,}",
        "rows that also validate": f"{report.overlap:,}",
        "validation prompts answered otherwise": f"{report.shared_prompts:,}",
        "pad = eos": "yes" if report.pad_is_eos else "no",
        f"packed into rows of {report.max_length:,}": (
            "-" if packed is None else f"{report.packed_rows:,} ({percent(packed)} full)"
        ),
    }
    return [
        ("", "training", "validation" if val else ""),
        *(
            (name, value, val_value)
            for (name, value), val_value in zip(train, val_values, strict=True)
        ),
        *((name, value, "") for name, value in rest.items()),
    ]


def choose_examples(data: SftData) -> list[int]:
    """Choose the sequences to show: of each shape the first that is trained on and whole.

    Where none is, the first of all.
    """
    wanted = np.flatnonzero((data.train.trained_counts > 0) & ~data.train.cut)
    chosen: dict[tuple[str, ...], int] = {}
    for number in wanted.tolist():
        chosen.setdefault(_shape(data.example_of(number)), number)
        if len(chosen) == SHAPES:
            break
    return list(chosen.values()) or [0][: len(data.train)]


def _shape(example: Example) -> tuple[str, ...]:
    """What an example has: roles, tools, calls, reasoning, several turns of the user."""
    if example.messages is None:
        return ("text",)
    roles = [message["role"] for message in example.messages]
    return (
        *sorted({*roles, *kinds_of(example.messages)}),
        *(["tools"] if example.tools else []),
        *(["turns"] if roles.count("user") > 1 else []),
    )


def _sequence_of(data: SftData, example: int) -> int:
    """Number of the first sequence of an example (from 1)."""
    numbers = np.flatnonzero(data.train.rows == example - 1)
    if not len(numbers):
        count = len(data.train_examples)
        raise UserError(f"--example {example}: no such example, of the {count:,} that train")
    return int(numbers[0])


def spans_of(data: SftData, number: int) -> Iterator[Span]:
    """Decode a training sequence, no more of it than a screen holds, safe to print."""
    tokens, trained = data.train.sequence(number)
    tokens = tokens[:DECODED]
    special = is_in(tokens, special_token_ids(data.tokenizer))
    kinds = list(zip(trained[:DECODED].tolist(), special.tolist(), strict=True))
    left, end, before = SCREEN, 0, ""
    for (is_trained, is_special), group in groupby(kinds):
        end += len(list(group))
        text = _decode(data, tokens[:end].tolist())
        # Decoded by itself, a span would lose the space that it begins with.
        own = escape_unprintable(text[len(before) :] if text.startswith(before) else text)
        before = text
        shown = elide_middle(own, min(SPAN, left))
        left -= _size(shown)
        yield Span(shown, is_trained, is_special)
        if left <= 0:
            break
    if end < len(tokens) or len(tokens) < data.train.lengths[number]:
        yield Span(" […]", False, False)


def mark_trained(spans: Iterable[Span]) -> str:
    """Join spans, with marks around trained ones."""
    opening, closing = MARKS
    marked = ""
    for is_trained, group in groupby(spans, key=lambda span: span.is_trained):
        text = "".join(span.text for span in group)
        marked += f"{opening}{text}{closing}" if is_trained else text
    return marked


def escape_unprintable(text: str) -> str:
    """Spell out every character that a terminal would obey, or not show."""
    return "".join(
        c if c.isprintable() else "⏎\n" if c == "\n" else c.encode("unicode_escape").decode()
        for c in redact(text)
    )


def elide_middle(text: str, size: int) -> str:
    """Leave out the middle of a text of more than `size` characters."""
    if _size(text) <= size:
        return text
    head = _fitting(text, size // 2)
    tail = _fitting(text[::-1], size // 2)[::-1]
    left_out = len(text) - len(head) - len(tail)
    return f"{head} [… {left_out:,} characters …] {tail}"


def _fitting(text: str, size: int) -> str:
    """Take the beginning of a text that fits."""
    taken = 0
    for index, character in enumerate(text):
        taken += LINE if character == "\n" else 1
        if taken > size:
            return text[:index]
    return text


def _size(text: str) -> int:
    return len(text) + (LINE - 1) * text.count("\n")


def _decode(data: SftData, tokens: list[int]) -> str:
    text: str = data.tokenizer.decode(
        tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text


def _lines(counts: SequenceStatistics, max_length: int) -> list[tuple[str, str]]:
    ended = counts.ended_share
    return [
        ("rows", f"{counts.rows:,}"),
        ("sequences", f"{counts.sequences:,}"),
        ("tokens", f"{counts.tokens:,}"),
        ("  of the shortest sequence", f"{counts.tokens_min:,}"),
        ("  of the median one", f"{counts.tokens_median:,g}"),
        ("  of the 95th in 100", f"{counts.tokens_p95:,}"),
        ("  of the longest", f"{counts.tokens_max:,}"),
        (
            "tokens trained on",
            f"{counts.trained_tokens:,} ({percent(counts.trained_share)})",
        ),
        ("rows without a trained token", f"{counts.untrained_rows:,}"),
        (
            "whole rows whose end is trained on",
            "-" if ended is None else f"{counts.ended_rows:,} ({percent(ended)})",
        ),
        (
            f"rows cut at {max_length:,} tokens",
            f"{counts.truncated_rows:,} ({percent(counts.truncated)})",
        ),
        ("sequences with BOS twice", f"{counts.double_bos:,}"),
        ("unknown tokens", f"{counts.unknown_tokens:,} ({percent(counts.unknown_share)})"),
        ("tokens without an embedding", f"{counts.beyond_embedding:,}"),
        ("sequences of a single token", f"{counts.short:,}"),
    ]


def _finding_line(finding: AuditFinding) -> str:
    """Put place and message on one line."""
    line = "" if finding.line is None else f":{finding.line}"
    place = "" if finding.file is None else f"{finding.file}{line}: "
    return escape_unprintable(place + finding.message)


def _title(place: str) -> str:
    opening, closing = MARKS
    return f"example {escape_unprintable(place)}, trained tokens in {opening}{closing}:"


def _print_rich(
    rows: list[tuple[str, str, str]], report: Audit, shown: list[tuple[str, list[Span]]]
) -> None:
    from rich.console import Console  # a third of the time that the command takes in a pipe
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False)
    header, *body = rows
    view = Table(box=None, pad_edge=False, header_style="bold")
    for name, side in zip(header, ("left", "right", "right"), strict=True):
        view.add_column(name, justify="right" if side == "right" else "left")
    for name, *values in body:
        view.add_row(Text(name), *map(Text, values))
    console.print(view)
    for finding in report.findings:
        level = Text(f"\n{finding.level}: ", style=COLORS[finding.level])
        console.print(level.append(_finding_line(finding), style="default not bold"))
        console.print(Text(f"  {escape_unprintable(finding.hint)}"))
    has_color = console.color_system is not None and not console.no_color
    for place, spans in shown:
        if not has_color:
            console.print(Text(f"\n{_title(place)}\n{mark_trained(spans)}"))
            continue
        title = f"\nexample {escape_unprintable(place)}, trained tokens underlined:"
        console.print(Text(title, style="bold"))
        console.print(_colored(spans, Text()))


def _colored(spans: list[Span], text: "Text") -> "Text":
    """Colour trained tokens green and underline them; make special ones bright."""
    for span in spans:
        color = "green underline" if span.is_trained else "default"
        text.append(span.text, style=f"{color} bold" if span.is_special else color)
    return text
