"""PPO with reward models: shared weights, weights of rewards, where the value model starts."""

import json
import random
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from llmctl.ppo.setup import prepare_ppo
from tests.conftest import OBJECTS, SUBJECTS, VERBS
from tests.run_files import edit_json, manifest, policy_steps, write_rows

QUICK = ("--batch-size", 8, "--minibatches", 2, "--ppo-epochs", 2, "--max-new-tokens", 12)
QUICK = (*QUICK, "--threads", 1, "--lr", 1e-3, "--val-size", 8)


def preferences(path, good, bad):
    """Answers about `good` are preferred to those about `bad`."""
    draw = random.Random(0)
    rows = []
    for number in range(120):
        subject, verb = draw.choice(SUBJECTS), draw.choice(VERBS)
        prompt = f"{subject} {draw.choice(VERBS)} {draw.choice(OBJECTS)}. {number}"
        chosen, rejected = (f"{subject} {verb} {o}." for o in (good, bad))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return write_rows(path, rows)


@pytest.fixture(scope="module")
def reward_models(cli, roomy, prompts, tmp_path_factory):
    """Two reward models that want different things, in full and as adapters; and prompts."""
    folder = tmp_path_factory.mktemp("reward_models")
    runs = {}
    for name, good, bad in (
        ("ball", "a red ball", "many stars"),
        ("stars", "many stars", "a red ball"),
    ):
        data = preferences(folder / f"{name}.jsonl", good, bad)
        for way, flags in (("", ()), ("-lora", ("--lora", "--lora-r", 4, "--lr", 1e-2))):
            out = folder / f"{name}{way}"
            options = ("--max-steps", 30, "--batch-size", 8, "--threads", 1, *flags, "-o", out)
            result = cli("reward", "--model", roomy, "--data", data, *options)
            assert result.code == 0, result.err
            runs[f"{name}{way}"] = out
    return {**runs, "prompts": prompts}


def ppo(cli, roomy, reward_models, *arguments):
    return cli("ppo", "--model", roomy, "--data", reward_models["prompts"], *QUICK, *arguments)


def test_adapters_of_the_same_base_share_its_weights(cli, roomy, reward_models, tmp_path):
    from accelerate import Accelerator

    from llmctl.config.commands.ppo import PpoConfig

    config = PpoConfig(
        model=str(roomy),
        data=[str(reward_models["prompts"])],
        reward_model=[str(reward_models["ball-lora"]), str(reward_models["stars"])],
        lora=True,
    )
    models = prepare_ppo(config, Accelerator(cpu=True), "cpu").models
    base = {weight.data_ptr() for weight in models.actor_critic.reference.parameters()}
    shared, apart = (source.model.model for source in models.reward_models)
    for part in (models.actor_critic.policy, models.actor_critic.value, shared):
        layers = [w for name, w in part.named_parameters() if name.endswith("base_layer.weight")]
        assert len(layers) == 14
        assert {weight.data_ptr() for weight in layers} <= base
    assert base.isdisjoint({weight.data_ptr() for weight in apart.parameters()})
    assert models.value_source is models.sources[0]
    learned = {n: w for n, w in models.value_model.named_parameters() if w.requires_grad}
    theirs = dict(shared.named_parameters())
    assert learned
    assert all(torch.equal(weight, theirs[name]) for name, weight in learned.items())


def test_a_shared_reward_model_scores_as_one_of_its_own(roomy, reward_models):
    from llmctl.models.loading import load_causal_lm
    from llmctl.ppo.models import classifier_on
    from llmctl.reward.model import PromptResponse, load_reward_model

    base = load_causal_lm(str(roomy), dtype=torch.float32)
    prompt = [{"role": "user", "content": "The cat sees"}]
    texts = [PromptResponse(prompt, answer) for answer in ("a red ball.", "many stars.", "")]
    apart = load_reward_model(str(reward_models["ball-lora"]))
    shared = load_reward_model(str(reward_models["ball-lora"]), base=classifier_on(base))
    assert torch.allclose(shared.score(texts), apart.score(texts), atol=1e-5)


def test_reward_models_are_read_where_it_is_said(cli, roomy, reward_models, tmp_path):
    """The flag counts for the scores and the identity, and stands in the manifest."""
    folder = shutil.copytree(reward_models["ball"] / "model", tmp_path / "foreign")
    edit_json(folder / "config.json", score_at=None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    options = ("--reward-model", folder, "--max-steps", 1, "-o", tmp_path / "run")
    result = ppo(cli, roomy, reward_models, *options, "--score-at", "last-token")
    assert result.code == 0, result.err
    assert "--score-at" not in result.err
    inputs = manifest(tmp_path / "run")["inputs"]
    (judge,) = [entry for entry in inputs if entry["role"] == "reward_model"]
    assert judge["score_at"] == "last-token"
    (tmp_path / "run/status.json").write_text('{"state": "running"}')
    result = ppo(cli, roomy, reward_models, *options, "--resume", "--max-steps", 2)
    assert (result.code, "reward_model" in result.err) == (4, True), result.err
    assert "writes '\\n' after the end of a turn" in result.err


def test_rows_that_a_reward_model_adds_are_not_the_policys(cli, roomy, reward_models, tmp_path):
    """It may have tokens of its own, and the weights below it are the policy's as well."""
    from llmctl.config.commands.ppo import PpoConfig
    from llmctl.models.loading import load_tokenizer
    from llmctl.ppo.models import load_models
    from llmctl.training.base_model import base_of

    folder = tmp_path / "bare"
    folder.mkdir()
    for file in (roomy / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "pad_token": settings["eos_token"]})
    )
    data = reward_models["ball"].parent / "ball.jsonl"
    options = ("--data", data, "--max-steps", 1, "--threads", 1, "--lora", "--lora-r", 4)
    template = ("--chat-template", "llama-3")
    trained = cli("reward", "--model", folder, *options, *template, "-o", tmp_path / "reward")
    assert trained.code == 0, trained.err
    config = PpoConfig(
        model=str(folder), data=["x"], reward_model=[str(tmp_path / "reward")], lora=True
    )
    models = load_models(config, load_tokenizer(str(folder)), base_of(str(folder)).sha256, "cpu")
    assert models.reward_models[0].is_shared
    rows = models.reward_models[0].model.model.get_input_embeddings().weight.shape[0]
    logits = models.actor_critic.reference(torch.tensor([[1, 2, 3]])).logits
    assert logits.shape[-1] == models.actor_critic.vocabulary < rows


@pytest.mark.parametrize("way", ["", "-lora"], ids=["full", "lora"])
def test_weights_move_the_scores_in_their_directions(cli, roomy, reward_models, tmp_path, way):
    scores = {}
    for name, ball, stars in (("ball", 1, -1), ("stars", -1, 1)):
        models = [
            f"{reward_models[f'{n}{way}']}={w}" for n, w in (("ball", ball), ("stars", stars))
        ]
        flags = ("--lora", "--lora-r", 8, "--lr", 5e-3) if way else ()
        rewards = ("--reward-model", models[0], "--reward-model", models[1])
        out = tmp_path / name
        more = ("--batch-size", 24, "--max-steps", 8, *flags)
        result = ppo(cli, roomy, reward_models, *rewards, *more, "-o", out)
        assert result.code == 0, result.err
        last = policy_steps(out)[-3:]
        for source in ("ball", "stars"):
            scores[name, source] = sum(line[f"score/{source}{way}"] for line in last)
    assert scores["ball", "ball"] > scores["stars", "ball"]
    assert scores["stars", "stars"] > scores["ball", "stars"]


def test_the_value_model_starts_at_the_normalised_score(cli, roomy, reward_models, tmp_path):
    out = tmp_path / "run"
    options = ("--reward-model", reward_models["ball"], "--max-steps", 2, "-o", out)
    result = ppo(cli, roomy, reward_models, *options)
    assert result.code == 0, result.err
    assert "the value model starts from the reward model ball" in result.err
    assert "wins against the reference" in result.err
    manifest = json.loads((out / "manifest.json").read_text())
    scale, shift = manifest["value_scale"]
    mean, std = -shift / scale, 1 / scale
    first = policy_steps(out)[0]
    assert first["score"] == pytest.approx((first["score/ball"] - mean) / std, abs=0.05)


def test_no_reward_models_are_refused(cli, roomy, reward_models, tmp_path):
    shape = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
    )
    AutoModelForSequenceClassification.from_config(shape).save_pretrained(tmp_path / "three")
    for file in (reward_models["ball"] / "model").glob("tokenizer*"):
        (tmp_path / "three" / file.name).write_bytes(file.read_bytes())
    for model, said in ((tmp_path / "three", "it tells 3 labels apart"), (roomy, "no head")):
        result = ppo(cli, roomy, reward_models, "--reward-model", model, "-o", tmp_path / "run")
        assert result.code == 4
        assert said in result.err
        assert not (tmp_path / "run").exists()


def test_a_reward_model_with_another_tokenizer_reads_the_texts_anew(
    cli, roomy, reward_models, corpus, tmp_path
):
    tok, base, reward, out = (tmp_path / name for name in ("tok", "base", "reward", "run"))
    size = ("--layers", 1, "--hidden", 16, "--heads", 2, "--context", 128, "--max-steps", 2)
    assert cli("tokenize", "--data", corpus, "--algorithm", "byte", "-o", tok).code == 0
    assert cli("pretrain", "--tokens", tok, *size, "--threads", 1, "-o", base).code == 0
    data = reward_models["ball"].parent / "ball.jsonl"
    trained = cli(
        *("reward", "--model", base, "--data", data, "--max-steps", 3, "--threads", 1),
        *("--max-length", 128, "--truncation", "cut", "-o", reward),
    )
    assert trained.code == 0, trained.err
    result = ppo(cli, roomy, reward_models, "--reward-model", reward, "--max-steps", 1, "-o", out)
    assert result.code == 0, result.err
    assert "the value model starts from the policy" in result.err
