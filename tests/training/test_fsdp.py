"""Models sharded over two processes on a CPU.

Accelerate refuses FSDP on a CPU. Here it is told that it is in force, with the variables that
`accelerate launch` sets for recipes/accelerate/fsdp2.yaml, and shards by `fully_shard` over gloo.
"""

import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.tensor import DTensor

from llmctl.files import sha256_file
from llmctl.training import distributed, loop
from llmctl.training.batches import validation_shares
from llmctl.training.run_state import Progress
from llmctl.training.state import capture, put_weights, restore, set_generators
from tests.processes import call_llmctl
from tests.run_files import cut_off
from tests.training.objectives import (
    OBJECTIVES,
    RECORDER,
    SFT,
    assert_close_weights,
    assert_same_metrics,
    every_objective,
    lines_of,
    run_ranks,
)

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "accelerate").glob("*.yaml"))
FINE_TUNING = [objective for objective in OBJECTIVES if objective.command != "pretrain"]
ADAPTED = [objective for objective in OBJECTIVES if "--lora" in objective.flags]


def launched(recipe):
    """Variables that `accelerate launch --config_file` would set for the processes."""
    given = launch_command_parser().parse_args(["--config_file", str(recipe), "-m", "llmctl"])
    resolved, *_ = _validate_launch_command(given)
    names = ("ACCELERATE_USE_FSDP", "FSDP_", "PARALLELISM_CONFIG_", "ACCELERATE_MIXED_PRECISION")
    variables = prepare_multi_gpu_env(resolved)
    return {name: value for name, value in variables.items() if name.startswith(names)}


FSDP = launched(next(path for path in RECIPES if path.name == "fsdp2.yaml"))


class Sharding(Accelerator):
    """An accelerator that holds FSDP to be in force, whatever the device."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()


def call_sharded(arguments):
    """Run a command as one of the processes that share a model; 99 if they share none."""
    os.environ.update(FSDP)
    distributed.Accelerator = Sharding
    update, kinds = loop.update, set()

    def watched(state, optimizers, weights, *rest, **options):
        weights = list(weights)
        kinds.update(isinstance(weight, DTensor) for weight in weights)
        groups = (group for optimizer in optimizers for group in optimizer.param_groups)
        kinds.update(isinstance(weight, DTensor) for group in groups for weight in group["params"])
        return update(state, optimizers, weights, *rest, **options)

    loop.update = watched
    code = call_llmctl(arguments)
    return code if code or kinds == {True} else 99


def run_sharded(arguments, folder):
    """Run a command on two processes that share the model -> exit codes, what they wrote."""
    ended = run_ranks(call_sharded, (arguments,), folder)
    return [code for code, _ in ended], "\n".join(text for _, text in ended)


@pytest.mark.slow
@every_objective
def test_two_shards_are_one_model(inputs, whole, tmp_path, objective):
    """Loss, norm of the gradients, figures, validation and what is exported."""
    flags = ("--batch-size", 2, "--grad-accum", 2)
    codes, text = run_sharded(
        objective.arguments(inputs, tmp_path / "run", *flags), tmp_path / "logs"
    )
    assert codes == [0, 0], text
    assert_same_metrics(lines_of(tmp_path / "run"), whole(objective).lines, 1e-5)
    assert_close_weights(tmp_path / "run", whole(objective).out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [("--chunked-loss",), ("--activation-checkpointing",), ("--find-batch-size",)],
    ids=lambda flags: flags[0],
)
def test_what_saves_memory_goes_with_shards(inputs, whole, tmp_path, flags):
    arguments = SFT.arguments(inputs, tmp_path / "run", "--batch-size", 4, *flags)
    codes, text = run_sharded(arguments, tmp_path / "logs")
    assert codes == [0, 0], text
    assert_same_metrics(lines_of(tmp_path / "run"), whole(SFT).lines, 1e-5)


@pytest.mark.slow
def test_a_sharded_run_resumes_in_the_same_bits(inputs, tmp_path):
    undisturbed, cut = tmp_path / "undisturbed", tmp_path / "cut"
    flags = ("--batch-size", 4)
    codes, text = run_sharded(SFT.arguments(inputs, undisturbed, *flags), tmp_path / "first")
    assert codes == [0, 0], text
    cut_off(undisturbed, cut, 2)
    again = SFT.arguments(inputs, cut, *flags, "--resume")
    codes, text = run_sharded(again, tmp_path / "second")
    assert codes == [0, 0], text
    assert "checkpoint-2" in text
    assert lines_of(cut) == lines_of(undisturbed)
    ours, theirs = (sha256_file(run / "model" / "model.safetensors") for run in (cut, undisturbed))
    assert ours == theirs


@pytest.mark.slow
def test_compilation_of_shards_is_refused(inputs, tmp_path):
    arguments = SFT.arguments(inputs, tmp_path / "run", "--batch-size", 4, "--compile")
    codes, text = run_sharded(arguments, tmp_path / "logs")
    assert codes == [2, 2]
    assert "--compile has not been made to work under FSDP" in text


# --- state


def round_trip(kind, with_adapter):
    """Train, capture, train on; restore, and train on in the same bits."""
    from peft import LoraConfig, TaskType, get_peft_model
    from torch.distributed import broadcast_object_list, destroy_process_group, init_process_group
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    model = RECORDER.untrained(kind)
    if with_adapter:
        shape = LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, target_modules="all-linear")
        model = get_peft_model(model, shape)
    for block in next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList)):
        fully_shard(block)
    fully_shard(model)
    assert all(isinstance(weight, DTensor) for weight in model.parameters())
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2)

    def step():
        ids = torch.randint(10, (2, 6))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def bits():
        trained = {n: w for n, w in model.named_parameters() if w.requires_grad}
        return {name: weight.full_tensor().detach().clone() for name, weight in trained.items()}

    step()
    step()
    content = capture(model, [optimizer], Progress(step=2), rank=rank)
    assert bool(content.model) == bool(content.optimizer) == (rank == 0), "gathered by rank 0 alone"
    shared = [(content.model, content.optimizer, content.state)]
    broadcast_object_list(shared)  # as every rank would load the file that rank 0 wrote
    tensors, moments, state = shared[0]
    content = content.__class__(2, tensors, moments, content.rng, state)
    before = bits()
    assert {name for name in tensors if name in before} == set(before)
    assert all(torch.equal(before[name], tensors[name]) for name in before)
    step()
    after = bits()
    assert not all(torch.equal(before[name], after[name]) for name in before)
    restore(model, [optimizer], content)
    set_generators(content.rng)
    assert all(torch.equal(weight, before[name]) for name, weight in bits().items())
    step()
    assert all(torch.equal(weight, after[name]) for name, weight in bits().items())
    put_weights(model, tensors)
    assert all(torch.equal(weight, before[name]) for name, weight in bits().items())
    destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "with_adapter"), [("llama", False), ("gpt2", False), ("llama", True)]
)
def test_the_state_of_shards_comes_back(tmp_path, kind, with_adapter):
    """Also of an output layer that is tied to the embedding, as GPT-2's is."""
    ended = run_ranks(round_trip, (kind, with_adapter), tmp_path)
    assert [code for code, _ in ended] == [0, 0], "\n".join(text for _, text in ended)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_rank_validates_as_many_batches_and_every_row_counts_once(count, size, world):
    lengths = [(7 * number) % 5 + 1 for number in range(count)]
    shares = [validation_shares(lengths, size, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    batches = [batch for share in shares for batch in share]
    assert all(0 < len(rows) <= size for rows, _ in batches)
    counted = [row for rows, counts in batches if counts for row in rows]
    assert sorted(counted) == list(range(count))


# --- configurations


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_accelerate_takes_the_recipe(recipe, monkeypatch):
    variables = launched(recipe)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert variables["ACCELERATE_MIXED_PRECISION"] == "no", "llmctl decides the precision"
    if recipe.name.startswith("ddp"):
        assert "ACCELERATE_USE_FSDP" not in variables
        return
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy is not None


@pytest.fixture
def sharding(monkeypatch):
    """FSDP in force in this process, as far as Accelerate says."""
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "Accelerator", Sharding)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("objective", FINE_TUNING, ids=str)
def test_fine_tuning_is_prepared_under_fsdp(train, sharding, tmp_path, objective):
    result = train(objective, tmp_path / "run", "--dry-run")
    assert result.code == 0, result.err
    assert Accelerator().distributed_type == DistributedType.FSDP


@pytest.mark.parametrize("objective", ADAPTED, ids=str)
@pytest.mark.parametrize("flag", ["--load-in-4bit", "--load-in-8bit"])
def test_quantized_weights_are_refused_under_fsdp(train, sharding, tmp_path, objective, flag):
    result = train(objective, tmp_path / "run", flag, "--dry-run")
    assert result.code == 2, result.err
    assert "FSDP is in force" in result.err
    assert "recipes/accelerate/ddp.yaml" in result.err
