"""Trainer's arguments under the mixin: what decides a run, what is refused, what is off."""

import json
from types import SimpleNamespace

import pytest
import trl
from transformers import LlamaConfig, SchedulerType
from transformers.training_args import OptimizerNames

from llmctl.errors import UserError
from llmctl.training.arguments import WITHOUT_EFFECT, identity_of, take_over


def arguments(out, kind="SFT", **changes):
    given = {"use_cpu": True, "bf16": False, "report_to": [], **changes}
    return getattr(trl, f"{kind}Config")(output_dir=str(out), **given)


def identity(args):
    model = SimpleNamespace(config=LlamaConfig())
    return identity_of(
        SimpleNamespace(args=args, model=model, accelerator=SimpleNamespace(num_processes=1))
    )


def test_what_a_run_is_depends_on_no_place_and_holds_no_secret(tmp_path):
    secret = "hf_" + "x" * 30
    here = identity(arguments(tmp_path / "here"))
    elsewhere = arguments(
        tmp_path / "elsewhere",
        hub_token=secret,
        model_init_kwargs={"token": secret},
        run_name="other",
        logging_steps=3,
        save_steps=7,
        eval_strategy="steps",
        eval_steps=9,
        per_device_eval_batch_size=3,
        dataloader_num_workers=2,
        log_level="error",
        ddp_timeout=5,
        hub_model_id="some/where",
    )
    found = identity(elsewhere)
    assert secret not in json.dumps(found)
    assert str(tmp_path) not in json.dumps(found)
    assert {**found, "model_init_kwargs": None} == here
    assert found == identity(elsewhere)


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("SFT", {"learning_rate": 0.5}, "lr"),
        ("SFT", {"per_device_train_batch_size": 3}, "batch_size"),
        ("SFT", {"gradient_accumulation_steps": 3}, "grad_accum"),
        ("SFT", {"lr_scheduler_type": "constant"}, "schedule"),
        ("SFT", {"lr_scheduler_kwargs": {"num_cycles": 2}}, "lr_scheduler_kwargs"),
        ("SFT", {"warmup_steps": 7}, "warmup"),
        ("SFT", {"optim": "sgd"}, "optimizer"),
        ("SFT", {"adam_beta1": 0.5}, "beta1"),
        ("SFT", {"adam_beta2": 0.5}, "beta2"),
        ("SFT", {"adam_epsilon": 1e-3}, "adam_epsilon"),
        ("SFT", {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ("SFT", {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ("SFT", {"max_length": 7}, "max_length"),
        ("SFT", {"packing": True}, "packing"),
        ("SFT", {"completion_only_loss": True}, "completion_only_loss"),
        ("SFT", {"eos_token": "<end>"}, "eos_token"),
        ("Reward", {"center_rewards_coefficient": 0.1}, "center_rewards_coefficient"),
        ("DPO", {"beta": 0.3}, "beta"),
        ("DPO", {"loss_type": ["ipo"]}, "loss_type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_argument_that_decides_weights_is_in_the_identity(tmp_path, kind, changes, named):
    plain, changed = (identity(arguments(tmp_path, kind, **more)) for more in ({}, changes))
    assert [name for name in changed if changed[name] != plain.get(name)] == [named]


def test_no_argument_without_effect_is_misspelt(tmp_path):
    configs = [vars(arguments(tmp_path, kind)) for kind in ("SFT", "Reward", "DPO")]
    assert [n for n in WITHOUT_EFFECT if not any(n in config for config in configs)] == []


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("SFT", {"ignore_data_skip": True}, "ignore_data_skip"),
        ("SFT", {"fp16": True}, "fp16"),
        (
            "SFT",
            {"lr_scheduler_type": SchedulerType.REDUCE_ON_PLATEAU},
            "a schedule that follows the loss",
        ),
        ("SFT", {"optim": OptimizerNames.SCHEDULE_FREE_ADAMW}, "the optimizer schedule_free_adamw"),
        (
            "SFT",
            {"optim": OptimizerNames.GALORE_ADAMW_LAYERWISE},
            "the optimizer galore_adamw_layerwise",
        ),
        ("SFT", {"optim": OptimizerNames.LOMO}, "the optimizer lomo"),
        ("SFT", {"activation_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
        ("DPO", {"sync_ref_model": True}, "sync_ref_model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_checkpoint_holds_is_refused(tmp_path, kind, changes, named):
    args = arguments(tmp_path, kind)
    for name, value in changes.items():
        setattr(args, name, value)
    with pytest.raises(UserError) as refused:
        take_over(args, 5)
    assert str(refused.value).startswith(named)
    assert len(str(refused.value).splitlines()) == 1


def test_what_trainer_does_badly_is_off(tmp_path):
    args = arguments(tmp_path, full_determinism=False)
    take_over(args, 5)
    assert (args.max_steps, args.save_strategy, args.ddp_find_unused_parameters) == (5, "no", True)
