"""Model cards and energy: what a finished run says of its model, and what it must not say."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from llmctl.runs import energy
from llmctl.runs.cards import card, kind_of, write_cards
from llmctl.runs.energy import KWH, EnergyMeter
from llmctl.runs.lineage import lineage_of, portable
from tests.conftest import SMALL


def make(path: Path, stage: str, inputs=(), **facts) -> Path:
    """A run directory with a model, as llmctl leaves it."""
    (path / "model").mkdir(parents=True)
    (path / "model/config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    manifest = {
        "stage": stage,
        "versions": {"llmctl": "0.1"},
        "inputs": list(inputs),
        "command": ["llmctl", stage],
        "seed": 3,
        **facts,
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def card_of(path: Path, name: str = "model") -> ModelCard:
    manifest = json.loads((path / "manifest.json").read_text())
    return ModelCard(card(path, path / name, manifest))


def test_a_trained_model_has_a_card_the_hub_reads(base, tokens):
    found = ModelCard((base / "model/README.md").read_text())
    assert found.data.library_name == "transformers"
    assert found.data.pipeline_tag == "text-generation"
    assert found.data.tags == ["llmctl", "pretrain"]
    for heading in ("How to use it", "How it was made", "Figures", "Energy", "Versions"):
        assert f"## {heading}\n" in found.text
    for word in ("Bias", "Memorisation", "Intended use and limits"):
        assert word in found.text
    manifest = json.loads((base / "manifest.json").read_text())
    assert f"tokens `{tokens.name}` (sha256 {manifest['inputs'][0]['sha256'][:12]}" in found.text
    assert "| tokenize | `tok` | data" in found.text, "the chain goes back to the first run"
    assert f"| Validation loss | {manifest['result']['val_loss']:.4g} |" in found.text
    assert str(tokens.parent) not in found.text, "no folder of this machine"
    outputs = {output["path"] for output in manifest["outputs"]}
    assert "model/README.md" in outputs


def test_its_code_opens_the_model(base, monkeypatch):
    text = (base / "model/README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    monkeypatch.chdir(base / "model")
    names: dict = {}
    exec(code, names)
    assert names["model"].num_parameters() > 0
    assert len(names["tokenizer"]) > 0


def test_every_folder_of_a_reward_run_says_what_it_is(cli, roomy, tmp_path):
    out = tmp_path / "rm"
    flags = ("--lora", "--merge", "--max-steps", 2, "--val-size", 8, "--threads", 1)
    data = ("--data", "builtin:preferences")
    result = cli("reward", "--model", roomy, *data, *flags, "-o", out)
    assert result.code == 0, result.err
    for name in ("model", "adapter"):
        found = ModelCard((out / name / "README.md").read_text())
        assert found.data.pipeline_tag == "text-classification"
        assert "reward model" in found.text
    assert ModelCard((out / "adapter/README.md").read_text()).data.library_name == "peft"
    assert "num_labels=1" in (out / "adapter/README.md").read_text()
    assert "num_labels" not in (out / "model/README.md").read_text()


@pytest.mark.parametrize(
    ("folder", "shape", "said"),
    [
        ("model", ["LlamaForSequenceClassification", 1], "A reward model of 260k parameters, made"),
        ("model", ["LlamaForSequenceClassification", 3], "A text classifier of 260k parameters"),
        ("value_model", ["LlamaForSequenceClassification", 1], "A value model of 260k parameters"),
        ("model", ["LlamaForCausalLM", 1], "A causal language model of 260k parameters, made"),
        ("adapter", ["LlamaForSequenceClassification", 1], "An adapter to a reward model of 260k"),
    ],
)
def test_parameters_are_the_models(tmp_path, folder, shape, said):
    path = make(tmp_path / "run", "reward", parameters=260_000)
    (path / folder).mkdir(exist_ok=True)
    labels = {str(number): "x" for number in range(shape[1])}
    config = {"architectures": [shape[0]], "id2label": labels}
    (path / folder / "config.json").write_text(json.dumps(config))
    if folder == "adapter":
        (path / folder / "adapter_config.json").write_text('{"task_type": "SEQ_CLS"}')
    text = str(card_of(path, folder))
    assert said in text
    assert "number of" not in text


@pytest.mark.parametrize("rows", [None, {"embed_tokens": [5, 6]}])
def test_an_adapter_that_trains_tokens_says_where_it_does_not_load(tmp_path, rows):
    path = make(tmp_path / "run", "sft")
    (path / "adapter").mkdir()
    about = {"task_type": "CAUSAL_LM", "trainable_token_indices": rows}
    (path / "adapter/adapter_config.json").write_text(json.dumps(about))
    text = str(card_of(path, "adapter"))
    assert ("vLLM and llama.cpp load no\nsuch adapter" in text) == (rows is not None)
    assert ("llmctl merge" in text) == (rows is not None)


def test_hub_ids_and_licences_stand_in_the_header(tmp_path):
    base = tmp_path / "downloaded"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    first = make(
        tmp_path / "sft",
        "sft",
        [
            {"role": "model", "path": str(base)},
            {"role": "data", "path": "org/set", "revision": "a"},
        ],
    )
    second = make(
        tmp_path / "ppo",
        "ppo",
        [{"role": "model", "path": str(first)}, {"role": "reward_model", "path": "org/judge"}],
    )
    data = card_of(second).data
    assert data.license == "apache-2.0"
    assert data.datasets == ["org/set"]
    assert "base_model" not in data.to_dict(), "a folder of this machine is no name on the Hub"
    third = make(tmp_path / "hub", "sft", [{"role": "model", "path": "org/base"}])
    assert card_of(third).data.base_model == "org/base"
    pinned = make(tmp_path / "pinned", "sft", [{"role": "model", "path": "org/base@v1"}])
    assert card_of(pinned).data.base_model == "org/base", "the header has no place for a revision"
    assert card_of(third).data.to_dict()["base_model_relation"] == "finetune"


def test_no_folder_and_no_secret_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SERVICE_TOKEN", "s3cretvalue")
    monkeypatch.chdir(tmp_path)
    words = ["llmctl", "sft", "--data=/home/ada/own files/a.jsonl=0.5", "--system", "s3cretvalue"]
    words += ["-o", str(tmp_path / "runs/x"), "--model", "~/models/m"]
    text = str(card_of(make(tmp_path / "runs/x", "sft", command=words)))
    assert "s3cretvalue" not in text
    for folder in ("/home/ada", str(tmp_path), "own files", "models/"):
        assert folder not in text
    assert "a.jsonl=0.5" in text
    assert "-o runs/x" in text


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("/a/b/c.jsonl", "…/c.jsonl"),
        ("--data=/a/b c/d=0.7", "--data=…/d=0.7"),
        ("runs/base", "runs/base"),
        ("org/name", "org/name"),
        ("regex:a/b", "regex:a/b"),
        ("~/x/y", "…/y"),
    ],
)
def test_words_of_a_command_travel(word, shown):
    assert portable(word) == shown


def test_hostile_names_stay_in_their_cells(tmp_path):
    name = "a|b`c\n## Not a heading\n<script>"
    text = str(card_of(make(tmp_path / "x", "sft", [{"role": "data", "path": name}])))
    assert "\n## Not a heading" not in text
    assert "a\\|b'c" in text


def test_broken_ancestors_do_no_harm(tmp_path):
    path = make(tmp_path / "x", "sft", [{"role": "model", "path": "y"}, "no entry", {}])
    (tmp_path / "y").mkdir()
    (tmp_path / "y/manifest.json").write_text("[1")
    manifest = json.loads((path / "manifest.json").read_text())
    assert [step.path.name for step in lineage_of(path, manifest)] == ["x"]
    write_cards(path, manifest)
    make(tmp_path / "a", "sft", [{"role": "model", "path": str(tmp_path / "b")}])
    make(tmp_path / "b", "sft", [{"role": "model", "path": str(tmp_path / "a")}])
    loop = json.loads((tmp_path / "a/manifest.json").read_text())
    assert len(lineage_of(tmp_path / "a", loop)) == 2, "a circle ends"


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "language"),
        ({"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "s"}}, "reward"),
        (
            {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b"}},
            "classifier",
        ),
        ({"architectures": ["BertForSequenceClassification"]}, "classifier"),
    ],
)
def test_a_folder_tells_what_its_model_does(tmp_path, shape, kind):
    (tmp_path / "config.json").write_text(json.dumps(shape))
    assert kind_of(tmp_path) == kind


def test_a_run_counts_its_energy_and_resuming_adds_to_it(cli, tokens, tmp_path):
    out = tmp_path / "run"
    flags = ("--tokens", tokens, *SMALL, "--threads", 1, "-o", out)
    assert cli("pretrain", *flags, "--max-steps", 4, "--save-every", 2).code == 0
    first = json.loads((out / "manifest.json").read_text())["energy"]
    assert 0 < first["kwh"] < 1e-3
    assert "12 W" in first["method"] or "RAPL" in first["method"]
    (out / "status.json").write_text('{"state": "preempted", "step": 4, "resumable": true}')
    again = cli("pretrain", *flags, "--max-steps", 4, "--save-every", 2, "--resume")
    assert again.code == 0, again.err
    second = json.loads((out / "manifest.json").read_text())["energy"]
    assert second["kwh"] > first["kwh"]
    assert second["seconds"] > first["seconds"]


def test_cores_are_counted_where_there_is_no_counter(monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", Path("/nowhere"))
    monkeypatch.setattr(energy, "NVML", "no-such-library.so")
    busy = iter([10.0, 13.0, 13.0])
    monkeypatch.setattr(energy, "_core_seconds", lambda: next(busy))
    found = EnergyMeter().add({"energy": {"kwh": 1.0, "seconds": 5.0}})
    assert found["kwh"] == pytest.approx(1 + 3 * 12 / KWH)
    assert found["seconds"] >= 5
    assert "assumed to draw 12 W" in found["method"]


def test_counters_of_cpus_are_followed_through_their_ends(tmp_path, monkeypatch):
    for name, whole in (("intel-rapl:0", "package-0"), ("intel-rapl:1", "psys")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(whole)
        (tmp_path / name / "max_energy_range_uj").write_text("1000000\n")
    counter = tmp_path / "intel-rapl:0/energy_uj"
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    counter.write_text("900000\n")
    meter = EnergyMeter()
    counter.write_text("100000\n")
    meter.tick()
    counter.write_text("500000\n")
    found = meter.add({})
    assert found["kwh"] == pytest.approx(0.6 / KWH)
    assert "RAPL" in found["method"]


def test_gpus_count_where_the_run_used_them(monkeypatch):
    readings = iter(
        [[("Fast GPU", 10.0), ("Fast GPU", 0.0)], [("Fast GPU", 46.0), ("Fast GPU", 9)]]
    )
    monkeypatch.setattr(energy, "_gpus", lambda: next(readings))
    monkeypatch.setattr(energy, "_core_seconds", lambda: 0.0)
    monkeypatch.setattr(energy, "POWERCAP", Path("/nowhere"))
    found = EnergyMeter().add({"device": "Fast GPU"})
    assert found["kwh"] == pytest.approx(36 / KWH), "of one process, the first GPU"
    assert "NVML" in found["method"]
    readings = iter([[("Fast GPU", 10.0)], [("Fast GPU", 46.0)]])
    assert EnergyMeter().add({"device": "Some CPU"})["kwh"] == 0
