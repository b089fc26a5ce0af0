"""Models sharded over two processes on a CPU.

Accelerate refuses FSDP on a CPU: here it is told that it is in force, with the variables that
`accelerate launch` sets for recipes/accelerate/fsdp2.yaml, and shards by `fully_shard` over gloo.
"""

import os
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from tests.training.objectives import (
    assert_same_metrics,
    call_llmctl,
    every_objective,
    lines_of,
    run_ranks,
)

RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"


def fsdp_variables(recipe="fsdp2.yaml"):
    """Environment that `accelerate launch --config_file` gives the processes."""
    config = load_config_from_file(str(RECIPES / recipe))
    return config


class Sharding(Accelerator):
    """An accelerator that holds FSDP to be in force, though there is no GPU."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()


def call_sharded(arguments, environment):
    """Run a command as one of the processes that share a model."""
    from llmctl.training import distributed

    os.environ.update(environment)
    distributed.Accelerator = Sharding
    return call_llmctl(arguments)


ENV = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": os.environ.get("EFF", "false"),
    "FSDP_SYNC_MODULE_STATES": "true",
}


@pytest.mark.slow
@every_objective
def test_two_shards_are_one_model(inputs, whole, tmp_path, objective):
    arguments = objective.arguments(inputs, tmp_path / "run", "--batch-size", 2, "--grad-accum", 2)
    ended = run_ranks(call_sharded, (arguments, ENV), tmp_path / "logs")
    assert [code for code, _ in ended] == [0, 0], ended[0][1][-3000:] + ended[1][1][-3000:]
    assert_same_metrics(lines_of(tmp_path / "run"), whole(objective).lines, 1e-5)
