"""What a model is measured on: held-out text of its own, or of the runs that it comes from.

In: a reference to a model, or what `--data` names. Out: documents as tokens, with the prompts that
samples are written to.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmctl.config.commands import QuantizeConfig, SftConfig
from llmctl.console import log
from llmctl.data.chat.render import ChatFormat
from llmctl.data.documents import read_texts
from llmctl.data.examples import Example, read_examples
from llmctl.data.shards import TokenIndex, open_tokens
from llmctl.data.split import read_split
from llmctl.data.tokenizer.train import fingerprint
from llmctl.errors import DataError
from llmctl.evaluate.perplexity import encode_documents
from llmctl.files import sha256_file
from llmctl.models.loading import load_tokenizer
from llmctl.runs.directory import read_manifest

PARENTS = ("model", "adapter", "base")
"""Roles of the inputs that a run started from."""
PROMPTS, PROMPT_TOKENS = 3, 24
CHARACTERS = 16
"""Of plain text that are read for a token that is wanted."""
FURTHEST = 20
"""Runs that are walked back at most."""


@dataclass(frozen=True)
class HeldOut:
    """Documents that the model did not learn from."""

    documents: list[list[int]]
    prompts: list[list[int]]
    name: str
    """What they are."""
    inputs: list[dict[str, Any]]
    """For the manifest."""

    @property
    def tokens(self) -> int:
        """Of all documents."""
        return sum(map(len, self.documents))


def find_text(config: QuantizeConfig, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    """What `--data` names, else the validation data of the run or of the nearest one before it.

    Args:
        config: says which, and how much.
        tokenizer: of the model.

    Raises:
        DataError: there is none, or it has changed since the run was trained.
    """
    limit = config.eval_tokens
    if config.data:
        return _of_data(config.data, tokenizer, limit)
    runs = list(_ancestry(config.model))
    for run in runs:
        stage = read_manifest(run).get("stage")
        found = None
        if stage == "pretrain":
            found = _of_pretrain(run, tokenizer, limit)
        elif stage == "sft":
            found = _of_sft(run, tokenizer, limit)
        if found is not None and any(len(document) > 1 for document in found.documents):
            return found
    where = f"none of the runs behind it ({len(runs)})" if runs else "no run of llmctl's behind it"
    raise DataError(
        f"no text to measure on: {config.model} has {where} with validation data",
        hint="pass --data FILE: text or rows that the model did not learn from",
    )


def run_of(reference: str) -> Path | None:
    """The run that a reference to a model means, None for a plain folder or a Hub id."""
    path = Path(reference).expanduser()
    return next((p for p in (path, path.parent) if (p / "manifest.json").is_file()), None)


def _ancestry(reference: str) -> Iterator[Path]:
    """The run of a model, the run of the model that it started from, and so on."""
    seen: set[Path] = set()
    queue = [reference]
    while queue and len(seen) < FURTHEST:
        run = run_of(queue.pop(0))
        if run is None or run.resolve() in seen:
            continue
        seen.add(run.resolve())
        yield run
        inputs = read_manifest(run).get("inputs", [])
        queue += [i["path"] for role in PARENTS for i in inputs if i.get("role") == role]


def _of_data(data: list[str], tokenizer: PreTrainedTokenizerBase, limit: int) -> HeldOut:
    texts, rows, inputs = read_texts(data, limit * CHARACTERS)
    examples = read_examples(rows) if rows else []
    chosen = [example for found in examples for example in found.examples]
    inputs += [facts for found in examples for facts in found.inputs]
    documents, prompts = _rendered(chosen, tokenizer, limit)
    plain = encode_documents(tokenizer, texts, end=False)
    documents = _capped([*documents, *plain], limit)
    return HeldOut(documents, prompts or _openings(documents), ", ".join(data), inputs)


def _of_pretrain(run: Path, tokenizer: PreTrainedTokenizerBase, limit: int) -> HeldOut | None:
    """Documents of the validation shards; None where there are none, or of other tokens."""
    named = [i for i in read_manifest(run).get("inputs", []) if i.get("role") == "tokens"]
    folder = Path(named[0]["path"]).expanduser() if named else run
    if not (folder / "tokens" / "index.json").is_file():
        log.warning("%s: its tokens are gone from %s", run, folder)
        return None
    if named and sha256_file(folder / "tokens" / "index.json") != named[0]["sha256"]:
        raise _changed(run, folder)
    index = open_tokens(folder)
    if index.val is None or not _reads(tokenizer, folder, index):
        return None
    stream = index.val.window(0, min(index.val.tokens, 2 * limit)).tolist()
    start = [] if index.bos_token_id is not None else [index.eos_token_id]
    documents: list[list[int]] = [[]]
    for token in stream:
        documents[-1].append(token)
        if token == index.eos_token_id:
            documents.append([*start])
    documents = _capped([d for d in documents if len(d) > 1], limit)
    return HeldOut(documents, _openings(documents), f"the validation tokens of {run}", named)


def _reads(tokenizer: PreTrainedTokenizerBase, folder: Path, index: TokenIndex) -> bool:
    """Whether tokens mean the same to this tokenizer, which may have more of them by now."""
    if fingerprint(tokenizer.backend_tokenizer) == index.tokenizer_sha256:
        return True
    made_by = load_tokenizer(str(folder))
    is_theirs = fingerprint(made_by.backend_tokenizer) == index.tokenizer_sha256
    return is_theirs and made_by.get_vocab().items() <= tokenizer.get_vocab().items()


def _of_sft(run: Path, tokenizer: PreTrainedTokenizerBase, limit: int) -> HeldOut | None:
    """The examples that a run of `sft` held out; None where it held out none."""
    config = SftConfig.load("sft", run / "recipe.yaml", {})
    if config.task != "chat":
        return None
    split = read_split(config, config.data, config.seed)
    if not split.val:
        return None
    known = {i.get("sha256") for i in read_manifest(run).get("inputs", [])}
    if any(facts["sha256"] not in known for facts in split.inputs):
        raise _changed(run, ", ".join([*config.data, *config.val_data]))
    documents, prompts = _rendered(split.val, tokenizer, limit)
    name = f"the examples that {run} held out"
    return HeldOut(documents, prompts or _openings(documents), name, split.inputs)


def _rendered(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Conversations in the chat template, and what stands before their first answers."""
    documents: list[list[int]] = []
    prompts: list[list[int]] = []
    total = 0
    for sequences in ChatFormat(tokenizer).encode_examples(examples, "assistant"):
        for encoded in sequences:
            documents.append(list(encoded.tokens))
            total += len(encoded.tokens)
            first = next((k for k, t in enumerate(encoded.trained) if t), 0)
            if first and len(prompts) < PROMPTS:
                prompts.append(list(encoded.tokens[:first]))
        if total >= limit:
            break
    return _capped(documents, limit), prompts


def _capped(documents: Sequence[list[int]], limit: int) -> list[list[int]]:
    """The first documents, of so many tokens together."""
    kept: list[list[int]] = []
    for document in documents:
        left = limit - sum(map(len, kept))
        if left < 2:
            break
        kept.append(document[:left])
    return kept


def _openings(documents: Sequence[list[int]]) -> list[list[int]]:
    """Beginnings to continue: of three documents, or of three parts of fewer."""
    long = [document for document in documents if len(document) > 1]
    if not long:
        return []
    parts = [
        document[len(document) * number // PROMPTS :]
        for number in range(PROMPTS)
        for document in long[:PROMPTS]
    ]
    chosen = [document[:] for document in long[:PROMPTS]] if len(long) >= PROMPTS else parts
    return [part[: min(PROMPT_TOKENS, max(1, len(part) // 2))] for part in chosen[:PROMPTS]]


def _changed(run: Path, what: Path | str) -> DataError:
    return DataError(
        f"the data that {run} was trained on has changed since, so what it held out is in doubt",
        file=str(what),
        hint="pass --data FILE: text that the model did not learn from",
    )
