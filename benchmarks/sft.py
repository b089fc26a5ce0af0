"""Fine-tuning against `trl sft`: whole wall time, the step alone, peak memory.

    python sft.py MODEL DATA.jsonl [--rounds 3] [--steps 200] [--lora] [--packing]

MODEL is a folder with a chat template; DATA has `messages`. Both sides get the same model,
examples, batch, number of steps, precision, LoRA settings and threads, and neither recomputes
activations. The step alone is what a longer run takes more than a shorter one, start-up and imports
left out.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from common import alternate, machine, measured, ratio, show, table

BATCH, LENGTH = 8, 256


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--short", type=int, default=20, help="steps of the shorter run")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--chunked-loss", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(arguments.data, Path(folder))
        measure(arguments, prepared, Path(folder))


def prepare(data: Path, folder: Path) -> Path:
    """The examples as both sides read them: TRL learns from answers only if they stand apart."""
    rows = [json.loads(line)["messages"] for line in data.read_text().splitlines()]
    target = folder / "examples"
    target.mkdir()
    with (target / "train.jsonl").open("w") as file:
        for row in rows:
            print(json.dumps({"prompt": row[:-1], "completion": row[-1:]}), file=file)
    return target


def measure(arguments: argparse.Namespace, examples: Path, folder: Path) -> None:
    """Alternate the sides, long and short."""
    sides = {"trl": trl, "llmctl": llmctl}
    memory: dict[str, list[float]] = {name: [] for name in sides}

    def run(name: str, steps: int) -> float:
        ran = measured(sides[name](arguments, examples, folder, steps), arguments.threads)
        memory[name].append(ran.peak)
        return ran.seconds

    found = alternate(
        {
            f"{name} {steps}": lambda name=name, steps=steps: run(name, steps)
            for steps in (arguments.steps, arguments.short)
            for name in sides
        },
        arguments.rounds,
    )
    long = {name: found[f"{name} {arguments.steps}"] for name in sides}
    brief = {name: found[f"{name} {arguments.short}"] for name in sides}
    apart = arguments.steps - arguments.short
    step = {
        name: [1000 * (a - b) / apart for a, b in zip(long[name], brief[name], strict=True)]
        for name in sides
    }
    print(machine("torch", "transformers", "trl"))
    print(vars(arguments))
    print(
        table(
            ["", "trl", "llmctl", "trl / llmctl"],
            [
                [
                    f"whole run of {arguments.steps} steps, s",
                    *map(show, long.values()),
                    f"{ratio(long['trl'], long['llmctl']):.2f}",
                ],
                [
                    "a step, ms",
                    *map(show, step.values()),
                    f"{ratio(step['trl'], step['llmctl']):.2f}",
                ],
                [
                    "peak memory, MB",
                    *(show(memory[name], 0) for name in sides),
                    f"{ratio(memory['trl'], memory['llmctl']):.2f}",
                ],
            ],
        )
    )


def trl(arguments: argparse.Namespace, examples: Path, folder: Path, steps: int) -> list[str]:
    """The command of TRL."""
    command = [
        *(str(Path(sys.executable).with_name("trl")), "sft"),
        *("--model_name_or_path", str(arguments.model), "--dataset_name", str(examples)),
        *("--output_dir", str(folder / f"trl-{time.monotonic_ns()}"), "--max_steps", str(steps)),
        *("--per_device_train_batch_size", str(BATCH), "--max_length", str(LENGTH)),
        *("--learning_rate", "1e-3", "--lr_scheduler_type", "cosine", "--warmup_steps", "10"),
        *("--bf16", str(arguments.precision == "bf16"), "--use_cpu", "True"),
        *("--gradient_checkpointing", "False", "--save_strategy", "no", "--report_to", "none"),
        *("--eval_strategy", "no", "--packing", str(arguments.packing), "--dtype", "float32"),
        *("--completion_only_loss", "True"),
    ]
    if arguments.lora:
        command += ["--use_peft", "--lora_r", "16", "--lora_alpha", "32", "--lora_dropout", "0"]
        command += ["--lora_target_modules", "all-linear"]
    return command


def llmctl(arguments: argparse.Namespace, examples: Path, folder: Path, steps: int) -> list[str]:
    """The command of llmctl; it saves once, at the end, as TRL does."""
    command = [
        *(str(Path(sys.executable).with_name("llmctl")), "sft"),
        *("--model", str(arguments.model), "--data", str(examples / "train.jsonl")),
        *("-o", str(folder / f"llmctl-{time.monotonic_ns()}"), "--max-steps", str(steps)),
        *("--batch-size", str(BATCH), "--max-length", str(LENGTH), "--truncation", "cut"),
        *("--lr", "1e-3", "--warmup", "10", "--precision", arguments.precision),
        *("--device", "cpu", "--threads", str(arguments.threads)),
        *("--save-every", str(steps), "--val-size", "0"),
    ]
    command += ["--lora", "--lora-r", "16"] if arguments.lora else []
    command += ["--packing"] if arguments.packing else []
    return command + (["--chunked-loss"] if arguments.chunked_loss else [])


if __name__ == "__main__":
    main()
