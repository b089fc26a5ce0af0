"""From the command to its first result, against `import torch` alone, in turn; the best of each.

python startup.py MODEL TEXT [--rounds 10] [--only generate,sft]

MODEL is a small model, such as stories260K; TEXT a text file of some kilobytes. generate and chat
are timed to the first character on stdout, what trains to its first line of metrics, evaluate and
quantize to the end.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import ENVIRONMENT, machine, table, timed

LLMCTL = (sys.executable, "-m", "llmctl")
LIMITS = {
    "generate": (1.5, 0.5),
    "chat": (1.5, 0.5),
    "pretrain": (2.0, 0.5),
    "sft": (3.0, 0.0),
    "evaluate": (3.0, 0.0),
    "quantize": (3.0, 0.0),
}
"""What each may take: so many times `import torch`, and so many seconds more."""


def to_first_output(*arguments: str, say: str | None = None) -> float:
    """Seconds until a command writes its first character."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [*LLMCTL, *arguments],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    if say is not None:
        process.stdin.write(say.encode())
    process.stdin.close()
    first = process.stdout.read(1)
    taken = time.perf_counter() - started
    process.stdout.read()
    if process.wait() or not first:
        raise SystemExit(f"{arguments} failed")
    return taken


def to_first_step(folder: Path, *arguments: str) -> float:
    """Seconds until a run has written its first line of metrics."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    steps = ("--max-steps", "3", "--log-every", "1", "--samples", "0", "--quiet")
    started = time.perf_counter()
    process = subprocess.Popen(
        [*LLMCTL, *arguments, *steps, "-o", str(out)],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
    )
    file = out / "metrics.jsonl"
    while not (file.is_file() and file.stat().st_size):
        time.sleep(0.01)
        if process.poll() is not None:
            break
    taken = time.perf_counter() - started
    if process.wait():
        raise SystemExit(f"{arguments} failed")
    return taken


def sides_of(model: str, text: str, folder: Path) -> dict[str, Callable[[], float]]:
    """What is timed, by name."""
    tokens, rows = folder / "tokens", folder / "rows.jsonl"
    timed([*LLMCTL, "tokenize", "--tokenizer", model, "--data", text, "-o", tokens])
    asked = ({"prompt": f"Say {n}.", "response": f"{n}, as you wish."} for n in range(100))
    rows.write_text("".join(json.dumps(row) + "\n" for row in asked))
    tuned = ("sft", "--model", model, "--data", rows, "--max-steps", "1", "--samples", "0")
    timed([*LLMCTL, *tuned, "-o", folder / "chatty"])  # gives the model a chat template

    def to_end(*arguments: str) -> float:
        shutil.rmtree(folder / "run", ignore_errors=True)
        return timed([*LLMCTL, *arguments])[0]

    new = ("--max-new-tokens", "1")
    return {
        "import torch": lambda: timed([sys.executable, "-c", "import torch"])[0],
        "generate": lambda: to_first_output(
            "generate", "--model", model, "--prompt", "Once upon a time", *new
        ),
        "chat": lambda: to_first_output(
            "chat", "--model", str(folder / "chatty"), *new, say="Hello\n"
        ),
        "pretrain": lambda: to_first_step(
            *(folder, "pretrain", "--tokens", str(tokens), "--config-from", model),
            *("--context", "64", "--batch-size", "8"),
        ),
        "sft": lambda: to_first_step(folder, "sft", "--model", model, "--data", str(rows)),
        "evaluate": lambda: to_end("evaluate", "--model", model, "--data", text, "--limit", "1"),
        "quantize": lambda: to_end(
            *("quantize", "--model", model, "--bits", "8", "--data", text),
            *("--sample-tokens", "1", "--eval-tokens", "512", "-o", str(folder / "run")),
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", default=",".join(LIMITS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        sides = sides_of(options.model, options.text, Path(name))
        chosen = ["import torch", *options.only.split(",")]
        best = dict.fromkeys(chosen, float("inf"))
        for _ in range(options.rounds):
            for side in chosen:
                best[side] = min(best[side], sides[side]())
    torch = best.pop("import torch")
    rows = []
    for side, taken in best.items():
        times, more = LIMITS[side]
        limit = times * torch + more
        rows.append([f"`{side}`", f"{taken:.2f}", f"{taken / torch:.2f}", f"{limit:.2f}"])
    print(f"{machine()}; best of {options.rounds}, in turn; import torch {torch:.2f} s\n")
    print(table(["command", "s", "times import torch", "at most, s"], rows))


if __name__ == "__main__":
    main()
