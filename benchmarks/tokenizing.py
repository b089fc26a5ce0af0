"""Tokenizing, end to end: `llmctl tokenize --tokenizer` against `datasets.map` with two processes.

    python benchmarks/tokenizing.py [--data TEXTFILE] [--megabytes 8] [--rounds 3]

Both sides read the same jsonl, encode it with the same byte-level BPE tokenizer of 8,192 tokens,
end each document with eos, and write all ids to uint16 files. Ours also checks the data, splits
off validation documents, and hashes inputs and shards. "Process" is the wall time of a fresh
process, imports included; "inside" is the same work without start and imports. The other side
is load_dataset + AutoTokenizer + map(batched=True, num_proc=2) + the write of a .bin file from
Arrow batches, with an empty cache. Sides alternate; medians. The default text is
`builtin:python-docs` followed by the sources of the standard library, so nothing is repeated.
"""

import argparse
import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from common import ENVIRONMENT, machine

from llmctl.data.builtin import python_docs

PEER = """
import sys, time
import numpy as np
from datasets import load_dataset
from transformers import AutoTokenizer

if __name__ == "__main__":
    data, folder, out = sys.argv[1:]
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = load_dataset("json", data_files=data, split="train")

    def encode(batch):
        ids = tokenizer(batch["text"]).input_ids
        return {"ids": [row + [tokenizer.eos_token_id] for row in ids]}

    rows = rows.map(encode, batched=True, num_proc=2, remove_columns=["text"])
    with open(out, "wb") as file:
        for batch in rows.with_format("arrow").iter(1000):
            ids = batch["ids"].combine_chunks().flatten().to_numpy()
            file.write(ids.astype("<u2").tobytes())
    print(time.perf_counter() - started)
"""
OURS = """
import sys, time
from pathlib import Path
from llmctl.config.sections import Corpus
from llmctl.data.corpus import open_corpus
from llmctl.data.tokenizer.load import load_vocabulary

data, folder, out = sys.argv[1:]
started = time.perf_counter()
vocabulary, _ = load_vocabulary(folder)
with open_corpus(Corpus(data=[data])) as corpus:
    corpus.write(Path(out), vocabulary)
print(time.perf_counter() - started)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a text file to cut documents from")
    parser.add_argument("--megabytes", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    text = options.data.read_text() if options.data else own_text()
    text = text[: int(options.megabytes * 1e6)]
    versions = machine("tokenizers", "fastokens", "datasets")
    size = len(text.encode()) / 1e6
    print(f"{versions}; {size:.1f} MB, medians of {options.rounds}, alternating\n")
    print("| documents | datasets.map (2 processes) | llmctl tokenize | ratio | inside | ratio |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for size in (100, 2000):
            print(row(text, size, options.rounds, Path(scratch)), flush=True)


def own_text() -> str:
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = (p.read_text("utf-8", "replace") for p in sorted(root.glob("*.py")))
    inner = (p.read_text("utf-8", "replace") for p in sorted(root.glob("[a-o]*/*.py")))
    return "\n".join([*python_docs(), *sources, *inner])


def row(text: str, size: int, rounds: int, scratch: Path) -> str:
    """One line of the table: MB/s of both sides on documents of one size."""
    data, tokenizer = scratch / f"{size}.jsonl", scratch / "tokenizer"
    documents = [text[i : i + size] for i in range(0, len(text), size)]
    data.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    if not tokenizer.exists():
        llmctl("tokenize", "--data", data, "--vocab-size", 8192, "-o", scratch / "trained", "-q")
        (scratch / "trained" / "tokenizer").rename(tokenizer)
    peer, ours, peer_inside, ours_inside = [], [], [], []
    for number in range(rounds):
        out = scratch / f"{size}-{number}"
        wall, _ = llmctl("tokenize", "--data", data, "--tokenizer", tokenizer, "-o", out, "-q")
        ours.append(wall)
        wall, inside = script(PEER, scratch, data, tokenizer, f"{out}.bin")
        peer.append(wall)
        peer_inside.append(inside)
        ours_inside.append(script(OURS, scratch, data, tokenizer, f"{out}-inside")[1])
    megabytes = len(text.encode()) / 1e6
    a, b = statistics.median(peer), statistics.median(ours)
    c, d = statistics.median(peer_inside), statistics.median(ours_inside)
    return (
        f"| {len(documents):,} of {size:,} characters | {a:.2f} s, {megabytes / a:.2f} MB/s | "
        f"{b:.2f} s, {megabytes / b:.2f} MB/s | {a / b:.1f} x | "
        f"{megabytes / c:.2f} and {megabytes / d:.2f} MB/s | {c / d:.1f} x |"
    )


def llmctl(*arguments: object) -> tuple[float, str]:
    return timed([sys.executable, "-m", "llmctl", *map(str, arguments)])


def script(code: str, scratch: Path, *arguments: object) -> tuple[float, float]:
    """Wall time of a fresh process, and the time that it measured itself."""
    file = scratch / "side.py"
    file.write_text(code)
    wall, printed = timed([sys.executable, str(file), *map(str, arguments)])
    return wall, float(printed.splitlines()[-1])


def timed(command: list[str]) -> tuple[float, str]:
    with tempfile.TemporaryDirectory() as cache:
        environment = {**ENVIRONMENT, "HF_DATASETS_CACHE": cache}
        started = time.perf_counter()
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        wall = time.perf_counter() - started
    if ran.returncode:
        raise SystemExit(ran.stderr)
    return wall, ran.stdout


if __name__ == "__main__":
    main()
