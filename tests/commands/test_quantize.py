"""`llmctl quantize`: what it writes opens as what it measured, and what it says is true."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llmctl.config.commands.quantize import QuantizeConfig
from llmctl.errors import DataError, GateError, ModelError
from llmctl.evaluate.perplexity import make_windows
from llmctl.models.loading import load_causal_lm
from llmctl.models.quantized import first_not_finite, is_quantized, memory_bytes_of
from llmctl.quantize import convert, held_out
from llmctl.quantize.fidelity import Fidelity, measure_fidelity
from llmctl.quantize.layers import Layers, choose_layers, kept_by_flag
from llmctl.quantize.results import QuantizationReport, WeightBytes
from tests.conftest import pretrained, sentences
from tests.models.test_adapters import make_base, make_tokenizer
from tests.run_files import edit_json, edit_tensors, write_rows

torch.set_num_threads(1)

QUICK = ("--eval-tokens", 512, "--sample-tokens", 4, "--threads", 1)
WAYS = {
    "nf4": ("--bits", 4),
    "fp4": ("--bits", 4, "--quant-type", "fp4", "--no-double-quant", "--dtype", "bf16"),
    "int8": ("--method", "bnb", "--bits", 8),
    "torchao": ("--method", "torchao"),
    "dynamic": ("--method", "torchao", "--dynamic"),
    "bf16": ("--dtype", "bf16"),
}
SHAPE = ("--layers", 2, "--hidden", 64, "--heads", 2, "--context", 64, "--batch-size", 4)


@pytest.fixture(scope="module")
def wide(cli, tokens, tmp_path_factory):
    """A pretrained run with layers that 4 bits take, and some that they do not."""
    return pretrained(cli, tokens, tmp_path_factory.mktemp("runs") / "wide", SHAPE, 60)


@pytest.fixture(scope="module")
def small(cli, wide, tmp_path_factory):
    """For each way a run, and the object that it printed."""
    found = {}
    for name, flags in WAYS.items():
        out = tmp_path_factory.mktemp("small") / name
        result = cli("quantize", "--model", wide, *flags, *QUICK, "--json", "-o", out)
        assert result.code == 0, result.err
        found[name] = (out, json.loads(result.out), result.err)
    return found


def weights(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("way", WAYS)
def test_the_report_is_whole_and_true(wide, small, way):
    out, found, said = small[way]
    assert found["status"] == "completed"
    assert found["disk_bytes_before"] == weights(wide / "model")
    assert found["disk_bytes_after"] == weights(out / "model") < found["disk_bytes_before"]
    assert found["memory_bytes_after"] < found["memory_bytes_before"]
    assert 0 < found["kl"] < 0.5
    assert 0.5 < found["top1_agreement"] <= 1
    increase = found["perplexity_after"] / found["perplexity_before"] - 1
    assert found["perplexity_increase"] == pytest.approx(increase)
    assert found["eval_tokens"] > 400
    assert "validation tokens" in found["eval_text"]
    assert len(found["samples"]) == 3
    speeds = {k.rpartition("_")[2]: v for k, v in found.items() if k.startswith("tokens_per")}
    assert {"fp32", "after"} <= set(speeds)
    assert ("bf16" in speeds) == (way != "bf16"), "the other type is timed, unless it is the result"
    assert found["slower"] == [name for name in speeds if speeds[name] > speeds["after"]]
    for name in found["slower"]:
        assert f"slower here than with weights in {name}" in said
    for word in ("weights on disk", "weights in memory", "perplexity", "mean KL", "before:"):
        assert word in said
    assert json.loads((out / "manifest.json").read_text())["result"]["kl"] == found["kl"]


def test_perplexity_before_is_that_of_pretraining(cli, wide, tmp_path):
    """Windows that do not overlap, over the same validation tokens."""
    result = cli(
        *("quantize", "--model", wide, "--dtype", "bf16", "--eval-tokens", "10M"),
        *("--sample-tokens", 2, "--threads", 1, "--json", "-o", tmp_path / "out"),
    )
    found = json.loads(result.out)
    known = json.loads((wide / "manifest.json").read_text())["result"]
    assert math.log(found["perplexity_before"]) == pytest.approx(known["val_loss"], rel=0.03)


PROGRAM = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("The cat", return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        logits = model.eval()(torch.arange(20)[None]).logits[0, -1, :5].float()
    print(written.shape[1] > inputs["input_ids"].shape[1], *logits.tolist())
"""


@pytest.mark.slow
def test_every_folder_opens_with_transformers_alone(small):
    folders = [out / "model" for out, _, _ in small.values()]
    ran = subprocess.run([sys.executable, "-c", PROGRAM, *folders], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.split("\n")[: len(folders)]
    for folder, line in zip(folders, lines, strict=True):
        wrote, *logits = line.split()
        assert wrote == "True"
        model = load_causal_lm(str(folder), dtype=torch.float32)
        with torch.no_grad():
            ours = model(torch.arange(20)[None]).logits[0, -1, :5].float()
        theirs = torch.tensor([float(number) for number in logits])
        # bitsandbytes alone takes another kernel on CPUs with AVX512-BF16
        torch.testing.assert_close(theirs, ours, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("way", WAYS)
def test_generate_takes_the_run(cli, small, way):
    said = cli("generate", "--model", small[way][0], "--prompt", "The", "--max-new-tokens", 4)
    assert said.code == 0, said.err
    assert (small[way][0] / "model" / "generation_config.json").is_file()


def test_layers_are_in_few_bits_or_listed_with_a_reason(small):
    for way, bits in {"nf4": 4, "int8": 8, "torchao": 8}.items():
        out, found, _ = small[way]
        model = load_causal_lm(str(out), dtype=torch.float32)
        linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        few = {name for name in linear if is_quantized(model.get_submodule(name))}
        assert few == linear - set(found["kept_layers"]), way
        assert found["quantized_layers"] == len(few) > 0
        assert "the output layer" in found["kept_layers"]["lm_head"]
        for name in few if bits == 4 else ():
            layer = model.get_submodule(name)
            assert (layer.in_features % 64, layer.out_features % 32) == (0, 0)
        dense = sum(p.numel() for n, p in model.named_parameters() if n.startswith("model.emb"))
        assert 0 < found["quantized_share"] < 1 - dense / 10**7


def tiny(**more):
    torch.manual_seed(0)
    shape = {"vocab_size": 48, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, **more)).eval()


def test_memory_is_what_tensors_hold():
    """Against a count by hand: tied weights once, and the two buffers of rotary frequencies."""
    model = tiny()
    attention, mlp, norms = 4 * 64 * 64, 3 * 64 * 128, 3 * 64
    assert memory_bytes_of(model) == 4 * (48 * 64 + attention + mlp + norms + 2 * 16)


@pytest.mark.parametrize(
    ("way", "per_layer"),
    {
        "int8": lambda rows, columns: rows * columns + 4 * rows,
        "torchao": lambda rows, columns: rows * columns + 4 * rows,
        # half a byte a weight; a scale for 64 of them and its own 16 values, all in fp32
        "fp4": lambda rows, columns: rows * columns // 2 + 4 * (rows * columns // 64) + 4 * 16,
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_memory_of_layers_in_few_bits(small, way, per_layer):
    model = load_causal_lm(str(small[way][0]), dtype=torch.float32)
    few = {n: m for n, m in model.named_modules() if is_quantized(m)}
    wanted = sum(per_layer(m.out_features, m.in_features) for m in few.values())
    others = {
        p.data_ptr(): p.numel() * p.itemsize
        for name, p in [*model.named_parameters(), *model.named_buffers()]
        if name.rpartition(".")[0] not in few
    }
    assert memory_bytes_of(model) == pytest.approx(wanted + sum(others.values()), rel=0.02)
    assert small[way][1]["memory_bytes_after"] == memory_bytes_of(model)


def test_distances_are_those_of_the_definition():
    before, after = tiny(), tiny()
    with torch.no_grad():
        for weight in after.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    documents = [[3, 9, 11, 4, 30], [5, 6, 17], [8] * 40]
    found = measure_fidelity(before, after, make_windows(documents, context=8, stride=8))
    nats, others, divergence, same, count = 0.0, 0.0, 0.0, 0, 0
    for document in documents:
        for start in range(0, len(document) - 1, 8):
            part = document[start : start + 9]
            ids = torch.tensor([part[:-1]])
            rows = [
                m(ids).logits[0].detach().double().softmax(-1).tolist() for m in (before, after)
            ]
            for p, q, target in zip(*rows, part[1:], strict=True):
                nats -= math.log(p[target])
                others -= math.log(q[target])
                divergence += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
                same += p.index(max(p)) == q.index(max(q))
                count += 1
    assert found.tokens == count == 4 + 2 + 39
    assert found.perplexity_before == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert found.perplexity_after == pytest.approx(math.exp(others / count), rel=1e-5)
    assert found.kl == pytest.approx(divergence / count, rel=1e-4)
    assert found.top1 == same / count
    assert measure_fidelity(before, before, make_windows(documents, context=8)).kl == 0


def test_the_gate_writes_nothing(cli, wide, tmp_path):
    flags = ("--bits", 4, "--quant-type", "fp4", "--max-perplexity-increase")
    out = tmp_path / "out"
    refused = cli("quantize", "--model", wide, *flags, 0, *QUICK, "--json", "-o", out)
    assert refused.code == 8, refused.err
    assert "nothing was written" in refused.err
    assert "mean KL" in refused.err, "the report is given all the same"
    found = json.loads(refused.out)
    assert found["error"]["code"] == 8
    assert found["perplexity_after"] > found["perplexity_before"]
    assert not out.exists()
    held = cli("quantize", "--model", wide, *flags, 1, *QUICK, "-o", out)
    assert held.code == 0, held.err
    assert held.out == f"{out}\n"


def report(increase=0.2, **speeds):
    fidelity = Fidelity(100, 10.0, 10.0 * (1 + increase), 0.1, 0.9)
    sizes = WeightBytes(100, 100)
    return QuantizationReport("x", "y", Layers((), {}), 0.5, sizes, sizes, fidelity, speeds, [])


def test_either_name_of_a_tied_matrix_keeps_it():
    model = tiny()
    both = {"lm_head", "model.embed_tokens"}
    for name in both:
        config = QuantizeConfig(model="x", gguf="q8_0", keep=[name])
        assert kept_by_flag(model, config) == both


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("bitsandbytes, 4 bits (nf4)", "more bits (--bits 8), or the layers"),
        ("bitsandbytes, 8 bits (LLM.int8)", "keep the layers"),
        ("GGUF q4_0", "more bits (--gguf q8_0), or the layers"),
    ],
)
def test_a_gate_names_what_is_left_to_try(method, more):
    failed = replace(report(0.2, fp32=1.0, after=1.0), method=method, layers=Layers(("q",), {}))
    with pytest.raises(GateError) as caught:
        failed.check_gate(0.05)
    assert more in caught.value.hint


def test_the_gate_is_relative_and_takes_no_nan():
    report(0.049).check_gate(0.05)
    report(9.0).check_gate(None)
    for increase in (0.051, math.nan):
        with pytest.raises(GateError, match="perplexity grew"):
            report(increase, fp32=1.0, after=1.0).check_gate(0.05)


def test_slower_names_only_what_is_faster():
    assert report(fp32=9.0, bf16=11.0, after=10.0).slower() == ["bf16"]
    assert report(fp32=9.0).slower() == [], "nothing was timed"


def test_what_was_written_must_be_what_was_measured(cli, wide, tmp_path, monkeypatch):
    def spoil(model, state, tokenizer, folder):
        save(model, state, tokenizer, folder)
        edit_tensors(folder / "model.safetensors", lambda t: t["model.norm.weight"].mul_(1.001))

    save = convert.save_model
    monkeypatch.setattr(convert, "save_model", spoil)
    result = cli("quantize", "--model", wide, "--bits", 8, *QUICK, "-o", tmp_path / "out")
    assert result.code == 4, result.err
    assert "gives other logits than the one that was measured" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", ["nf4", "int8"])
def test_scales_that_are_not_finite_are_found(small, tmp_path, way):
    folder = shutil.copytree(small[way][0] / "model", tmp_path / "model")
    layer, ending = "model.layers.0.self_attn.q_proj.", {"nf4": "weight.nested_absmax"}
    scales = layer + ending.get(way, "SCB")
    edit_tensors(folder / "model.safetensors", lambda t: t[scales][:1].fill_(math.nan))
    assert first_not_finite(AutoModelForCausalLM.from_pretrained(folder)) == layer + "weight"
    with pytest.raises(ModelError, match="not finite"):
        load_causal_lm(str(folder), dtype=torch.float32)


def test_kept_layers(cli, wide, tmp_path):
    flags = ("--bits", 8, "--keep", "v_proj,layers.0", "--keep", "model.layers.1.mlp")
    result = cli("quantize", "--model", wide, *flags, *QUICK, "--json", "-o", tmp_path / "out")
    assert result.code == 0, result.err
    kept = json.loads(result.out)["kept_layers"]
    left = {"model.layers.1.self_attn." + name for name in ("q_proj", "k_proj", "o_proj")}
    model = load_causal_lm(str(tmp_path / "out"), dtype=torch.float32)
    assert {name for name, module in model.named_modules() if is_quantized(module)} == left
    assert kept["model.layers.0.mlp.up_proj"] == kept["model.layers.1.self_attn.v_proj"] == "--keep"
    assert "--keep" in result.err


def config(**values):
    return QuantizeConfig(model="x", **values)


def test_layers_that_a_method_cannot_take_are_kept():
    model = tiny()
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 172, bias=False)
    model.model.layers[0].mlp.down_proj = torch.nn.Linear(172, 64, bias=False)
    kept = choose_layers(model, config(bits=4)).kept
    assert kept["model.layers.0.mlp.down_proj"] == "172 inputs, not a multiple of 64"
    assert kept["model.layers.0.mlp.up_proj"] == "172 outputs, not a multiple of 32"
    assert kept["lm_head"] == "the output layer, tied to the embedding"
    assert set(choose_layers(model, config(bits=8)).kept) == {"lm_head"}
    untied = tiny()
    untied.lm_head = torch.nn.Linear(64, 48, bias=False)
    assert choose_layers(untied, config(bits=8)).kept == {"lm_head": "the output layer"}


def test_transposed_layers(cli, tmp_path):
    """GPT-2's: bitsandbytes takes them, torchao does not."""
    base = make_base(tmp_path / "base", "gpt2")
    data = tmp_path / "text.txt"
    data.write_text(" ".join(f"w{i % 40}" for i in range(300)))
    flags = ("--model", base, "--data", data, *QUICK)
    result = cli("quantize", *flags, "--bits", 8, "--json", "-o", tmp_path / "out")
    assert result.code == 0, result.err
    assert json.loads(result.out)["quantized_layers"] == 8
    refused = cli("quantize", *flags, "--method", "torchao", "-o", tmp_path / "no")
    assert refused.code == 4
    assert "every layer would be kept" in refused.err
    assert "transposed" in refused.err


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    rows = [{"prompt": f"{i}? {s}", "response": s} for i, s in enumerate(sentences(60, 3))]
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def tuned(cli, wide, examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "sft"
    flags = ("--lora", "--max-steps", 2, "--batch-size", 2, "--samples", 0, "--threads", 1)
    result = cli("sft", "--model", wide, "--data", examples, *flags, "-o", out)
    assert result.code == 0, result.err
    return out


def test_an_adapter_is_merged_when_asked(cli, tuned, tmp_path):
    flags = ("--bits", 8, *QUICK, "--json", "-o", tmp_path / "out")
    refused = cli("quantize", "--model", tuned, *flags)
    assert refused.code == 4
    assert "add --merge" in refused.err
    result = cli("quantize", "--model", tuned, "--merge", *flags)
    assert result.code == 0, result.err
    assert "differ from the adapter's by at most" in result.err
    found = json.loads(result.out)
    assert f"the examples that {tuned} held out" in found["eval_text"]
    assert found["samples"][0]["prompt"].endswith("assistant\n"), "to be answered"
    inputs = json.loads((tmp_path / "out" / "manifest.json").read_text())["inputs"]
    assert {"adapter", "base", "eval-text"} == {facts["role"] for facts in inputs}
    assert "chat_template" in {p.stem for p in (tmp_path / "out" / "model").iterdir()}


def test_a_tokenizer_that_grew_still_reads_the_tokens(wide):
    tokenizer = held_out.load_tokenizer(str(wide))
    known = find(wide, tokenizer).documents
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|new|>"]})
    assert find(wide, tokenizer).documents == known
    with pytest.raises(DataError, match="no text to measure on"):
        find(wide, make_tokenizer())


def find(reference, tokenizer, **values):
    return held_out.find_held_out(QuantizeConfig(model=str(reference), bits=8, **values), tokenizer)


def test_text_of_runs_before(cli, wide, tuned, examples, tmp_path):
    """A merge measures on what its adapter held out; a run that held out none on its base's."""
    merged = cli("merge", "--model", tuned, "--threads", 1, "-o", tmp_path / "merged")
    assert merged.code == 0, merged.err
    flags = ("--max-steps", 1, "--batch-size", 2, "--samples", 0, "--threads", 1)
    none = cli(
        *("sft", "--model", wide, "--data", examples, "--val-size", 0, *flags),
        *("-o", tmp_path / "none"),
    )
    assert none.code == 0, none.err
    tokenizer = held_out.load_tokenizer(str(tuned))
    assert str(tuned) in find(tmp_path / "merged", tokenizer).name
    assert str(tuned) in find(tuned / "adapter", tokenizer).name, "its folder means the run"
    assert str(wide) in find(tmp_path / "none", tokenizer).name
    found = find(tmp_path / "merged", tokenizer, eval_tokens=50)
    assert found.tokens <= 50


def test_data_that_changed_is_refused(cli, wide, examples, tmp_path):
    rows = shutil.copy(examples, tmp_path / "rows.jsonl")
    flags = ("--max-steps", 1, "--batch-size", 2, "--samples", 0, "--threads", 1)
    out = tmp_path / "sft"
    assert cli("sft", "--model", wide, "--data", rows, *flags, "-o", out).code == 0
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "new?", "response": "yes"}) + "\n")
    result = cli("quantize", "--model", out, "--bits", 8, "-o", tmp_path / "out")
    assert result.code == 3
    assert "has changed since" in result.err


def test_data_may_be_text_or_rows(wide, examples, tmp_path):
    file = tmp_path / "more.txt"
    file.write_text("The cat sees the river. " * 20)
    tokenizer = held_out.load_tokenizer(str(wide))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    both = find(wide, tokenizer, data=[str(file), str(examples)])
    alone = find(wide, tokenizer, data=[str(file)])
    assert len(alone.documents) == 1 < len(both.documents)
    assert alone.documents[0] in both.documents
    assert len(both.inputs) == 2
    assert len(alone.prompts) == len(both.prompts) == 3


def test_dry_run_writes_nothing(cli, wide, tmp_path):
    result = cli("quantize", "--model", wide, "--bits", 4, "-o", tmp_path / "out", "--dry-run")
    assert result.code == 0, result.err
    assert "bits: 4" in result.out
    assert "would keep lm_head" in result.err
    assert "would measure on" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["q8_0", "bf16"])
def test_gguf(cli, wide, tmp_path, kind):
    out = tmp_path / "out"
    result = cli("quantize", "--model", wide, "--gguf", kind, *QUICK, "--json", "-o", out)
    assert result.code == 0, result.err
    found = json.loads(result.out)
    file = out / "gguf" / f"model-{kind}.gguf"
    assert found["model"] == str(file)
    assert found["disk_bytes_after"] == file.stat().st_size < found["disk_bytes_before"]
    assert found["top1_agreement"] > 0.9
    assert not (out / "model").exists()
    assert [p.name for p in out.glob(".tmp*")] == []
    refused = cli("generate", "--model", out, "--prompt", "The")
    assert refused.code == 4
    assert "holds no model" in refused.err


def test_a_gguf_file_that_says_something_else_is_refused(cli, wide, tmp_path, monkeypatch):
    from llmctl.quantize import convert

    def spoiled(path, config, read=convert.read_back):
        model = read(path, config)
        with torch.no_grad():
            weight = model.model.layers[0].mlp.down_proj.weight
            weight.copy_(weight.flip(0) * 50)
        return model

    monkeypatch.setattr(convert, "read_back", spoiled)
    out = tmp_path / "out"
    result = cli("quantize", "--model", wide, "--gguf", "f16", *QUICK, "-o", out)
    assert result.code == 4, result.err
    assert "what was read back from the file says something else: mean KL" in result.err
    assert not (out / "gguf").exists()


def test_the_gate_of_a_gguf_file(cli, wide, tmp_path):
    out = tmp_path / "out"
    flags = ("--gguf", "q4_0", "--max-perplexity-increase", 0)
    result = cli("quantize", "--model", wide, *flags, *QUICK, "-o", out)
    assert result.code == 8, result.err
    assert not out.exists()


USAGE = {
    (): "say how small",
    ("--bits", 3): "--bits: expected 4 or 8, got 3",
    ("--method", "gptq"): "'bnb' or 'torchao'",
    ("--gguf", "q5"): "'q8_0'",
    ("--bits", 4, "--gguf", "q8_0"): "--bits does not go with --gguf",
    ("--bits", 8, "--quant-type", "fp4"): "--quant-type goes with 4 bits of --method bnb",
    ("--method", "torchao", "--no-double-quant"): "--double-quant goes with 4 bits",
    ("--bits", 8, "--dynamic"): "--dynamic goes with --method torchao",
    ("--dtype", "bf16", "--keep", "lm_head"): "--keep does not go with a plain cast",
    ("--gguf", "f16", "--keep", "lm_head"): "--keep does not go with --gguf f16",
    ("--dtype", "fp32"): "in that type already",
    ("--bits", 8, "--keep", "q_prj"): "did you mean q_proj",
}


@pytest.mark.parametrize("flags", USAGE, ids=lambda flags: " ".join(map(str, flags)) or "none")
def test_usage(cli, wide, tmp_path, flags):
    result = cli("quantize", "--model", wide, *flags, "-o", tmp_path / "out")
    assert result.code == 2, result.err
    assert USAGE[flags] in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "out").exists()


def not_a_number(folder):
    edit_tensors(folder / "model.safetensors", lambda t: t["model.norm.weight"][3].fill_(math.nan))


def classifier(folder):
    edit_json(folder / "config.json", architectures=["LlamaForSequenceClassification"])


def nothing(folder):
    pass


BAD = {
    "no text": (nothing, (), 3, "no text to measure on"),
    "empty text": (nothing, ("--data", "EMPTY"), 3, "empty"),
    "one token": (nothing, ("--data", "EMPTY", "--data", "TEXT"), 3, "empty"),
    "nan": (not_a_number, ("--data", "TEXT"), 4, "not finite: model.norm.weight"),
    "classifier": (classifier, ("--data", "TEXT"), 4, "only language models"),
    "no adapter": (nothing, ("--merge", "--data", "TEXT"), 4, "no adapter here"),
    "no gpu": (nothing, ("--method", "torchao", "--data", "TEXT"), 5, "its kernels"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(cli, wide, tmp_path, name):
    spoil, flags, code, message = BAD[name]
    folder = shutil.copytree(wide / "model", tmp_path / "model")
    spoil(folder)
    (tmp_path / "EMPTY").write_text(" \n")
    (tmp_path / "TEXT").write_text(" ".join(sentences(20)))
    named = [tmp_path / flag if flag.isupper() else flag for flag in flags]
    out = tmp_path / "out"
    result = cli("quantize", "--model", folder, "--bits", 4, *named, *QUICK, "-o", out)
    assert result.code == code, result.err
    assert message in result.err
    assert "Traceback" not in result.err
    assert not out.exists()


def test_a_method_without_its_library(cli, wide, tmp_path, monkeypatch):
    monkeypatch.setattr("llmctl.errors.find_spec", lambda name: None)
    result = cli("quantize", "--model", wide, "--method", "torchao", "-o", tmp_path / "out")
    assert result.code == 5, result.err
    assert 'pip install "llmctl[torchao]"' in result.err


def test_every_layer_kept_is_refused(cli, base, tmp_path):
    flags = ("--bits", 4, "--keep", "down_proj")
    result = cli("quantize", "--model", base, *flags, "-o", tmp_path / "out")
    assert result.code == 4, result.err
    assert "every layer would be kept" in result.err
    assert "32 inputs, not a multiple of 64" in result.err


@pytest.mark.parametrize(
    "command",
    [
        ("quantize", "--bits", 8),
        ("sft", "--data", "builtin:tasks", "--lora", "--max-steps", 1),
        ("reward", "--data", "builtin:preferences", "--max-steps", 1),
        ("generate", "--load-in-8bit", "--prompt", "The"),
    ],
    ids=lambda command: command[0],
)
def test_quantized_already(cli, small, tmp_path, command):
    name, *flags = command
    out = tmp_path / "out"
    result = cli(name, "--model", small["nf4"][0], *flags, "-o", out)
    assert result.code == 4, result.err
    assert "quantized" in result.err
    assert "bitsandbytes 4 bits" in result.err
    assert not out.exists()


def test_continuing_a_quantized_model_is_refused(cli, small, tokens, tmp_path):
    flags = ("--tokens", tokens, "--max-steps", 1, "-o", tmp_path / "out")
    result = cli("pretrain", "--model", small["int8"][0], *flags)
    assert result.code == 4, result.err
    assert "quantized (bitsandbytes 8 bits) and cannot be trained" in result.err
