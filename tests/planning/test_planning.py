"""Plans: parameters, memory, FLOPs and scaling laws against published numbers, against tensors that
are counted one by one, and against what runs are seen to take.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from llmctl.config.commands.sft import SftConfig
from llmctl.errors import UserError
from llmctl.models.loading import trainable_parameters
from llmctl.planning import compute, memory
from llmctl.planning.compute import flops_per_step, flops_per_token
from llmctl.planning.memory import estimate_memory, weight_bytes
from llmctl.planning.placement import (
    bytes_per_parameter,
    find_fitting_flags,
    low_rank_parameters,
    sharding_options,
)
from llmctl.planning.shape import config_of, shape_of
from llmctl.planning.workload import PpoWorkload, Workload
from llmctl.training.adapters import adapt
from tests.conftest import sentences
from tests.run_files import rows_in, write_texts

TOKENS = (2, 24)
"""Sequences and their length."""


def work_of(config, **changed):
    """Pretraining in full on a CPU, in float32."""
    shape = shape_of(config)
    fields = {
        "stage": "pretrain",
        "shape": shape,
        "device": "cpu",
        "world": 1,
        "precision": "fp32",
        "optimizer": "adamw",
        "trained": shape.parameters,
        "has_adapter": False,
        "load_in": "full",
        "lora_rank": 0,
        "batch_size": TOKENS[0],
        "grad_accum": 1,
        "length": TOKENS[1],
        "mean_length": TOKENS[1],
        "logit_share": 1.0,
        "is_chunked": False,
        "is_checkpointed": False,
        "steps": 10,
    }
    return Workload(**{**fields, **changed})


def llama(**changed):
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**{**sizes, **changed})


def gpt2(**changed):
    nothing = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4, **{**nothing, **changed})


QWEN = Qwen3Config(**{**llama(num_key_value_heads=2).to_diff_dict(), "head_dim": 16})


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2-124m", 124_439_808),  # the checkpoints themselves
        ("gpt2-1.5b", 1_557_611_200),
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
    ],
)
def test_published_parameter_counts(name, parameters):
    shape = shape_of(config_of(name))
    assert shape.parameters == parameters
    assert shape.parts["other"] == 0


def test_parts_of_a_model_counted_by_hand():
    shape = shape_of(llama(num_key_value_heads=2, tie_word_embeddings=False))
    assert shape.parts == {
        "embedding": 96 * 32,
        "attention": 3 * (2 * 32 * 32 + 2 * 32 * 16),
        "mlp": 3 * 3 * 32 * 80,
        "norms": 7 * 32,
        "head": 96 * 32,
        "other": 0,
    }


@pytest.mark.parametrize("name", ["gpt2-124m", "llama-2-7b", "llama-2-70b"])
def test_sixteen_bytes_a_parameter(name):
    """Rajbhandari et al., 2020, arXiv:1910.02054, section 3.1."""
    workload = work_of(config_of(name), precision="bf16")
    assert bytes_per_parameter(workload) == 16
    parts = estimate_memory(workload).parts
    assert [parts[name] / workload.shape.parameters for name in ("weights", "gradients")] == [4, 4]


def kept_by_autograd(model, *, precision):
    """Bytes that a forward pass keeps beside the weights: without logits, and of logits."""
    tokens = torch.randint(0, 96, TOKENS)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    half = precision == "bf16"
    with saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", torch.bfloat16, half):
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
    del loss
    return sum(kept.values()) - 4 * tokens.numel() * 96


@pytest.mark.parametrize(
    "config",
    [
        llama(),
        llama(num_key_value_heads=2),
        QWEN,
        gpt2(),
        gpt2(activation_function="gelu"),
        gpt2(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1),
    ],
    ids=["llama", "grouped", "qwen3", "gpt2", "gelu", "dropout"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_activations_are_what_autograd_keeps(config, precision, is_frozen):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    workload = work_of(config, precision=precision)
    if is_frozen:
        model = adapt(model, SftConfig(model="m", data=["d"], lora=True, lora_r=4))
        workload = replace(workload, has_adapter=True, lora_rank=4, trained=1)
    counted = kept_by_autograd(model.train(), precision=precision)
    expected = memory.activation_bytes(workload) + memory.autocast_copy_bytes(workload)
    assert expected == pytest.approx(counted, rel=0.05)


def test_checkpointing_keeps_the_inputs_of_blocks_and_one_block():
    config = llama(num_hidden_layers=12)
    whole = memory.activation_bytes(work_of(config))
    again = memory.activation_bytes(work_of(config, is_checkpointed=True))
    tokens = TOKENS[0] * TOKENS[1]
    block = tokens * memory.block_activation_bytes(work_of(config))
    assert whole - again == pytest.approx(11 * block - 12 * tokens * 32 * 4)


def test_low_rank_parameters_are_those_of_an_adapter():
    for config in (llama(num_key_value_heads=2), gpt2()):
        model = AutoModelForCausalLM.from_config(config)
        adapted = adapt(model, SftConfig(model="m", data=["d"], lora=True, lora_r=4))
        assert low_rank_parameters(work_of(config), 4) == trainable_parameters(adapted)[0]


def test_losses_that_are_published():
    """Hoffmann's law for Chinchilla and Gopher, term by term as they are quoted everywhere."""
    assert compute.HOFFMANN.loss(70e9, 1.4e12) == pytest.approx(1.69 + 0.083 + 0.163, abs=1e-3)
    assert compute.HOFFMANN.loss(280e9, 300e9) == pytest.approx(1.69 + 0.052 + 0.251, abs=1e-3)


@pytest.mark.parametrize("law", [compute.HOFFMANN, compute.BESIROGLU])
def test_best_tokens_are_best(law):
    """At the same FLOPs, a larger model on fewer tokens and a smaller one on more are worse."""
    size = 1e9
    tokens = law.best_tokens(size)
    losses = [law.loss(size * f, tokens / f) for f in (0.9, 0.99, 1, 1.01, 1.1)]
    assert min(losses) == losses[2]


def test_about_twenty_tokens_a_parameter():
    """What Besiroglu et al., 2024, say their fit agrees with, at Chinchilla's size."""
    assert compute.BESIROGLU.best_tokens(70e9) / 70e9 == pytest.approx(20, rel=0.15)


def test_pf_days_of_gpt3():
    """Brown et al., 2020, arXiv:2005.14165, table D.1: 3.14e23 FLOPs are 3.64e3 PF-days."""
    assert pytest.approx(3.64e3, rel=2e-3) == 6 * 174.6e9 * 300e9 / compute.PF_DAY


def test_flops_by_hand():
    config = llama()
    workload = work_of(config, batch_size=4, grad_accum=3, world=2, length=24, mean_length=24)
    a_token = 6 * workload.shape.parameters + 12 * 3 * 32 * 24
    assert flops_per_token(workload, config) == a_token
    assert flops_per_step(workload, config) == a_token * 4 * 3 * 2 * 24
    frozen = replace(workload, has_adapter=True, trained=1000)
    saved = 2 * (workload.shape.parameters - 1000)
    assert flops_per_token(frozen, config) == a_token - saved


def test_flops_of_ppo_by_hand():
    config = llama()
    ppo = PpoWorkload(8, 10, 14, 8, 4, reward_parameters=5000, max_logits=1 << 26)
    workload = work_of(config, stage="ppo", ppo=ppo)
    parameters = workload.shape.parameters
    training = 2 * 4 * (6 * parameters + 12 * 3 * 32 * 24)
    looking = 2 * (3 * parameters + 5000)
    assert flops_per_step(workload, config) == (training + looking) * 8 * 24


def test_four_bits_hold_what_they_can():
    config = llama(hidden_size=64, intermediate_size=172)
    workload = work_of(config, has_adapter=True, load_in="4bit", trained=0)
    small = 3 * (4 * 64 * 64 + 2 * 64 * 172)  # an input of 172 is not divisible by 64
    rest = workload.shape.parameters - small
    assert weight_bytes(workload) == pytest.approx(small * (0.5 + 1 / 64 + 1 / 4096) + 4 * rest)


def test_sharding_divides_what_ddp_repeats():
    workload = work_of(config_of("llama-2-7b"), device="cuda", world=8, precision="bf16")
    workload = replace(workload, batch_size=1, length=2048, can_shard=True)
    alike, sharded = sharding_options(workload, 8, 80e9)
    assert (alike.name, alike.fits, sharded.name, sharded.fits) == ("DDP", False, "FSDP2", True)
    states = 16 * workload.shape.parameters
    assert states / 8 < sharded.bytes < states / 8 + 25e9


def test_flags_that_make_it_fit():
    workload = work_of(config_of("llama-2-7b"), stage="sft", device="cuda", precision="bf16")
    workload = replace(workload, batch_size=8, length=2048)
    assert find_fitting_flags(workload, 1, 1e12).flags == ""
    narrow = find_fitting_flags(workload, 1, 24e9)
    assert narrow is not None
    assert "--lora --load-in-4bit" in narrow.flags
    assert narrow.bytes <= 0.9 * 24e9
    assert find_fitting_flags(workload, 1, 2e9) is None
    halved = find_fitting_flags(workload, 1, estimate_memory(workload).peak)  # a tenth too little
    assert halved is not None
    assert halved.flags == "--batch-size 4 --grad-accum 2"


def test_an_unknown_shape_has_neighbours():
    with pytest.raises(UserError, match=r"did you mean llama-2-7b\?"):
        config_of("llama2-7b")


# What runs take


SIZES = {  # width, of the feed-forward layer, layers, heads, heads of keys
    "tiny": (64, 64, 1, 1, 1),
    "5M": (256, 704, 6, 4, 2),
    "14M": (384, 1024, 8, 6, 2),
    "42M": (640, 1728, 8, 10, 10),
}


@pytest.fixture(scope="session")
def measured(tokens, tmp_path_factory):
    """Predicted and measured bytes of each size and method, all by one process and its forks."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("measured")
    tokenizer = AutoTokenizer.from_pretrained(tokens / "tokenizer")
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: getattr(tokenizer, name) for name in names}
    texts = (" ".join(sentences(80, seed)) for seed in range(12))
    rows = write_texts(folder / "rows.jsonl", texts)
    jobs = []
    for name, (hidden, intermediate, layers, heads, kv_heads) in SIZES.items():
        config = LlamaConfig(
            vocab_size=4096,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            tie_word_embeddings=True,
            max_position_embeddings=512,
            **ids,
        )
        model = folder / name
        AutoModelForCausalLM.from_config(config).save_pretrained(model)
        tokenizer.save_pretrained(model)
        jobs += [_job(name, model, rows, lora) for lora in (True, False)]
    script = Path(__file__).with_name("peak_memory.py")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    ran = subprocess.run(
        [sys.executable, script, json.dumps(jobs)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return {found["name"]: found for found in rows_in(ran.stdout)}


def _job(name, model, rows, lora):
    command = ["sft", "--model", model, "--data", rows, "--max-length", 256, "--truncation", "cut"]
    command += ["--batch-size", 4, "--max-steps", 2, "--threads", 1, "--val-size", 2]
    command += ["--samples", 0, "--precision", "fp32", "-o", f"{model}-{lora}"]
    method = "lora" if lora else "full"
    arguments = [*map(str, command), *(["--lora"] if lora else [])]
    return {"name": f"{name}-{method}", "arguments": arguments}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("size", ["5M", "14M", "42M"])
def test_peak_memory_is_as_planned(measured, size, method):
    found = measured[f"{size}-{method}"]
    assert found["planned"] == pytest.approx(found["measured"], rel=0.15)
