"""Find held-out text to measure a model on: `--data`, or the validation data of its runs.

In: a reference to a model, or names of data. Out: documents as tokens, with prompts for samples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmctl.config.commands.quantize import QuantizeConfig
from llmctl.config.commands.sft import SftConfig
from llmctl.console import log
from llmctl.data.bad_rows import BadRows
from llmctl.data.chat.render import ChatFormat
from llmctl.data.documents import read_texts
from llmctl.data.examples import Example, read_examples
from llmctl.data.shards import TokenIndex, open_tokens
from llmctl.data.split import read_split
from llmctl.data.tokenizer.train import fingerprint
from llmctl.decode.prompts import PromptEncoder
from llmctl.errors import DataError
from llmctl.evaluate.perplexity import encode_documents
from llmctl.files import sha256_file
from llmctl.models.loading import load_tokenizer
from llmctl.runs.directory import read_manifest

PARENTS = ("model", "adapter", "base")
"""Roles of the inputs that a run started from."""
PROMPTS, PROMPT_TOKENS = 3, 24
CHARACTERS_PER_TOKEN = 16
"""Characters of plain text that are read for each token."""
MAX_ANCESTORS = 20


@dataclass(frozen=True)
class HeldOut:
    """Documents that the model did not learn from."""

    documents: list[list[int]]
    prompts: list[list[int]]
    name: str
    """Description of the text for messages."""
    inputs: list[dict[str, Any]]
    """For the manifest."""
    end_of_answer: int | None = None
    """Id of the token that ends answers, where the prompts are in the chat template."""

    @property
    def tokens(self) -> int:
        """Number of tokens of all documents."""
        return sum(map(len, self.documents))


def find_held_out(config: QuantizeConfig, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    """Read `--data`, else the validation data of the run or of the nearest one before it.

    Raises:
        DataError: there is none, or it has changed since the run was trained.
    """
    limit = config.eval_tokens
    if config.data:
        return _from_data(config.data, tokenizer, limit)
    runs = list(_ancestor_runs(config.model))
    readers = {"pretrain": _from_pretrain_run, "sft": _from_sft_run}
    for run in runs:
        reader = readers.get(read_manifest(run).get("stage", ""))
        held_out = None if reader is None else reader(run, tokenizer, limit)
        if held_out is not None and any(len(document) > 1 for document in held_out.documents):
            return held_out
    where = f"none of the runs behind it ({len(runs)})" if runs else "no run of llmctl's behind it"
    raise DataError(
        f"no text to measure on: {config.model} has {where} with validation data",
        hint="pass --data FILE: text or rows that the model did not learn from",
    )


def run_of(reference: str) -> Path | None:
    """The run that a reference to a model means, None for a plain folder or a Hub id."""
    path = Path(reference).expanduser()
    return next((p for p in (path, path.parent) if (p / "manifest.json").is_file()), None)


def _ancestor_runs(reference: str) -> Iterator[Path]:
    """Yield the run of a model, the run of the model that it started from, and so on."""
    seen: set[Path] = set()
    queue = [reference]
    while queue and len(seen) < MAX_ANCESTORS:
        run = run_of(queue.pop(0))
        if run is None or run.resolve() in seen:
            continue
        seen.add(run.resolve())
        yield run
        inputs = read_manifest(run).get("inputs", [])
        queue += [i["path"] for role in PARENTS for i in inputs if i.get("role") == role]


def _from_data(data: list[str], tokenizer: PreTrainedTokenizerBase, limit: int) -> HeldOut:
    texts, rows, inputs = read_texts(data, limit * CHARACTERS_PER_TOKEN)
    bad = BadRows()
    sets = read_examples(rows, bad=bad) if rows else []
    bad.report()
    examples = [example for data_set in sets for example in data_set.examples]
    inputs += [entry for data_set in sets for entry in data_set.inputs]
    documents, prompts = _render(examples, tokenizer, limit)
    plain = encode_documents(tokenizer, texts, end=False)
    documents = _truncate([*documents, *plain], limit)
    return _from_rendered(documents, prompts, tokenizer, ", ".join(data), inputs)


def _from_pretrain_run(run: Path, tokenizer: PreTrainedTokenizerBase, limit: int) -> HeldOut | None:
    """Documents of the validation shards; None where there are none, or the tokenizer differs."""
    token_inputs = [i for i in read_manifest(run).get("inputs", []) if i.get("role") == "tokens"]
    folder = Path(token_inputs[0]["path"]).expanduser() if token_inputs else run
    index_file = folder / "tokens" / "index.json"
    if not index_file.is_file():
        log.warning("%s: its tokens are gone from %s", run, folder)
        return None
    if token_inputs and sha256_file(index_file) != token_inputs[0]["sha256"]:
        raise _changed(run, folder)
    index = open_tokens(folder)
    if index.val is None or not _has_same_ids(tokenizer, folder, index):
        return None
    stream = index.val.window(0, min(index.val.tokens, 2 * limit)).tolist()
    start = [] if index.bos_token_id is not None else [index.eos_token_id]
    documents: list[list[int]] = [[]]
    for token in stream:
        documents[-1].append(token)
        if token == index.eos_token_id:
            documents.append([*start])
    documents = _truncate([d for d in documents if len(d) > 1], limit)
    return HeldOut(
        documents, _opening_prompts(documents), f"the validation tokens of {run}", token_inputs
    )


def _has_same_ids(tokenizer: PreTrainedTokenizerBase, folder: Path, index: TokenIndex) -> bool:
    """Whether this tokenizer gives the shards' tokens the same ids; it may have further ones."""
    if fingerprint(tokenizer.backend_tokenizer) == index.tokenizer_sha256:
        return True
    made_by = load_tokenizer(str(folder))
    is_theirs = fingerprint(made_by.backend_tokenizer) == index.tokenizer_sha256
    return is_theirs and made_by.get_vocab().items() <= tokenizer.get_vocab().items()


def _from_sft_run(run: Path, tokenizer: PreTrainedTokenizerBase, limit: int) -> HeldOut | None:
    """Examples that an sft run held out; None where it held out none."""
    config = SftConfig.load("sft", run / "recipe.yaml", {})
    if config.task != "chat":
        return None
    split = read_split(config, config.data, config.seed, BadRows(config.skip_bad_rows))
    if not split.val:
        return None
    known = {i.get("sha256") for i in read_manifest(run).get("inputs", [])}
    if any(entry["sha256"] not in known for entry in split.inputs):
        raise _changed(run, ", ".join([*config.data, *config.val_data]))
    documents, prompts = _render(split.val, tokenizer, limit)
    name = f"the examples that {run} held out"
    return _from_rendered(documents, prompts, tokenizer, name, split.inputs)


def _from_rendered(
    documents: list[list[int]],
    prompts: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    inputs: list[dict[str, Any]],
) -> HeldOut:
    """Take the prompts of conversations, or beginnings where there are none."""
    if not prompts:
        return HeldOut(documents, _opening_prompts(documents), name, inputs)
    end_of_answer = PromptEncoder(tokenizer, chat=True).end_of_answer([])
    return HeldOut(documents, prompts, name, inputs, end_of_answer)


def _render(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Render conversations in the chat template; also the prompts before their first answers."""
    documents: list[list[int]] = []
    prompts: list[list[int]] = []
    total = 0
    for sequences in ChatFormat(tokenizer).encode_examples(examples, "assistant", BadRows()):
        for encoded in sequences:
            documents.append(list(encoded.tokens))
            total += len(encoded.tokens)
            first = next((k for k, t in enumerate(encoded.trained) if t), 0)
            if first and len(prompts) < PROMPTS:
                prompts.append(list(encoded.tokens[:first]))
        if total >= limit:
            break
    return _truncate(documents, limit), prompts


def _truncate(documents: Sequence[list[int]], limit: int) -> list[list[int]]:
    """Cut the documents off after so many tokens in all."""
    kept: list[list[int]] = []
    for document in documents:
        left = limit - sum(map(len, kept))
        if left < 2:
            break
        kept.append(document[:left])
    return kept


def _opening_prompts(documents: Sequence[list[int]]) -> list[list[int]]:
    """Prompts from the beginnings of three documents, or of three parts of fewer."""
    long = [document for document in documents if len(document) > 1]
    parts = [
        document[len(document) * number // PROMPTS :]
        for number in range(PROMPTS)
        for document in long[:PROMPTS]
    ]
    return [part[: min(PROMPT_TOKENS, max(1, len(part) // 2))] for part in parts[:PROMPTS]]


def _changed(run: Path, what: Path | str) -> DataError:
    return DataError(
        f"the data that {run} was trained on has changed since, so what it held out is in doubt",
        file=str(what),
        hint="pass --data FILE: text that the model did not learn from",
    )
