"""`llmctl plan` and dry runs: the same figures by either way, as text and as JSON."""

import json
import os

import pytest
import yaml

from tests.run_files import write_rows

SHAPE = ("plan", "--shape", "gpt2-124m", "--json")
QUICK = ("--max-steps", 4, "--threads", 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Examples and preferences, a few each."""
    folder = tmp_path_factory.mktemp("data")
    animals, colours = ("cat", "dog", "bird", "fish"), ("red", "green", "blue", "grey", "black")
    said = [(f"What is a {c} {a}?", f"A {a} that is {c}.") for a in animals for c in colours]
    rows = {
        "chats": [{"prompt": asked, "response": answer} for asked, answer in said],
        "pairs": [
            {"prompt": asked, "chosen": answer, "rejected": f"No {answer}"}
            for asked, answer in said
        ],
    }
    for name, found in rows.items():
        write_rows(folder / f"{name}.jsonl", found)
    return folder


def planned(cli, *arguments):
    result = cli(*arguments)
    assert result.code == 0, result.err
    return json.loads(result.out)


def recipe_of(tmp_path, stage, **fields):
    path = tmp_path / f"{stage}.yaml"
    path.write_text(yaml.safe_dump({"stage": stage, **fields}))
    return path


def test_a_shape_as_json(cli):
    found = planned(cli, *SHAPE, "--tokens", "2.5B", "--tflops", 100, "--device-memory", "80GB")
    parameters = found["parameters"]["total"]
    assert parameters == 124_439_808
    assert found["memory"]["bytes_per_parameter"] == 16
    compute = found["compute"]
    assert compute["flops"] == pytest.approx(
        (6 * parameters + 12 * 12 * 768 * 1024) * found["run"]["tokens"]
    )
    assert found["run"]["tokens"] == pytest.approx(2.5e9, rel=1e-3)
    assert compute["seconds"] == pytest.approx(compute["flops"] / 100e12)
    assert compute["pf_days"] == pytest.approx(compute["flops"] / 8.64e19)
    assert found["scaling"]["besiroglu_2024"]["loss"] == pytest.approx(
        1.8172 + 482.01 / parameters**0.3478 + 2085.43 / found["run"]["tokens"] ** 0.3658
    )
    assert (found["device"], found["flags"], found["sharding"][0]["fits"]) == ("cuda", "", True)


def test_a_shape_as_text(cli):
    result = cli("plan", "--shape", "nano", "--tokens-per-second", 1000, "--tokens", "1M")
    assert result.code == 0, result.err
    assert "\x1b" not in result.out
    for word in ("parameters", "memory", "PF-days", "16m40s", "sharding", "flags", "best"):
        assert word in result.out, word


def test_more_devices_take_less_time_and_less_each(cli):
    big = ("plan", "--shape", "llama-2-7b", "--json", "--device-memory", "80GB", "--tflops", 400)
    one, many = planned(cli, *big), planned(cli, *big, "--devices", 8)
    assert many["compute"]["seconds"] == pytest.approx(one["compute"]["seconds"] / 8, rel=1e-3)
    assert [way["fits"] for way in one["sharding"]] == [False]
    assert {way["name"]: way["fits"] for way in many["sharding"]} == {"DDP": False, "FSDP2": True}
    assert "fsdp2.yaml" in many["flags"]
    assert one["flags"] is None


def test_the_speed_is_measured(cli):
    found = planned(cli, "plan", "--shape", "nano", "--length", 64, "--measure", "--json")
    rate = found["compute"]["rate"]
    assert rate["origin"] == "measured"
    assert 1e6 < rate["flops"] < 1e15


def run_of(stage, base, tokens, files):
    """Fields of a short run of a command."""
    chats, pairs = ([str(files / f"{name}.jsonl")] for name in ("chats", "pairs"))
    common = {"max_steps": 4, "threads": 1}
    return {
        "pretrain": {"tokens": str(tokens), "layers": 2, "hidden": 32, "heads": 2, **common},
        "sft": {"model": str(base), "data": chats, "lora": True, **common},
        "reward": {"model": str(base), "data": pairs, **common},
        "dpo": {"model": str(base), "data": pairs, "batch_size": 2, **common},
        "ppo": {
            "model": str(base),
            "data": chats,
            "reward_rule": ["length:4"],
            "max_new_tokens": 8,
            "batch_size": 4,
            **common,
        },
    }[stage]


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "dpo", "ppo"])
def test_a_dry_run_and_a_plan_say_the_same(cli, roomy, tokens, files, tmp_path, stage):
    recipe = recipe_of(tmp_path, stage, **run_of(stage, roomy, tokens, files))
    dry = cli(stage, "-c", recipe, "-o", tmp_path / "run", "--dry-run", "--json")
    assert dry.code == 0, dry.err
    shown = json.loads(dry.out)
    assert set(shown) == {"recipe", "plan"}
    assert shown["recipe"]["stage"] == stage
    alone = planned(cli, "plan", recipe, "--json")
    for part in ("parameters", "run", "memory", "sharding", "flags"):
        assert alone[part] == shown["plan"][part], part
    assert alone["run"]["steps"] == 4
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_the_block_after_its_recipe(cli, roomy, files, tmp_path):
    options = ("--data", files / "chats.jsonl", *QUICK, "-o", tmp_path / "run", "--dry-run")
    result = cli("sft", "--model", roomy, *options)
    assert result.code == 0, result.err
    assert yaml.safe_load(result.out)["stage"] == "sft"
    assert "at the peak" in result.err
    assert "at the peak" not in cli("sft", "--model", roomy, *options, "-q").err


def test_pretraining_on_text_that_is_not_encoded_yet(cli, corpus, tokens):
    options = ("--data", corpus, "--tokenizer", tokens, "--size", "nano", "--dry-run", "--json")
    shown = planned(cli, "pretrain", *options)
    assert shown["plan"]["parameters"]["total"] > 500_000
    assert "4 bytes of text" in shown["plan"]["notes"][0]


@pytest.mark.parametrize(
    "command",
    [
        ("tokenize", "--data", "{corpus}"),
        ("generate", "--model", "{base}", "--prompt", "The"),
    ],
    ids=lambda command: command[0],
)
def test_every_dry_run_is_one_object(cli, base, corpus, command):
    words = [word.format(base=base, corpus=corpus) for word in command]
    shown = planned(cli, *words, "--dry-run", "--json")
    assert set(shown) == {"recipe", "plan"}
    assert shown["recipe"]["stage"] == command[0]


def test_a_recipe_for_another_model(cli, tmp_path):
    recipe = recipe_of(tmp_path, "sft", model="absent", data=["absent.jsonl"], lora=True)
    words = ("plan", recipe, "--shape", "llama-2-7b", "--device-memory", "24GB", "--json")
    found = planned(cli, *words)
    assert found["parameters"]["trained"] == 39_976_960  # rank 16 on all seven layers of 32 blocks
    assert found["run"]["steps"] is None
    assert "--load-in-4bit" in found["flags"]
    words = ("plan", recipe, "--shape", "nano", "--rows", 800, "--length", 128, "--json")
    run = planned(cli, *words)["run"]
    assert (run["steps"], run["length"], run["tokens"]) == (300, 128, 300 * 8 * 128)


@pytest.mark.parametrize(
    ("stage", "words", "message"),
    [
        ("sft", ("--rows", 9), "--rows: the data is read"),
        ("sft", ("--tokens", "1M"), "--tokens is of pretraining"),
        ("pretrain", ("--rows", 9), "--rows is of examples"),
    ],
)
def test_flags_that_would_change_nothing_are_refused(cli, tmp_path, stage, words, message):
    rest = {"model": "m", "data": ["d"]} if stage == "sft" else {"tokens": "absent"}
    result = cli("plan", recipe_of(tmp_path, stage, **rest), *words)
    assert result.code == 2
    assert message in result.err


def test_a_recipe_whose_tokens_are_not_there_yet(cli, tmp_path):
    recipe = recipe_of(tmp_path, "pretrain", tokens="absent", size="small", arch="gpt2")
    found = planned(cli, "plan", recipe, "--json", "--tokens", "2.5B")
    assert found["parameters"]["total"] == 124_439_808
    assert found["run"]["tokens"] == pytest.approx(2.5e9, rel=1e-3)
    assert "vocabulary of 50,257" in found["notes"][0]


BAD = [
    ((), "RECIPE or --shape is required"),
    (("--shape", "gtp2-124m"), "did you mean gpt2-124m?"),
    (("--shape", "nano", "--devices", 0), "--devices: should be greater than 0, got '0'"),
    (("--shape", "nano", "--device-memory", "lots"), "expected a count such as"),
    (("--shape", "nano", "--device-memory", "-1GB"), "--device-memory: expected a count"),
    (("--shape", "nano", "--tflops", 0), "--tflops: should be greater than 0"),
    (("--shape", "nano", "--tflops", 1, "--measure"), "give --tflops or --measure, not both"),
    (("--shape", "nano", "--rows", 5), "--rows goes with a recipe"),
    (("absent.yaml",), "absent.yaml: cannot read the recipe"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=lambda v: str(v)[:30])
def test_bad_input(cli, words, message):
    result = cli("plan", *words)
    assert result.code == 2, result.err
    assert message in result.err
    assert result.out == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: generate\nmodel: m\n", "recipe.yaml:1: a recipe of `generate`, and plans are of"),
        ("model: m\n", "a recipe without `stage`"),
        ("stages: [{stage: sft}]\n", "recipe.yaml:1: a recipe of several stages"),
        ("stage: sft\nmodel: m\n", "--data is required"),
        ("stage: sft\ndata: [d]\n", "--model is required"),
        ("stage: sft\nmodel: m\ndata: [d]\nlorra: true\n", "recipe.yaml:4: unknown key `lorra`"),
    ],
)
def test_bad_recipes(cli, tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    result = cli("plan", path, "--json")
    assert result.code == 2, result.err
    assert message in result.err
    assert json.loads(result.out)["error"]["code"] == 2


def test_a_recipe_whose_model_is_missing(cli, tmp_path):
    recipe = recipe_of(tmp_path, "sft", model=os.fspath(tmp_path / "no"), data=["absent.jsonl"])
    result = cli("plan", recipe)
    assert result.code == 4
    assert "no such model folder" in result.err


def test_more_tokens_than_positions_are_noted(cli):
    asked = ("plan", "--shape", "gpt2-124m", "--json", "--length")
    notes = [json.loads(cli(*asked, length).out)["notes"] for length in (1024, 1025)]
    assert not any("positions" in note for note in notes[0])
    assert "the model has 1,024 positions, fewer than the 1,025 of a sequence" in notes[1]
