"""Write model cards: a README.md in each `model/` and `adapter/` that a run leaves.

In: the run's directory and manifest. Out: what the model is, how it was made and its limits, with
the header that the Hub reads. No folder of this machine is named in it, and no secret.
"""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmctl import metrics, numbers
from llmctl.files import replace_file
from llmctl.redact import redact
from llmctl.runs.lineage import LineageStep, RunInput, inputs_of, lineage_of, portable
from llmctl.runs.ownership import read_json

CARD = "README.md"
FOLDERS = ("model", "adapter", "value_model")
RELATIONS = {"merge": "merge", "quantize": "quantized"}
KINDS = {
    "language": "a causal language model",
    "reward": "a reward model",
    "classifier": "a text classifier",
    "value": "a value model",
}
GIVES = {
    "reward": " It gives a response to a prompt one number, the score.",
    "value": " PPO trained it beside its policy; it is kept to continue with.",
}
"""What a model is for, where its kind alone does not say."""
ADDED_TOKENS = """\
It trains rows of its base's embedding, those of tokens that were added; vLLM and llama.cpp load no
such adapter. For them merge it into a plain model: `llmctl merge --model FOLDER -o merged`."""
CLASSES = {"language": "AutoModelForCausalLM"}
SECTIONS = {
    "language": """\
Made to be tried, measured and trained further. It has been measured only by the figures above:
what they do not show is not known. It is not ready to face people without tests of its own, least
of all where a wrong answer does harm.""",
    "reward": """\
Made to compare responses to one prompt, in training and in evaluation. Its numbers mean nothing
between prompts, and little on texts unlike those it learned from. A policy trained on it will find
what it overrates.""",
    "classifier": """\
Made for texts like those it learned from; on others its confidence says nothing. It must not
decide about people by itself.""",
    "value": "Made to continue PPO with. It is of no other use.",
}
CAVEATS = """\
- **Bias.** It repeats what its data holds, prejudice and errors too, and what its base model has
  learned. Nothing here has measured or removed that.
- **Memorisation.** Texts of the training data, above all those that stand in it often, may come out
  word for word: with names, secrets or works that others own. Do not share it more widely than its
  data.
- **Facts.** What it writes is likely text, not knowledge."""


def write_cards(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write the card of every model that a run has left."""
    for name in FOLDERS:
        folder = path / name
        if any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
            replace_file(folder / CARD, card(path, folder, manifest).encode())


def card(path: Path, folder: Path, manifest: Mapping[str, Any]) -> str:
    """Compose one card."""
    from huggingface_hub import ModelCardData  # a third of a second

    lineage, kind = lineage_of(path, manifest), kind_of(folder)
    header = ModelCardData(**_header(lineage, kind, folder)).to_yaml(line_break="\n")
    parts = [f"---\n{header}\n---", f"# {path.absolute().name}", _summary(lineage, kind, folder)]
    for title, text in _sections(lineage, kind, folder):
        parts += [f"## {title}", text]
    return redact("\n\n".join(parts)) + "\n"


def kind_of(folder: Path) -> str:
    """Tell the kind of a folder's model: language, reward, classifier or value."""
    if folder.name == "value_model":
        return "value"
    config, adapter = read_json(folder / "config.json"), read_json(folder / "adapter_config.json")
    classes = " ".join(map(str, config.get("architectures") or []))
    if adapter.get("task_type") != "SEQ_CLS" and "SequenceClassification" not in classes:
        return "language"
    return "reward" if len(config.get("id2label") or ()) == 1 else "classifier"


def license_of(folder: Path) -> str | None:
    """Read the licence from the card of a model on this disk; None without one."""
    from huggingface_hub import ModelCard

    file = folder.expanduser() / CARD
    if not file.is_file():
        return None
    try:
        model_card = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except ValueError:  # no YAML, or no text
        return None
    name = model_card.data.to_dict().get("license")  # type: ignore[no-untyped-call]
    return name if isinstance(name, str) else None


def _header(lineage: list[LineageStep], kind: str, folder: Path) -> dict[str, Any]:
    """Build the header that the Hub reads: only what is known, and only names of the Hub."""
    stage, is_adapter = str(lineage[-1].manifest.get("stage")), _is_adapter(folder)
    bases = [
        i for step in lineage for i in step.inputs if i.role in ("model", "base") and not i.run
    ]
    base = next((i.hub_id for i in bases if i.hub_id), None)
    relation = "adapter" if is_adapter else RELATIONS.get(stage, "finetune")
    data = [i.hub_id for step in lineage for i in step.inputs if i.is_data and i.hub_id]
    return {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation" if kind == "language" else "text-classification",
        "tags": ["llmctl", stage, *([] if kind == "language" else [f"{kind}-model"])],
        "license": next(filter(None, (license_of(Path(base.path)) for base in bases)), None),
        "base_model": base,
        "base_model_relation": relation if base else None,
        "datasets": list(dict.fromkeys(data)) or None,
    }


def _summary(lineage: list[LineageStep], kind: str, folder: Path) -> str:
    manifest = lineage[-1].manifest
    count = manifest.get("parameters") or (manifest.get("result") or {}).get("parameters")
    size = f" of {numbers.compact(count)} parameters" if isinstance(count, int) else ""
    version = (manifest.get("versions") or {}).get("llmctl", "")
    what = f"an adapter to {KINDS[kind]}" if _is_adapter(folder) else KINDS[kind]
    made = f"{what[0].upper()}{what[1:]}{size}, made by `llmctl {manifest.get('stage')}`"
    return (f"{made} ({version})." if version else f"{made}.") + GIVES.get(kind, "")


def _sections(lineage: list[LineageStep], kind: str, folder: Path) -> Iterator[tuple[str, str]]:
    manifest = lineage[-1].manifest
    trains_tokens = read_json(folder / "adapter_config.json").get("trainable_token_indices")
    more = f"\n\n{ADDED_TOKENS}" if trains_tokens else ""
    yield "How to use it", _usage(kind, folder) + more
    yield "How it was made", _provenance(lineage)
    result = manifest.get("result")
    figures = metrics.figures(result) if isinstance(result, dict) else []
    if figures:
        rows = [(metrics.label(name), metrics.value(name, value)) for name, value in figures]
        yield "Figures", _table(("figure", "value"), rows)
    yield "Intended use and limits", SECTIONS[kind]
    yield "Bias and memorisation", CAVEATS
    energy = manifest.get("energy")
    if isinstance(energy, dict):
        yield "Energy", _energy(energy, manifest)
    versions = manifest.get("versions") or {}
    yield "Versions", ", ".join(f"{name} {number}" for name, number in versions.items()) + "."


def _usage(kind: str, folder: Path) -> str:
    auto_class, arguments = CLASSES.get(kind, "AutoModelForSequenceClassification"), "folder"
    imports = [f"from transformers import {auto_class}, AutoTokenizer"]
    if _is_adapter(folder):
        auto_class = auto_class.replace("Auto", "AutoPeft", 1)
        imports = [f"from peft import {auto_class}", "from transformers import AutoTokenizer"]
        arguments += ", num_labels=1" if kind in ("reward", "value") else ""
    lines = [
        *imports,
        "",
        'folder = "."  # this one',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = {auto_class}.from_pretrained({arguments})",
        *(_scoring(folder) if kind == "reward" else ()),
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _scoring(folder: Path) -> list[str]:
    """Lines that score a response, by what the model was trained on: turns, pairs or texts."""
    config = read_json(folder / "config.json")
    is_template = (folder / "chat_template.jinja").is_file()
    if is_template or "chat_template" in read_json(folder / "tokenizer_config.json"):
        asked = '{"role": "user", "content": "Hi"}'
        answered = '{"role": "assistant", "content": "Hello."}'
        encode = 'tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")'
        given = [f"messages = [{asked}, {answered}]", f"inputs = {encode}"]
        inputs = 'inputs["input_ids"]'
    elif config.get("score_at") == "first-token":
        types = ", return_token_type_ids=True" if config.get("type_vocab_size", 0) > 1 else ""
        given = [f'inputs = tokenizer("Hi", "Hello."{types}, return_tensors="pt")']
        inputs = "**inputs"
    else:
        text = '"Hi, and hello." + (tokenizer.eos_token or "")'
        given = [f'inputs = tokenizer({text}, return_tensors="pt")']
        inputs = 'inputs["input_ids"]'
    return [*given, f"score = model({inputs}).logits.item()  # of the response; higher is better"]


def _provenance(lineage: list[LineageStep]) -> str:
    """List the command, then every run before it and every input."""
    command = [portable(str(word)) for word in lineage[-1].manifest.get("command") or []]
    parts = [f"```sh\n{shlex.join(command)}\n```"] if command else []
    parts.append("The run's `recipe.yaml` holds every setting as it was resolved.")
    rows = [_step_row(step) for step in lineage]
    parts.append(_table(("stage", "run", "inputs"), rows))
    revision = (lineage[-1].manifest.get("git") or {}).get("commit")
    seed = f"Seed {lineage[-1].manifest.get('seed')}"
    parts.append(f"{seed}; commit {revision[:12]}." if isinstance(revision, str) else f"{seed}.")
    return "\n\n".join(parts)


def _step_row(step: LineageStep) -> tuple[str, str, str]:
    inputs = "; ".join(map(_input_name, inputs_of(step.path, step.manifest)))
    return str(step.manifest.get("stage")), _code(step.path.absolute().name), inputs


def _input_name(item: RunInput) -> str:
    """Name an input, with its revision or hash."""
    digest = item.revision or item.sha256
    kind = "revision" if item.revision else "sha256"
    name = item.run.absolute().name if item.run else portable(item.path)
    shown = f"{item.role.replace('_', ' ')} {_code(name)}"
    return f"{shown} ({kind} {digest[:12]}…)" if digest else shown


def _energy(energy: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    device = f" on {manifest['device']}" if manifest.get("device") else ""
    spent = f"{numbers.energy(energy['kwh'])} in {numbers.seconds(energy['seconds'])}{device}"
    return f"About {spent}, for this run alone. How it was found: {energy['method']}."


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _code(text: str) -> str:
    """Format text as Markdown code, on one line."""
    flat = json.dumps(text, ensure_ascii=False)[1:-1].replace("`", "'")
    return f"`{flat}`"


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()
