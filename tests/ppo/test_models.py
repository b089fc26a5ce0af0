"""PPO with reward models: shared weights, weights of rewards, checks before and alarms while."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig

from llmctl.errors import DataError, ModelError, UserError
from llmctl.ppo import alarms
from llmctl.ppo.alarms import ALARMS, STEPS, Alarms
from llmctl.ppo.rewards import RewardSource, RewardSum, RunningMoments, parse_weight, unique_names
from llmctl.ppo.rules import Sample, exact, find_rule, length, repetition
from llmctl.ppo.self_checks import check
from llmctl.ppo.setup import prepare
from tests.conftest import OBJECTS, SUBJECTS, VERBS

QUICK = ("--batch-size", 8, "--minibatches", 2, "--ppo-epochs", 2, "--max-new-tokens", 12)
QUICK = (*QUICK, "--threads", 1, "--lr", 1e-3, "--val-size", 8)


def preferences(path, good, bad):
    """Answers about `good` are preferred to those about `bad`."""
    draw = random.Random(0)
    rows = []
    for number in range(120):
        subject, verb = draw.choice(SUBJECTS), draw.choice(VERBS)
        asked = f"{subject} {draw.choice(VERBS)} {draw.choice(OBJECTS)}. {number}"
        chosen, rejected = (f"{subject} {verb} {o}." for o in (good, bad))
        rows.append({"prompt": asked, "chosen": chosen, "rejected": rejected})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def judges(cli, roomy, tmp_path_factory):
    """Two reward models that want different things, in full and as adapters; and prompts."""
    folder = tmp_path_factory.mktemp("judges")
    found = {}
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
            found[f"{name}{way}"] = out
    asked = folder / "prompts.jsonl"
    texts = [f"{subject} {verb}" for subject in SUBJECTS for verb in VERBS]
    asked.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return {**found, "prompts": asked}


def ppo(cli, roomy, judges, *arguments):
    return cli("ppo", "--model", roomy, "--data", judges["prompts"], *QUICK, *arguments)


def steps(run):
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "kl" in line]


def test_adapters_of_the_same_base_share_its_weights(cli, roomy, judges, tmp_path):
    from accelerate import Accelerator

    from llmctl.config.commands import PpoConfig

    config = PpoConfig(
        model=str(roomy),
        data=[str(judges["prompts"])],
        reward_model=[str(judges["ball-lora"]), str(judges["stars"])],
        lora=True,
    )
    models = prepare(config, Accelerator(cpu=True), "cpu").models
    base = {weight.data_ptr() for weight in models.actors.reference.parameters()}
    shared, apart = (judge.model.model for judge in models.judges)
    for part in (models.actors.policy, models.actors.value, shared):
        layers = [w for name, w in part.named_parameters() if name.endswith("base_layer.weight")]
        assert len(layers) == 14
        assert {weight.data_ptr() for weight in layers} <= base
    assert base.isdisjoint({weight.data_ptr() for weight in apart.parameters()})
    assert models.value_source is models.sources[0]
    learned = {n: w for n, w in models.value_model.named_parameters() if w.requires_grad}
    theirs = dict(shared.named_parameters())
    assert learned
    assert all(torch.equal(weight, theirs[name]) for name, weight in learned.items())


def test_a_shared_reward_model_scores_as_one_of_its_own(roomy, judges):
    from llmctl.models.loading import load_causal_lm
    from llmctl.ppo.models import classifier_on
    from llmctl.reward.model import Exchange, load_reward_model

    base = load_causal_lm(str(roomy), dtype=torch.float32)
    asked = [{"role": "user", "content": "The cat sees"}]
    texts = [Exchange(asked, answer) for answer in ("a red ball.", "many stars.", "")]
    apart = load_reward_model(str(judges["ball-lora"]))
    shared = load_reward_model(str(judges["ball-lora"]), under=classifier_on(base))
    assert torch.allclose(shared.score(texts), apart.score(texts), atol=1e-5)


def test_rows_that_a_reward_model_adds_are_not_the_policys(cli, roomy, judges, tmp_path):
    """It may have tokens of its own, and the weights below it are the policy's as well."""
    from llmctl.config.commands import PpoConfig
    from llmctl.models.loading import load_tokenizer
    from llmctl.ppo.models import load_models
    from llmctl.training.base_model import base_of

    folder = tmp_path / "bare"
    folder.mkdir()
    for file in (roomy / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    facts = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**facts, "pad_token": facts["eos_token"]})
    )
    data = judges["ball"].parent / "ball.jsonl"
    options = ("--data", data, "--max-steps", 1, "--threads", 1, "--lora", "--lora-r", 4)
    template = ("--chat-template", "llama-3")
    trained = cli("reward", "--model", folder, *options, *template, "-o", tmp_path / "judge")
    assert trained.code == 0, trained.err
    config = PpoConfig(
        model=str(folder), data=["x"], reward_model=[str(tmp_path / "judge")], lora=True
    )
    models = load_models(config, load_tokenizer(str(folder)), base_of(str(folder)).sha256, "cpu")
    assert models.judges[0].is_shared
    rows = models.judges[0].model.model.get_input_embeddings().weight.shape[0]
    logits = models.actors.reference(torch.tensor([[1, 2, 3]])).logits
    assert logits.shape[-1] == models.actors.vocabulary < rows


@pytest.mark.parametrize("way", ["", "-lora"], ids=["full", "lora"])
def test_weights_move_the_scores_in_their_directions(cli, roomy, judges, tmp_path, way):
    found = {}
    for name, ball, stars in (("ball", 1, -1), ("stars", -1, 1)):
        models = [f"{judges[f'{n}{way}']}={w}" for n, w in (("ball", ball), ("stars", stars))]
        flags = ("--lora", "--lora-r", 8, "--lr", 5e-3) if way else ()
        rewards = ("--reward-model", models[0], "--reward-model", models[1])
        out = tmp_path / name
        more = ("--batch-size", 24, "--max-steps", 8, *flags)
        result = ppo(cli, roomy, judges, *rewards, *more, "-o", out)
        assert result.code == 0, result.err
        last = steps(out)[-3:]
        for source in ("ball", "stars"):
            found[name, source] = sum(line[f"score/{source}{way}"] for line in last)
    assert found["ball", "ball"] > found["stars", "ball"]
    assert found["stars", "stars"] > found["ball", "stars"]


def test_the_value_model_starts_at_the_normalised_score(cli, roomy, judges, tmp_path):
    out = tmp_path / "run"
    options = ("--reward-model", judges["ball"], "--max-steps", 2, "-o", out)
    result = ppo(cli, roomy, judges, *options)
    assert result.code == 0, result.err
    assert "the value model starts from the reward model ball" in result.err
    assert "wins against the reference" in result.err
    manifest = json.loads((out / "manifest.json").read_text())
    factor, shift = manifest["value_scale"]
    mean, deviation = -shift / factor, 1 / factor
    first = steps(out)[0]
    assert first["score"] == pytest.approx((first["score/ball"] - mean) / deviation, abs=0.05)


def test_no_reward_models_are_refused(cli, roomy, judges, tmp_path):
    shape = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
    )
    AutoModelForSequenceClassification.from_config(shape).save_pretrained(tmp_path / "three")
    for file in (judges["ball"] / "model").glob("tokenizer*"):
        (tmp_path / "three" / file.name).write_bytes(file.read_bytes())
    for model, said in ((tmp_path / "three", "it tells 3 labels apart"), (roomy, "no head")):
        result = ppo(cli, roomy, judges, "--reward-model", model, "-o", tmp_path / "run")
        assert result.code == 4
        assert said in result.err
        assert not (tmp_path / "run").exists()


def test_a_reward_model_with_another_tokenizer_reads_the_texts_anew(
    cli, roomy, judges, corpus, tmp_path
):
    tok, base, judge, out = (tmp_path / name for name in ("tok", "base", "judge", "run"))
    size = ("--layers", 1, "--hidden", 16, "--heads", 2, "--context", 128, "--max-steps", 2)
    assert cli("tokenize", "--data", corpus, "--algorithm", "byte", "-o", tok).code == 0
    assert cli("pretrain", "--tokens", tok, *size, "--threads", 1, "-o", base).code == 0
    data = judges["ball"].parent / "ball.jsonl"
    trained = cli(
        *("reward", "--model", base, "--data", data, "--max-steps", 3, "--threads", 1),
        *("--max-length", 128, "--truncation", "cut", "-o", judge),
    )
    assert trained.code == 0, trained.err
    result = ppo(cli, roomy, judges, "--reward-model", judge, "--max-steps", 1, "-o", out)
    assert result.code == 0, result.err
    assert "the value model starts from the policy" in result.err


# --- checks before the first update


@pytest.fixture
def checked(cli, roomy, judges, tmp_path, monkeypatch):
    """The actors and the first episodes of a run, caught where they are checked."""
    caught = {}

    def catch(actors, episodes, eos, precision):
        caught.update(actors=actors, episodes=episodes, eos=eos)
        raise UserError("caught")

    monkeypatch.setattr("llmctl.ppo.loop.check", catch)
    rewards = ("--reward-rule", "repetition", "--temperature", 0.7, "--max-steps", 1)
    ppo(cli, roomy, judges, *rewards, "-o", tmp_path / "run")
    return caught


def test_a_sound_run_passes_its_checks(checked):
    found = check(checked["actors"], checked["episodes"], checked["eos"], "fp32")
    assert found.ratio < 1e-4
    assert found.kl == 0
    assert max(found.padding, found.temperature, found.sampling) < 1e-3


def broken(checked, break_it):
    with torch.no_grad():
        break_it(checked["actors"], checked["episodes"])
    with pytest.raises(ModelError) as caught:
        check(checked["actors"], checked["episodes"], checked["eos"], "fp32")
    return str(caught.value)


def test_a_ratio_that_is_not_1_is_refused(checked):
    said = broken(checked, lambda _, episodes: episodes.log_probs.add_(0.1))
    assert "the ratio is off 1 by 0.0952" in said


def test_a_reference_that_is_not_the_policy_is_refused(checked):
    def change(actors, _):
        next(actors.reference.parameters()).add_(0.05)

    assert "policy and reference differ by" in broken(checked, change)


def test_a_sampler_at_another_temperature_is_refused(checked):
    said = broken(checked, lambda _, episodes: episodes.sampled.mul_(1.5))
    assert "the sampler's log-probabilities are not those of the model" in said


def test_a_model_that_looks_at_padding_is_refused(checked):
    from llmctl.ppo.episodes import Pass

    def change(actors, _):
        plain = type(actors).values

        def leaky(batch: Pass):
            return plain(actors, batch) + batch.tokens.float().sum()

        actors.values = leaky

    assert "padding moves it by" in broken(checked, change)


def test_a_temperature_that_training_forgets_is_refused(checked):
    def change(actors, episodes):
        logits = type(actors)._logits

        def forgetful(model, batch):
            return logits(actors, model, batch) * actors.temperature

        actors._logits = forgetful
        found, _ = actors.log_probs(_whole(actors, episodes))
        episodes.log_probs[_whole(actors, episodes).mask] = found

    said = broken(checked, change)
    assert "log-probabilities of training are not those of --temperature" in said or "ratio" in said


def _whole(actors, episodes):
    from llmctl.ppo.episodes import make_pass

    rows = list(range(len(episodes.sequences)))
    return make_pass(episodes.sequences, rows, episodes.mask, actors.device)


# --- alarms

FINE = {
    "kl": 1.0,
    "length": 20.0,
    "score": 0.0,
    "score_std": 1.0,
    "entropy": 2.0,
    "eos_share": 0.9,
    "explained_variance": 0.5,
    "clip_fraction": 0.1,
}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("negative_kl", {"kl": -3.0}),
        ("exploding_kl", {"kl": 80.0}),
        ("longer_and_better", {"length": 90.0, "score": 2.0}),
        ("collapsed_entropy", {"entropy": 0.1}),
        ("falling_eos", {"eos_share": 0.2}),
        ("useless_values", {"explained_variance": -0.3}),
        ("clipping", {"clip_fraction": 0.5}),
        ("flat_scores", {"score_std": 0.0}),
    ],
)
def test_each_alarm_rings_for_its_own_sign(name, changed, caplog, monkeypatch):
    monkeypatch.setattr(alarms.log, "propagate", True)
    found = Alarms()
    for step in range(1, 11):
        assert found.look(step, FINE) == []
    rung = [found.look(step, {**FINE, **changed}) for step in range(11, 11 + STEPS)]
    assert [name for names in rung for name in names] == [name]
    assert any(word in caplog.text for word in ("--", "look at"))
    assert found.look(16, {**FINE, **changed}) == []


def test_every_alarm_is_tested():
    assert len(ALARMS) == 8


def test_alarms_survive_a_checkpoint():
    one, other = Alarms(), Alarms()
    for step in range(1, 4):
        one.look(step, {**FINE, "kl": -5.0})
    other.restore(json.loads(json.dumps(one.state())))
    assert [other.look(step, {**FINE, "kl": -5.0}) for step in (4, 5)] == [[], ["negative_kl"]]


# --- rules and their sum


def told(response, answer=None):
    return Sample("What?", response, answer, "a.jsonl:1")


def test_rules_by_definition():
    assert exact(told(" The River. ", "the river")) == 1
    assert exact(told("a river", "the river")) == 0
    assert length("one two three", 4) == pytest.approx(-0.25)
    assert length("a " * 50, 4) == -1
    assert repetition("a b c d") == 0
    assert repetition("a b c a b c a b c") == pytest.approx(3 / 7 - 1)
    assert repetition("a b") == 0
    assert find_rule("regex:b+")([told("abb"), told("ccc")]) == [1, 0]


def test_scale_is_mean_and_deviation_over_all_batches():
    values = [torch.tensor([1.0, 2.0, 4.0]), torch.tensor([10.0, -3.0])]
    scale = RunningMoments()
    for batch in values:
        scale.take(batch, lambda found: found)
    whole = torch.cat(values).double()
    assert scale.mean == pytest.approx(float(whole.mean()))
    assert scale.deviation == pytest.approx(float(whole.std()))
    assert scale.apply(torch.tensor([100.0]), 5.0).tolist() == [5.0]
    assert scale.apply(torch.tensor([100.0]), 0.0)[0] == pytest.approx(
        (100 - 2.8) / float(whole.std())
    )


def test_scores_that_never_vary_are_not_divided_by_nothing():
    scale = RunningMoments()
    scale.take(torch.tensor([2.0, 2.0]), lambda found: found)
    assert scale.apply(torch.tensor([2.0]), 5.0).tolist() == [0.0]


def test_the_sum_of_rewards_in_plain_floats():
    model = RewardSource("m", 0.5, lambda t, e: torch.tensor([3.0, 1.0]), is_model=True)
    rule = RewardSource("r", -2.0, lambda t, e: torch.tensor([0.5, 1.0]), is_model=False)
    rewards = RewardSum([model, rule], "reference", 1.0, 0.25)
    raw = rewards.raw([told("x"), told("y")], [True, False])
    rewards.measure({"m": torch.tensor([0.0, 2.0])}, lambda found: found)
    total = rewards.combine(raw, [True, False]).total.tolist()
    deviation = 2**0.5
    assert total[0] == pytest.approx(0.5 * min(1.0, (3 - 1) / deviation) - 2 * 0.5)
    assert total[1] == pytest.approx(0.5 * 0 - 2 * 1.0 - 0.25)


def test_a_score_that_is_no_number_is_refused():
    source = RewardSource("m", 1.0, lambda t, e: torch.tensor([float("nan")]), is_model=True)
    with pytest.raises(DataError, match=r"m gave nan for the response to a\.jsonl:1: 'x'"):
        RewardSum([source], "none", 0.0, 0.0).raw([told("x")], [True])


def test_weights_and_names():
    assert parse_weight("--reward-model", "runs/a=0.7") == ("runs/a", 0.7)
    assert parse_weight("--reward-rule", "regex:x=y") == ("regex:x=y", 1.0)
    assert parse_weight("--reward-rule", "regex:x=2=-1") == ("regex:x=2", -1.0)
    assert unique_names(["runs/a", "other/a", "length:3"]) == ["a-1", "a-2", "length:3"]
    with pytest.raises(UserError, match="must be a number other than 0"):
        parse_weight("--reward-model", "runs/a=inf")
