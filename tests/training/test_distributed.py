"""Accelerate's environment decides where weights lie, and nothing of what is trained."""

import os
import re
from pathlib import Path

import accelerate
import pytest

from llmctl.training import distributed
from tests.conftest import SMALL
from tests.run_files import digest, manifest
from tests.training.objectives import SFT

SOURCES = [
    path
    for path in Path(accelerate.__file__).parent.rglob("*.py")
    if "test_utils" not in path.parts
]
VARIABLES = sorted(
    {
        name
        for path in SOURCES
        for name in re.findall(r"\bACCELERATE_[A-Z0-9_]*[A-Z0-9]\b", path.read_text())
    }
)
PROVOKING = {
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DYNAMO_BACKEND": "aot_eager",
    "ACCELERATE_DYNAMO_MODE": "max-autotune",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_GRADIENT_CLIPPING": "0.001",
    "ACCELERATE_TORCH_DEVICE": "meta",
    "ACCELERATE_FP8_BACKEND": "TE",
    "ACCELERATE_FP8_OPT_LEVEL": "O2",
    "ACCELERATE_LOG_LEVEL": "DEBUG",
}
"""Values that would change a run; of the others `true`."""
REFUSED = {
    **dict.fromkeys(distributed.ENGINES, 2),
    "ACCELERATE_USE_FSDP": 2,
}


@pytest.fixture
def pretrain(cli, tokens, monkeypatch):
    """Train for two steps with such variables -> code, stdout, stderr."""

    def run(out, **variables):
        for name in (name for name in os.environ if name.startswith("ACCELERATE_")):
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        flags = ("--max-steps", 2, "--threads", 1, "--precision", "fp32", "--device", "cpu")
        return cli("pretrain", "--tokens", tokens, *SMALL, *flags, "-o", out)

    return run


def test_accelerate_reads_what_is_tried():
    assert {*PROVOKING, *distributed.ENGINES, *distributed.PLACED_BY} <= {*VARIABLES}
    assert len(VARIABLES) > 30


@pytest.mark.slow
def test_no_variable_of_accelerates_changes_a_run(pretrain, tmp_path):
    """Each of them leaves the weights as they are, to the bit, or the run is refused in words."""
    assert pretrain(tmp_path / "plain").code == 0
    wanted = digest(tmp_path / "plain")
    for name in VARIABLES:
        result = pretrain(tmp_path / name, **{name: PROVOKING.get(name, "true")})
        assert result.code == REFUSED.get(name, 0), (name, result.err)
        if result.code:
            assert result.err.count("\n") <= 3, "a line and a hint"
            assert "Traceback" not in result.err
            assert not (tmp_path / name).exists()
        else:
            assert digest(tmp_path / name) == wanted, name


def test_a_variable_that_asks_for_something_else_is_named(pretrain, tmp_path):
    said = pretrain(tmp_path / "run", ACCELERATE_MIXED_PRECISION="bf16").err
    assert "ACCELERATE_MIXED_PRECISION=bf16 has no effect: --precision decides" in said
    usual = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no"}
    assert "ACCELERATE" not in pretrain(tmp_path / "usual", **usual).err


def test_fine_tuning_in_fp32_is_so_whatever_accelerate_was_told(
    train, inputs, tmp_path, monkeypatch
):
    """Also of a run that is resumed in another environment than it began in."""
    assert train(SFT, tmp_path / "plain").code == 0
    assert train(SFT, tmp_path / "bf16", "--precision", "bf16").code == 0
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert train(SFT, tmp_path / "told").code == 0
    assert digest(tmp_path / "told") == digest(tmp_path / "plain") != digest(tmp_path / "bf16")
    assert manifest(tmp_path / "told")["plan"]["precision"] == "fp32"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported"),
        ({"ACCELERATE_USE_MEGATRON_LM": "True"}, "Megatron-LM is not supported"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "only FSDP 2 is supported"),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
            "tensor parallelism is not supported",
        ),
    ],
)
def test_engines_that_do_not_train_here_are_refused(pretrain, tmp_path, variables, said):
    result = pretrain(tmp_path / "run", **variables)
    assert result.code == 2, result.err
    assert said in result.err.splitlines()[0]


def test_a_cpu_that_accelerate_was_told_of_is_taken(monkeypatch):
    """As by `accelerate launch --cpu`; a flag that names a device wins."""
    asked = []
    monkeypatch.setattr(
        distributed.hardware, "pick_device", lambda name: asked.append(name) or "cpu"
    )
    for device, wanted in (("auto", "cpu"), ("cuda", "cuda")):
        monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
        distributed.make_accelerator(distributed.Placement(device=device))
        assert asked.pop() == wanted
