"""Check examples for errors that would train a broken model.

In: statistics of training and validation sequences. Out: findings, errors first.
"""

from collections.abc import Iterator

import numpy as np

from llmctl.config.commands.audit import AuditConfig
from llmctl.config.commands.sft import SftConfig
from llmctl.data.audit.rules import (
    MANY_UNKNOWN,
    AuditFinding,
    RowRules,
    percent,
    unknown_finding,
)
from llmctl.data.audit.statistics import (
    SequenceStatistics,
    TokenRoles,
    TurnStatistics,
    has_double_bos,
    lacks_embedding,
)
from llmctl.data.sft import SftData
from llmctl.numbers import counted
from llmctl.runs.directory import is_of_run

MOST_UNTRAINED = 0.1
"""Share of rows without a trained token that odd rows explain; above it, flags and data clash."""
LEAST_ENDED = 0.99
"""Share of rows, and of turns, with a trained stop token at the end; below it, answers go on."""
MOST_TRUNCATED = 0.2
"""Share of rows that may lose their end unasked: the rest must be enough to learn to stop."""
MANY_DUPLICATES = 0.01
"""Share of rows: below it, chance answers such as `Yes.` explain them."""


def check_examples(
    data: SftData,
    config: SftConfig | AuditConfig,
    rules: RowRules,
    roles: TokenRoles,
    train: SequenceStatistics,
    val: SequenceStatistics | None,
    turns: TurnStatistics | None,
) -> Iterator[AuditFinding]:
    """Yield every finding: errors first, then warnings."""
    findings = [
        *_check_trained(data, train),
        *_check_tokens(data, rules, roles, train, val),
        *_check_ends(data, config, train, turns),
        *_check_lengths(data, config, train),
        *_check_validation(data, config, val),
        *_check_rows(data, config, roles),
    ]
    yield from sorted(findings, key=lambda finding: finding.level != "error")


def _check_trained(data: SftData, train: SequenceStatistics) -> Iterator[AuditFinding]:
    """Check that rows have tokens to train on."""
    if train.rows == 0:
        hint = "raise --max-length, or use --truncation cut" if data.dropped else "add examples"
        yield AuditFinding("error", "no_rows", "no row is left to train on", hint)
        return
    if train.untrained_rows == 0:
        return
    counts = data.train.trained_counts
    trained = np.isin(data.train.rows, data.train.rows[counts > 0])
    first = int(np.flatnonzero(~trained)[0])
    hint = (
        f"raise --max-length: prompts fill all of its {data.max_length:,} tokens"
        if data.train.cut[~trained].mean() > 0.5
        else "check that every row has an answer of the assistant, and --train-on"
    )
    many = train.untrained_rows > MOST_UNTRAINED * train.rows
    message = (
        f"none of {counted(train.rows, 'row')} has a token to train on"
        if train.trained_tokens == 0
        else f"no token to train on in {_of(train.untrained_rows, train.rows)}"
        + ("" if many else ": they are left out")
    )
    yield AuditFinding(
        "error" if many else "warning", "untrained_rows", message, hint, *_place(data, first)
    )


def _check_tokens(
    data: SftData,
    rules: RowRules,
    roles: TokenRoles,
    train: SequenceStatistics,
    val: SequenceStatistics | None,
) -> Iterator[AuditFinding]:
    """Check for tokens of another model, BOS twice, spelled special tokens and unknown ones."""
    foreign = train.beyond_embedding + (val.beyond_embedding if val else 0)
    if foreign:
        (places,) = np.nonzero(lacks_embedding(data.train, roles))
        highest = max(int(part.tokens.max(initial=0)) for part in (data.train, data.val) if part)
        yield AuditFinding(
            "error",
            "beyond_embedding",
            f"token ids of up to {highest:,} ({counted(foreign, 'token')}), and the model has only"
            f" {roles.embedding_rows:,} embeddings: the tokenizer is another model's",
            "put the model's own tokenizer into its folder",
            *_place(data, data.train.sequence_of(places[0]) if len(places) else None),
        )
    twice = train.double_bos + (val.double_bos if val else 0)
    if twice:
        total = train.sequences + (val.sequences if val else 0)
        (places,) = np.nonzero(has_double_bos(data.train, roles))
        yield AuditFinding(
            "error",
            "double_bos",
            f"BOS twice at the beginning of {_of(twice, total, 'sequence')}",
            "take bos_token out of the chat template, or choose another: --chat-template NAME",
            *_place(data, int(places[0]) if len(places) else None),
        )
    yield from rules.findings()
    if train.unknown_share > MANY_UNKNOWN:
        yield unknown_finding(train.unknown_share)


def _check_ends(
    data: SftData,
    config: SftConfig | AuditConfig,
    train: SequenceStatistics,
    turns: TurnStatistics | None,
) -> Iterator[AuditFinding]:
    """Check that the model learns to stop."""
    if turns is not None and turns.foreign_sequence is not None:
        name = data.tokenizer.convert_ids_to_tokens(turns.foreign_token)
        many = turns.foreign > (1 - LEAST_ENDED) * turns.total
        yield AuditFinding(
            "error" if many else "warning",
            "foreign_end",
            f"generation does not stop at {name} ({turns.foreign_token}), and that ends"
            f" {_of(turns.foreign, turns.total, 'turn')}",
            "add it to eos_token_id in the model's generation_config.json, or choose another"
            " template: --chat-template NAME",
            *_place(data, turns.foreign_sequence),
        )
        if many:
            return
    if config.train_on == "prompt" or train.ended_share is None:
        return
    if train.ended_share < LEAST_ENDED:
        yield AuditFinding(
            "error",
            "no_end",
            f"only {percent(train.ended_share)} of the rows end with a token that is trained on"
            " and stops generation: the model would not learn to stop",
            "give the tokenizer an eos_token, in its tokenizer_config.json"
            if not data.has_conversations
            else "choose a template that ends turns with a special token: --chat-template chatml",
        )
    elif turns is not None and turns.open > (1 - LEAST_ENDED) * turns.total:
        yield AuditFinding(
            "warning",
            "open_turns",
            f"no special token ends {_of(turns.open, turns.total, 'turn')}: the model learns to"
            " stop only after the last turn of a conversation",
            "choose a template that ends every turn: --chat-template chatml",
        )


def _check_lengths(
    data: SftData, config: SftConfig | AuditConfig, train: SequenceStatistics
) -> Iterator[AuditFinding]:
    """Check for cut, dropped and empty sequences."""
    if train.truncated_rows:
        refused = config.truncation == "auto" and train.truncated > MOST_TRUNCATED
        yield AuditFinding(
            "error" if refused else "warning",
            "truncated",
            f"{_of(train.truncated_rows, train.rows)} {'would lose' if refused else 'lose'} their"
            f" end at {data.max_length:,} tokens",
            f"raise --max-length (the longest has {train.full_max:,}), or pass --truncation cut"
            " or drop",
        )
    if data.dropped:
        yield AuditFinding(
            "warning",
            "dropped",
            f"left out for more than {data.max_length:,} tokens: "
            f"{counted(data.dropped, 'sequence')}",
            "raise --max-length to keep them",
        )
    if train.short:
        yield AuditFinding(
            "warning",
            "short",
            f"fewer than two tokens, and nothing to predict: {counted(train.short, 'sequence')}",
            "look for empty rows",
        )


def _check_validation(
    data: SftData, config: SftConfig | AuditConfig, val: SequenceStatistics | None
) -> Iterator[AuditFinding]:
    """Check that validation data are new to the model and have tokens that count."""
    if data.overlap:
        ours = next(e for e in data.train_examples if e.name == data.overlap[0])
        yield AuditFinding(
            "error",
            "overlap",
            f"this example also validates ({len(data.overlap):,} such in all)",
            "take them out of one of the two: a validation set must be new to the model",
            ours.place,
            ours.line,
        )
    is_wanted = bool(config.val_size or config.val_fraction or config.val_data)
    if (val is None and is_wanted) or (val is not None and val.rows == 0):
        yield AuditFinding(
            "error",
            "no_validation",
            "no row is left to validate on",
            "raise --max-length, use --truncation cut, or pass --val-size 0 to go without",
        )
    elif val is not None and val.trained_tokens == 0:
        yield AuditFinding(
            "error",
            "untrained_validation",
            f"none of {counted(val.rows, 'row')} to validate has a token that counts in the loss",
            "raise --max-length, or check these rows and --train-on",
        )
    if data.shared_prompts:
        yield AuditFinding(
            "warning",
            "shared_prompts",
            f"validation prompts that are trained on with another answer: {data.shared_prompts:,}",
            "keep all answers to a prompt on one side, to see how well the model does on new ones",
        )


def _check_rows(
    data: SftData, config: SftConfig | AuditConfig, roles: TokenRoles
) -> Iterator[AuditFinding]:
    """Check for duplicates, skipped rows and a padding token that ends turns."""
    if data.duplicates > MANY_DUPLICATES * data.row_count:
        yield AuditFinding(
            "warning",
            "duplicates",
            f"near-equal to an earlier one: {_of(data.duplicates, data.row_count)}",
            "leave them out, unless they are meant to weigh more",
        )
    if data.bad.count:
        yield AuditFinding(
            "warning",
            "skipped",
            f"left out because they could not be used: {counted(data.bad.count, 'row')}",
            "see what is wrong with them: --skip-bad-rows 0",
        )
    is_told = isinstance(config, SftConfig) and is_of_run(config.model)  # when that run was made
    if data.tokenizer.pad_token_id in roles.stops and not is_told:
        yield AuditFinding(
            "warning",
            "pad_is_eos",
            "the padding token ends turns: harmless here, where padding is told by its place alone",
            "give the tokenizer a pad_token of its own if you train with other tools",
        )


def _place(data: SftData, sequence: int | None) -> tuple[str | None, int | None]:
    """File and line of the example of a training sequence."""
    if sequence is None:
        return None, None
    example = data.example_of(sequence)
    return example.place, example.line


def _of(count: int, total: int, what: str = "row") -> str:
    return f"{count:,} of {counted(total, what)}"
