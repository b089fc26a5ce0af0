"""What checkpoints cost: `llmctl pretrain` that saves at its default interval against one that
saves once at the end, on the same model, batch and steps.

    python benchmarks/save_overhead.py

Seconds a step over the whole of training, saves included; both sides in this process, in turn.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from common import alternate, machine, ratio, show, table

from llmctl import console, hardware
from llmctl.commands import pretrain, tokenize
from llmctl.config.commands.pretrain import PretrainConfig
from llmctl.config.commands.tokenize import TokenizeConfig

SHAPE: dict[str, Any] = {  # 10M parameters
    **{"layers": 6, "hidden": 384, "heads": 6},
    **{"batch_size": 8, "context": 128, "precision": "fp32"},
}


def per_step(config: PretrainConfig) -> float:
    """Seconds a step, from the first line of metrics to the last, saves included."""
    pretrain.run(config)
    assert config.out is not None
    rows = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    return float((rows[-1]["time"] - rows[0]["time"]) / (rows[-1]["step"] - rows[0]["step"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    console.set_up(quiet=True)
    hardware.set_threads(None)
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        tokens = folder / "tokens"
        tokenize.run(TokenizeConfig(data=["builtin:python-docs"], algorithm="byte", out=tokens))

        def run(out: str, save_every: int | None) -> float:
            return per_step(
                PretrainConfig(
                    tokens=str(tokens),
                    out=folder / out,
                    overwrite=True,
                    max_steps=options.steps,
                    eval_every=options.steps,
                    eval_tokens=1024,
                    log_every=1,
                    save_every=save_every,
                    **SHAPE,
                )
            )

        sides = {
            "without": lambda: run("without", options.steps),
            "with": lambda: run("with", None),
        }
        alternate(sides, 1)
        started = time.perf_counter()
        found = alternate(sides, options.rounds)
        size = sum(
            path.stat().st_size
            for path in (folder / "with" / "checkpoints").glob(f"checkpoint-{options.steps}/*")
        )
    print(
        f"{machine()}; {options.rounds} rounds of {options.steps} steps after one warm-up, "
        f"alternating, medians; {size / 1e6:.0f} MB a checkpoint, "
        f"{time.perf_counter() - started:.0f} s in all\n"
    )
    header = ["saves", "seconds a step", "ratio"]
    rows = [
        ["at the end only", show(found["without"], 4), ""],
        [
            f"every {options.steps // 10} steps",
            show(found["with"], 4),
            f"{ratio(found['with'], found['without']):.3f}",
        ],
    ]
    print(table(header, rows))


if __name__ == "__main__":
    main()
