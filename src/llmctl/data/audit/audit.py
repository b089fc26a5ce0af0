"""Audit examples for fine-tuning before they train a model.

In: `SftData`. Out: an `Audit` of statistics and findings: errors refuse a run, warnings do not.
"""

from dataclasses import asdict, dataclass
from typing import Any

from llmctl.config.commands.audit import AuditConfig
from llmctl.config.commands.sft import SftConfig
from llmctl.console import log
from llmctl.data.audit.checks import check_examples
from llmctl.data.audit.rules import AuditFinding
from llmctl.data.audit.statistics import (
    SequenceStatistics,
    TurnStatistics,
    sequence_statistics,
    token_roles,
    turn_statistics,
)
from llmctl.data.sft import SftData
from llmctl.data.tokenized import pack
from llmctl.errors import DataError
from llmctl.models.loading import load_config, local_folder, merge_eos
from llmctl.models.vetting import read_object
from llmctl.numbers import counted
from llmctl.runs.directory import resolve_model


@dataclass(frozen=True)
class Audit:
    """Statistics of examples, and findings."""

    rows: int
    """Rows that were read and kept, both sides together."""
    train: SequenceStatistics
    val: SequenceStatistics | None
    turns: TurnStatistics | None
    """None where something else than the assistant's turns is trained on."""
    max_length: int
    skipped: int
    unread_columns: tuple[str, ...]
    lost_characters: int
    """Characters that the tokenizer has no token for, and drops."""
    lost_share: float
    dropped: int
    duplicates: int
    overlap: int
    shared_prompts: int
    pad_is_eos: bool
    packed_rows: int | None
    packing_efficiency: float | None
    """Share of the slots of packed rows that hold a token."""
    findings: tuple[AuditFinding, ...]

    @property
    def errors(self) -> list[AuditFinding]:
        """Findings that refuse a run."""
        return [finding for finding in self.findings if finding.level == "error"]

    @property
    def warnings(self) -> list[AuditFinding]:
        """Findings that do not."""
        return [finding for finding in self.findings if finding.level == "warning"]

    def as_json(self) -> dict[str, Any]:
        """Statistics and findings, those of training without a prefix; finite numbers only."""
        fields = asdict(self)
        train, turns = fields.pop("train"), fields.pop("turns") or {}
        return {
            **train,
            "rows": self.rows,
            "train_rows": self.train.rows,
            "turns": turns.get("total"),
            "open_turns": turns.get("open"),
            "foreign_turns": turns.get("foreign"),
            **fields,
            "unread_columns": list(fields["unread_columns"]),
            "findings": list(fields["findings"]),
        }


def audit(data: SftData, config: SftConfig | AuditConfig, *, packing: bool) -> Audit:
    """Count and check the examples.

    With `packing` also the rows that sequences of `--max-length` are packed into.

    Raises:
        ModelError: the model's generation config does not load.
    """
    tokenizer = data.tokenizer
    roles = token_roles(
        tokenizer, _stop_tokens(data, config.model), tuple(data.added_tokens), data.embedding_rows
    )
    packed, efficiency = _packed(data) if packing else (None, None)
    are_turns = config.train_on in ("assistant", "completion")
    train = sequence_statistics(data.train, roles)
    val = None if data.val is None else sequence_statistics(data.val, roles)
    turns = turn_statistics(data.train, roles) if are_turns else None
    rules = data.row_rules()
    return Audit(
        rows=data.row_count,
        train=train,
        val=val,
        turns=turns,
        max_length=data.max_length,
        skipped=data.bad.count,
        unread_columns=tuple(data.bad.unread),
        lost_characters=rules.lost.lost,
        lost_share=rules.lost.share,
        dropped=data.dropped,
        duplicates=data.duplicates,
        overlap=len(data.overlap),
        shared_prompts=data.shared_prompts,
        pad_is_eos=tokenizer.pad_token_id is not None and tokenizer.pad_token_id in roles.stops,
        packed_rows=packed,
        packing_efficiency=efficiency,
        findings=tuple(check_examples(data, config, rules, roles, train, val, turns)),
    )


def require_sound(report: Audit) -> None:
    """Raise a DataError with the errors among the findings: they would train a broken model."""
    if not report.errors:
        return
    first, *others = report.errors
    more = f"; besides, {'; '.join(other.message for other in others)}" if others else ""
    raise DataError(first.message + more, file=first.file, line=first.line, hint=first.hint)


def log_summary(report: Audit) -> None:
    """Log the size in two lines, and each warning in one."""
    train, val = report.train, report.val
    log.info(
        "audit: %s to train on, %s to validate; %s, %s to %s a sequence (median %g)",
        counted(train.rows, "row"),
        f"{0 if val is None else val.rows:,}",
        counted(train.tokens, "token"),
        f"{train.tokens_min:,}",
        f"{train.tokens_max:,}",
        train.tokens_median,
    )
    log.info(
        "audit: %.1f %% of the tokens trained on; %s of %s cut at %s tokens%s",
        100 * train.trained_share,
        f"{train.truncated_rows:,}",
        counted(train.rows, "row"),
        f"{report.max_length:,}",
        f"; packed rows {100 * report.packing_efficiency:.1f} % full"
        if report.packing_efficiency is not None
        else "",
    )
    for finding in report.warnings:
        log.warning("%s", finding.message)


def _stop_tokens(data: SftData, model: str) -> frozenset[int]:
    """Tokens at which the fine-tuned model will stop: its own, and the end of its turns."""
    file = local_folder(resolve_model(model)) / "generation_config.json"
    known = read_object(file) if file.is_file() else load_config(model).to_dict()
    end_of_turn = data.format.end_of_turn if data.has_conversations else None
    eos = merge_eos(known.get("eos_token_id"), data.tokenizer.eos_token_id, end_of_turn)
    return frozenset(eos)


def _packed(data: SftData) -> tuple[int, float]:
    """Count the rows that the sequences which train are packed into, and how full these are."""
    lengths = data.train.lengths[data.train.trained_counts > 0]
    count = len(pack(lengths, data.max_length))
    return count, int(lengths.sum()) / max(1, count * data.max_length)
