"""Say which command keeps which rule on rows: it refuses, warns, or the rule does not apply.

Docs and tests read this table; `rules.py`, `checks.py`, `bad_rows.py` and `render.py` keep the
rules.
"""

from dataclasses import dataclass

READERS = (
    *("tokenize", "audit", "sft", "sft --task classify", "reward", "dpo", "ppo"),
    *("evaluate", "reward --score", "rank", "generate", "chat", "quantize"),
)
"""Commands that read rows or texts. `plan` and `run` read them as the stages that they are of."""
NO_ROWS = {
    "pretrain": "reads tokens; text that it is given is tokenized as by `tokenize`",
    "merge": "reads weights",
    "plan": "reads rows as the command that it plans",
    "report": "reads runs",
    "run": "runs the commands above",
    "runs": "reads runs",
    "demo": "runs the commands above",
    "doctor": "reads no data",
}
"""Commands without rows of their own, and why."""

CHATS = ("audit", "sft", "reward", "dpo", "ppo", "evaluate", "reward --score")
IN_USE = ("rank", "generate", "chat")
PAIRS = ("reward", "dpo")
SFT = ("audit", "sft")
TRAINED = (*SFT, "sft --task classify", *PAIRS)
"""What trains on rows that are split, and its audit."""


@dataclass(frozen=True)
class Rule:
    """A rule on rows."""

    name: str
    """Of its finding, in `llmctl audit --json`."""
    meaning: str
    refused_by: tuple[str, ...]
    """Readers that refuse what breaks it."""
    warned_by: tuple[str, ...] = ()
    """Readers that say it, and go on."""
    reason: str = ""
    """Why it does not apply to the others."""

    def answer(self, reader: str) -> str:
        """What a reader does: `refuse`, `warn` or `-`."""
        if reader in self.refused_by:
            return "refuse"
        return "warn" if reader in self.warned_by else "-"


RULES = (
    Rule(
        "bad_row",
        "a row that cannot be read, or that the chat template refuses, or of which it leaves out "
        "a part; `--skip-bad-rows` leaves so many out",
        tuple(reader for reader in READERS if reader != "chat"),
        reason="in a chat nothing is a row",
    ),
    Rule(
        "no_place",
        "a kind of part (system, tools, calls, reasoning) that the template never writes",
        (*CHATS, *IN_USE, "quantize"),
        reason="documents and labelled texts have no template",
    ),
    Rule(
        "unread_columns",
        "columns, and keys of messages, that say something and that nothing reads",
        (),
        tuple(reader for reader in READERS if reader != "chat"),
        reason="in a chat nothing is a row",
    ),
    Rule(
        "rendered",
        "special tokens, as letters, begin or end texts: above a tenth of the rows refused",
        (*CHATS, "sft --task classify"),
        IN_USE,
        reason="in documents they are text, and calibration is not trained on",
    ),
    Rule(
        "lost",
        "characters that the tokenizer has no token for: above a fifth refused",
        (*CHATS, "tokenize", "sft --task classify"),
        IN_USE,
        reason="calibration is not trained on",
    ),
    Rule(
        "unknown",
        "unknown tokens: above a fifth refused, above a hundredth warned of",
        (*CHATS, "sft --task classify"),
        reason="`tokenize` says their share; a prompt is the user's own",
    ),
    Rule(
        "double_bos",
        "BOS twice at the beginning",
        (*TRAINED, "ppo", "evaluate", "reward --score"),
        reason="documents get theirs from llmctl alone; a model in use was trained on its template",
    ),
    Rule(
        "beyond_embedding",
        "token ids that the model has no embedding for",
        (*CHATS, "sft --task classify", *IN_USE, "quantize"),
        reason="no model is there yet",
    ),
    Rule(
        "same_tokens",
        "pairs that are the same tokens on both sides: left out, refused where all are",
        PAIRS,
        reason="there are no pairs",
    ),
    Rule(
        "contradictions",
        "pairs that stand in both orders",
        (),
        PAIRS,
        reason="there are no pairs",
    ),
    Rule(
        "duplicates",
        "rows near-equal to an earlier one",
        (),
        TRAINED,
        reason="prompts are taken once; elsewhere each row is wanted",
    ),
    Rule(
        "overlap",
        "rows that train and validate",
        (*TRAINED, "tokenize"),
        reason="ppo takes such prompts out of training; elsewhere nothing is trained",
    ),
    Rule(
        "shared_prompts",
        "validation prompts that are trained on with another answer",
        (),
        TRAINED,
        reason="nothing is trained, or no answer is given",
    ),
    Rule(
        "untrained_rows",
        "rows without a token to train on: above a tenth refused",
        SFT,
        reason="of training alone; pairs and classes always have one",
    ),
    Rule(
        "no_end",
        "rows whose end is not trained on, or does not stop generation",
        SFT,
        reason="of training to write alone",
    ),
    Rule(
        "truncated",
        "rows, or pairs, that lose their end or do not fit: above a fifth refused",
        (*SFT, *PAIRS),
        reason="elsewhere what does not fit is a bad row, or loses the beginning of its prompt",
    ),
)
