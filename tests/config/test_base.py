"""Configs: precedence, strict recipes, messages that name the flag or the line."""

import pytest

from llmctl.cli import COMMANDS
from llmctl.config import commands
from llmctl.config.commands.generate import GenerateConfig
from llmctl.config.commands.pretrain import PretrainConfig
from llmctl.config.commands.tokenize import TokenizeConfig
from llmctl.errors import UserError

CLASSES = {name: commands.config_of(name) for name in COMMANDS}


def load(tmp_path, text, flags=None, cls=PretrainConfig, stage="pretrain"):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    return cls.load(stage, recipe, flags or {})


def refusal(tmp_path, text, flags=None):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, flags)
    assert caught.value.code == 2
    return str(caught.value)


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    config = load(tmp_path, "tokens: a\nlr: 1e-4\nseed: 3\n", {"lr": "2e-4"})
    assert (config.tokens, config.lr, config.seed, config.keep) == ("a", 2e-4, 3, 2)


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_has_help_that_ends_in_a_full_stop(name):
    for field_name, field in CLASSES[name].model_fields.items():
        assert field.description, field_name
        assert field.description.rstrip().endswith("."), field_name


@pytest.mark.parametrize("name", CLASSES)
def test_summary_is_the_docstring(name):
    assert CLASSES[name].__doc__ == COMMANDS[name]


@pytest.mark.parametrize(
    ("config", "stage"),
    [
        (PretrainConfig(tokens="runs/tok", lr=3e-4, max_steps="5k"), "pretrain"),
        (TokenizeConfig(data=["a.txt"], tokenizer="gpt2"), "tokenize"),
        (GenerateConfig(model="m", stop=["\n"]), "generate"),
    ],
)
def test_a_written_recipe_reads_back_the_same(tmp_path, config, stage):
    again = load(tmp_path, config.to_yaml(stage), cls=type(config), stage=stage)
    assert again == config


def test_a_recipe_leaves_out_what_steers_one_call():
    written = PretrainConfig(tokens="t", overwrite=True, resume=True).to_yaml("pretrain")
    for name in ("overwrite", "resume", "dry_run", "as_json", "out"):
        assert f"\n{name}:" not in written


@pytest.mark.parametrize(
    ("value", "number"),
    [("5k", 5000), ("20M", 20_000_000), ("1.5GB", 1_500_000_000), ("1e3", 1000)],
)
def test_counts_take_suffixes(value, number):
    assert TokenizeConfig(data=["a"], train_bytes=value).train_bytes == number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tokens: a\nlrr: 1", "recipe.yaml:2: unknown key `lrr`: did you mean `lr`?"),
        ("tokens: a\nlearning_rate: 1", "unknown key `learning_rate`: it is called `lr` here"),
        ("tokens: a\nlr: fast", "recipe.yaml:2: lr: should be a valid number"),
        ("tokens: a\nlr: -1", "lr: should be greater than 0, got -1"),
        ("tokens: [a\nlr: 1", "malformed YAML"),
        ("tokens: a\ntokens: b", "recipe.yaml:2: malformed YAML: duplicate key `tokens`"),
        ("a: &x [1]\nb: *x", "aliases are not allowed"),
        ("- a\n- b", "expected a mapping"),
        ("tokens: !!python/object:os.system x", "malformed YAML"),
        ("tokens: a\n\tlr: 1", "malformed YAML"),
        ("tokens: " + "[" * 50, "nested deeper"),
        ("stage: sft\ntokens: a", "the recipe is for `sft`"),
        ("x: " + "a" * 1_000_001, "the limit is 32,000"),
    ],
)
def test_bad_recipes(tmp_path, text, expected):
    message = refusal(tmp_path, text)
    assert expected in message
    assert len(message.splitlines()) <= 3


def test_billion_laughs_is_refused_at_once(tmp_path):
    bomb = 'a: &a ["x","x"]\n' + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(20)
    )
    assert "aliases are not allowed" in refusal(tmp_path, bomb)


def test_a_missing_recipe_and_one_that_is_not_utf8(tmp_path):
    with pytest.raises(UserError, match="cannot read the recipe"):
        PretrainConfig.load("pretrain", tmp_path / "none.yaml", {})
    (tmp_path / "latin.yaml").write_bytes(b"tokens: caf\xe9")
    with pytest.raises(UserError, match="not UTF-8 at byte 11"):
        PretrainConfig.load("pretrain", tmp_path / "latin.yaml", {})


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, "give --tokens"),
        ({"tokens": "a", "data": ["b"]}, "give --tokens"),
        ({"data": ["b"]}, "--data needs --tokenizer"),
        ({"tokens": "a", "model": "m", "layers": "3"}, "drop --layers"),
        ({"tokens": "a", "config_from": "m", "size": "tiny"}, "drop --size"),
        ({"tokens": "a", "epochs": "1", "max_steps": "3"}, "not both"),
        ({"tokens": "a", "grad_accum": "2", "batch_tokens": "3k"}, "not both"),
        ({"tokens": "a", "decay": "0.5"}, "--schedule wsd"),
        ({"tokens": "a", "val_fraction": "0.5"}, "goes with --data"),
        ({"tokens": "a", "seed": "-1"}, "--seed: should be greater than or equal to 0, got '-1'"),
        ({"tokens": "a", "size": "huge"}, "--size: should be 'nano'"),
        ({"tokens": "a", "max_steps": "many"}, "--max-steps: expected a count"),
        ({"tokens": "a", "max_steps": "1.5"}, "expected a whole number"),
    ],
)
def test_flags_that_do_not_go_together(flags, expected):
    with pytest.raises(UserError) as caught:
        PretrainConfig.load("pretrain", None, flags)
    assert expected in str(caught.value)
