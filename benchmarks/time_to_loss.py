"""Wall time to nanoGPT's validation loss, against nanoGPT's whole run.

    python benchmarks/time_to_loss.py NANOGPT_CHECKOUT SHAKESPEARE.TXT

nanoGPT runs its documented CPU recipe (README: 4 layers, 4 heads, width 128, context 64, batch 12,
2,000 iterations, no dropout). llmctl runs recipes/pretrain/shakespeare-char.yaml: the same context,
no more parameters. Both are timed as whole processes, imports and evaluation included; preparing
the data is in neither. Our validation loss is over the whole split.
"""

import argparse
import json
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import ENVIRONMENT, alternate, machine, ratio, seconds, show, table, timed

TARGET = 1.886
RECIPE = Path(__file__).parents[1] / "recipes" / "pretrain" / "shakespeare-char.yaml"
NANOGPT = [
    "config/train_shakespeare_char.py",
    "--device=cpu",
    "--compile=False",
    "--eval_iters=20",
    "--log_interval=1",
    "--block_size=64",
    "--batch_size=12",
    "--n_layer=4",
    "--n_head=4",
    "--n_embd=128",
    "--max_iters=2000",
    "--lr_decay_iters=2000",
    "--dropout=0.0",
]


def prepare_nanogpt(checkout: Path, text: str, folder: Path) -> Path:
    """A copy of the checkout with its character data set written as prepare.py writes it."""
    copy = folder / "nanoGPT"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git"))
    data = copy / "data" / "shakespeare_char"
    characters = sorted(set(text))
    ids = np.searchsorted(np.array(characters), np.array(list(text))).astype(np.uint16)
    cut = int(len(text) * 0.9)
    ids[:cut].tofile(data / "train.bin")
    ids[cut:].tofile(data / "val.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(characters)}))
    return copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nanogpt", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy = prepare_nanogpt(options.nanogpt, options.text.read_text(), folder)
        llmctl = [sys.executable, "-m", "llmctl"]
        tokens = folder / "tokens"
        tokenize = ["tokenize", "--algorithm", "char", "--data", options.text, "-o", tokens]
        subprocess.run([*llmctl, *map(str, tokenize)], check=True, env=ENVIRONMENT)
        run = folder / "run"
        ours = [*llmctl, "pretrain", "-c", RECIPE, "--tokens", tokens, "-o", run, "--overwrite"]
        losses, sampled = [], []

        def nanogpt_seconds() -> float:
            taken, printed = timed([sys.executable, "train.py", *NANOGPT], copy)
            sampled.append(float(re.findall(r"val loss ([\d.]+)", printed)[-1]))
            return taken

        def ours_seconds() -> float:
            taken = seconds(ours)
            result = json.loads((run / "manifest.json").read_text())["result"]
            losses.append((result["val_loss"], result["parameters"]))
            return taken

        sides = {"nanoGPT": nanogpt_seconds, "llmctl": ours_seconds}
        found = alternate(sides, options.rounds)
    loss, parameters = max(losses)
    print(f"{machine()}; {options.rounds} rounds, alternating, medians (least to most)\n")
    print(
        table(
            ["", "wall seconds", "validation loss"],
            [
                [
                    "nanoGPT, whole run",
                    show(found["nanoGPT"], 1),
                    f"{statistics.median(sampled):.4f} (its own sample of 20 batches)",
                ],
                [
                    f"llmctl, {parameters:,} parameters",
                    show(found["llmctl"], 1),
                    f"{loss:.4f} (whole split)",
                ],
                ["ratio", f"{ratio(found['llmctl'], found['nanoGPT']):.3f}", ""],
            ],
        )
    )
    if loss > TARGET:
        raise SystemExit(f"the target of {TARGET} was missed")


if __name__ == "__main__":
    main()
