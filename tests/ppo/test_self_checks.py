"""Self-checks of PPO: a sound run passes, and each defect is refused by its own check."""

import pytest
import torch

from llmctl.errors import ModelError, UserError
from llmctl.ppo.self_checks import run_self_checks


@pytest.fixture
def checked(cli, roomy, prompts, tmp_path, monkeypatch):
    """Models and first experience of a run, caught where they are checked."""
    caught = {}

    def catch(models, experience, eos, precision):
        caught.update(models=models, experience=experience, eos=eos)
        raise UserError("caught")

    monkeypatch.setattr("llmctl.ppo.loop.run_self_checks", catch)
    sizes = ("--batch-size", 8, "--max-new-tokens", 12, "--max-steps", 1, "--threads", 1)
    rewards = ("--reward-rule", "repetition", "--temperature", 0.7)
    cli("ppo", "--model", roomy, "--data", prompts, *sizes, *rewards, "-o", tmp_path / "run")
    return caught


def test_a_sound_run_passes_its_checks(checked):
    checks = run_self_checks(checked["models"], checked["experience"], checked["eos"], "fp32")
    assert checks.ratio < 1e-4
    assert checks.kl == 0
    assert max(checks.padding, checks.temperature, checks.sampling) < 1e-3


def broken(checked, break_it):
    with torch.no_grad():
        break_it(checked["models"], checked["experience"])
    with pytest.raises(ModelError) as caught:
        run_self_checks(checked["models"], checked["experience"], checked["eos"], "fp32")
    return str(caught.value)


def test_a_ratio_that_is_not_1_is_refused(checked):
    said = broken(checked, lambda _, experience: experience.log_probs.add_(0.1))
    assert "the ratio is off 1 by 0.0952" in said


def test_a_reference_that_is_not_the_policy_is_refused(checked):
    def change(models, _):
        next(models.reference.parameters()).add_(0.05)

    assert "policy and reference differ by" in broken(checked, change)


def test_a_sampler_at_another_temperature_is_refused(checked):
    said = broken(checked, lambda _, experience: experience.sampler_log_probs.mul_(1.5))
    assert "the sampler's log-probabilities are not those of the model" in said


def test_a_model_that_looks_at_padding_is_refused(checked):
    from llmctl.ppo.episodes import Pass

    def change(models, _):
        plain = type(models).values

        def leaky(batch: Pass):
            return plain(models, batch) + batch.tokens.float().sum()

        models.values = leaky

    assert "padding moves it by" in broken(checked, change)


def test_a_temperature_that_training_forgets_is_refused(checked):
    def change(models, experience):
        logits = type(models)._logits

        def forgetful(model, batch):
            return logits(models, model, batch) * models.temperature

        models._logits = forgetful
        batch = _whole(models, experience)
        experience.log_probs[batch.mask], _ = models.log_probs(batch)

    said = broken(checked, change)
    assert "log-probabilities of training are not those of --temperature" in said or "ratio" in said


def _whole(models, experience):
    from llmctl.ppo.episodes import make_pass

    rows = list(range(len(experience.sequences)))
    return make_pass(experience.sequences, rows, experience.mask, models.device)
