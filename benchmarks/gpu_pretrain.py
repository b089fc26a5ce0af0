"""GPT-2 124M on one GPU: tokens per second and model FLOP utilisation against nanoGPT's train.py.

    python benchmarks/gpu_pretrain.py [NANOGPT_CHECKOUT]

Context 1024, bfloat16, compiled, fused AdamW, flash attention through SDPA, vocabulary 50,304, half
a million tokens a step, on random tokens made here: it needs nothing that is not on the machine.
Both sides run in turn as processes of their own; speeds are medians over steps after warm-up.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

import numpy as np
from common import ENVIRONMENT, machine, show, table

from llmctl.data.tokenizer.train import fingerprint, save_tokenizer, train_tokenizer

VOCABULARY, CONTEXT, TOKENS = 50_304, 1024, 20_000_000
WARM_UP = 10


def write_tokens(folder: Path) -> np.ndarray:
    """Random tokens as a tokenize run would leave them."""
    tokenizer = train_tokenizer([], "byte")
    save_tokenizer(tokenizer, folder / "tokenizer")
    (folder / "tokens").mkdir()
    random = np.random.default_rng(0)
    splits, train = {}, np.zeros(0, np.uint16)
    for name, count in (("train", TOKENS), ("val", CONTEXT * 8 + 1)):
        tokens = random.integers(0, VOCABULARY, count, dtype=np.uint16)
        tokens.tofile(folder / "tokens" / f"{name}-00000.bin")
        shard = {
            "file": f"{name}-00000.bin",
            "tokens": count,
            "documents": 1,
            "sha256": sha256(tokens.tobytes()).hexdigest(),
        }
        splits[name] = {"tokens": count, "documents": 1, "bytes": count, "shards": [shard]}
        train = tokens if name == "train" else train
    index = {
        "dtype": "<u2",
        "vocab_size": VOCABULARY,
        "eos_token_id": 1,
        "bos_token_id": 0,
        "tokenizer_sha256": fingerprint(tokenizer),
        "splits": splits,
    }
    (folder / "tokens" / "index.json").write_text(json.dumps(index))
    return train


def ours(folder: Path, steps: int, size: int, batch_tokens: int) -> tuple[list[float], list[float]]:
    """Tokens per second and utilisation of each step after warm-up."""
    out = folder / "run"
    command = [
        sys.executable,
        "-m",
        "llmctl",
        "pretrain",
        "--tokens",
        folder / "tok",
        "--arch",
        "gpt2",
        "--size",
        "small",
        "--context",
        CONTEXT,
        "--batch-size",
        size,
        "--batch-tokens",
        batch_tokens,
        "--optimizer",
        "adamw",
        "--precision",
        "bf16",
        "--compile",
        "--device",
        "cuda",
        "--max-steps",
        steps,
        "--log-every",
        1,
        "--eval-every",
        steps,
        "--save-every",
        steps,
        "-o",
        out,
        "--overwrite",
    ]
    subprocess.run([str(part) for part in command], check=True, env=ENVIRONMENT)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steady = [row for row in rows if "loss" in row and row["step"] > WARM_UP]
    return [r["tokens_per_second"] for r in steady], [r["mfu"] for r in steady if r["mfu"]]


def theirs(copy: Path, steps: int, size: int, batch_tokens: int) -> list[float]:
    """Tokens per second of each of nanoGPT's iterations after warm-up, from its own log."""
    command = [
        sys.executable,
        "train.py",
        "--dataset=random",
        f"--batch_size={size}",
        f"--block_size={CONTEXT}",
        f"--gradient_accumulation_steps={batch_tokens // size // CONTEXT}",
        f"--max_iters={steps}",
        "--eval_interval=100000",
        "--eval_iters=1",
        "--log_interval=1",
        "--n_layer=12",
        "--n_head=12",
        "--n_embd=768",
        "--dropout=0.0",
        "--bias=True",
        "--compile=True",
        "--dtype=bfloat16",
    ]
    ran = subprocess.run(
        command, cwd=copy, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    times = [float(ms) for ms in re.findall(r"time ([\d.]+)ms", ran.stdout)]
    return [batch_tokens / (ms / 1000) for ms in times[WARM_UP:]]


def prepare_nanogpt(checkout: Path, train: np.ndarray, folder: Path) -> Path:
    """A copy of the checkout with the same tokens as its data set."""
    copy = folder / "nanoGPT"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git"))
    data = copy / "data" / "random"
    data.mkdir()
    for name in ("train", "val"):
        train.tofile(data / f"{name}.bin")
    return copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nanogpt", type=Path, nargs="?")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batch-tokens", type=int, default=524_288)
    options = parser.parse_args()
    shape = (options.steps, options.batch_size, options.batch_tokens)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tok").mkdir()
        train = write_tokens(folder / "tok")
        speeds, peers, utilisation = [], [], []
        for _ in range(2):
            if options.nanogpt:
                peers += theirs(prepare_nanogpt(options.nanogpt, train, folder), *shape)
                shutil.rmtree(folder / "nanoGPT")
            found, mfu = ours(folder, *shape)
            speeds += found
            utilisation += mfu
    rows = [
        ["llmctl", show(speeds, 0), f"{statistics.median(utilisation):.1%}" if utilisation else ""]
    ]
    if peers:
        ratio = statistics.median(speeds) / statistics.median(peers)
        rows = [["nanoGPT", show(peers, 0), ""], *rows, ["ratio", f"{ratio:.3f}", ""]]
    print(f"{machine(device='cuda')}; medians over steps after warm-up, two rounds, alternating\n")
    print(table(["GPT-2 124M, context 1024", "tokens/s", "model FLOP utilisation"], rows))


if __name__ == "__main__":
    main()
