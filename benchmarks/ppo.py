"""PPO against TRL's PPOTrainer: episodes a second, its two phases, peak memory, score reached.

    python ppo.py --peer-python PEER/bin/python --model MODEL --reward-model REWARD [--lora]

PEER is an environment with trl==1.12.0, the last that has PPOTrainer, and otherwise the versions of
constraints.txt. MODEL is a causal model; REWARD a classifier of one label with its tokenizer, or
an adapter of one, from which the value models start as well. Both sides are whole processes with
the same models, prompts, lengths, hyperparameters, optimizer steps, precision and threads;
ppo_trl.py is the peer's. A round has a seed of its own. The first step of each run is left out of
all rates. llmctl saves its result, the peer nothing.

Two endings: `fixed` ignores EOS, so that every response has the same length and both sides do
the same work; `free` ends at EOS. A rollout is generation, log-probabilities, values and scores; an
update the epochs over them. Memory is the peak of the process less that of one that only imports.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import alternate, machine, measured, ratio, show, table

OPENINGS = (
    "Once upon a time, there was a {} named {}.",
    "One day, a {} named {} went to the park.",
    "{1} was a {0} who loved to play outside.",
    "There once lived a {} called {}. Every morning,",
    "In a small house near the forest lived a {} named {}. It was raining, and",
)
HEROES = ("little girl", "little boy", "big dog", "small cat", "happy bird")
NAMES = ("Lily", "Tom", "Sue", "Max", "Mia", "Ben", "Anna", "Tim")
IMPORTS = {
    "trl": "import trl.experimental.ppo.ppo_trainer",
    "llmctl": "import torch, peft, transformers, llmctl.commands.ppo",
}
MODELS = "from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification"
Line = dict[str, Any]


def main() -> None:
    """Measure both endings and print."""
    arguments = parsed()
    print(machine("torch", "transformers", "trl"), "| peer: trl 1.12.0")
    print(vars(arguments))
    with tempfile.TemporaryDirectory() as folder:
        prompts = write_prompts(Path(folder)) if arguments.data is None else arguments.data
        for ending in arguments.endings:
            print(f"\n{ending} length\n")
            print(measure(arguments, ending, prompts.resolve(), Path(folder)), flush=True)


def parsed() -> argparse.Namespace:
    """The sizes and hyperparameters that both sides get."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--reward-model", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="jsonl with `prompt`; by default story openings")
    parser.add_argument("--sides", nargs="+", default=["trl", "llmctl"], choices=list(IMPORTS))
    parser.add_argument("--endings", nargs="+", default=["fixed", "free"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--last", type=int, default=5, help="steps whose mean score counts")
    parser.add_argument("--batch-size", type=int, default=64, help="episodes of a step")
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--ppo-epochs", type=int, default=4)
    parser.add_argument("--length", type=int, default=48, help="most tokens of a response")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--kl-coef", type=float, default=0.05)
    parser.add_argument("--clip", type=float, default=0.2)
    parser.add_argument("--value-clip", type=float, default=0.2)
    parser.add_argument("--value-coef", type=float, default=0.1)
    parser.add_argument("--gamma", type=float, default=1.0)
    parser.add_argument("--lam", type=float, default=0.95)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--lora", action="store_true", help="the policy is LoRA of rank 16")
    parser.add_argument(
        "--value-lora", action="store_true", help="so is the peer's value model, else trained whole"
    )
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def write_prompts(folder: Path) -> Path:
    """200 openings of stories, of different lengths."""
    texts = [o.format(hero, name) for o in OPENINGS for hero in HEROES for name in NAMES]
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return file


def measure(arguments: argparse.Namespace, ending: str, prompts: Path, folder: Path) -> str:
    """Alternate the sides and tell what they did."""
    found: dict[str, list[Line]] = {name: [] for name in arguments.sides}
    threads, imports = arguments.threads, {}
    for name in arguments.sides:
        command = [python(arguments, name), "-c", f"{IMPORTS[name]}\n{MODELS}"]
        imports[name] = measured(command, threads).peak

    def run(name: str) -> float:
        seed = len(found[name])
        out = folder / f"{name}-{ending}-{seed}"
        settings = {**vars(arguments), "prompts": prompts, "seed": seed, "ending": ending}
        command = {"trl": trl, "llmctl": llmctl}[name](settings, out)
        ran = measured(command, threads)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "score" in line and "rollout_seconds" in line]
        figures = summary(steps, arguments.batch_size, arguments.last)
        memory = {"peak": ran.peak, "beyond": ran.peak - imports[name]}
        found[name].append({"whole": ran.seconds, "cpu": ran.cpu_seconds, **memory, **figures})
        print(name, ending, found[name][-1], file=sys.stderr)
        return ran.seconds

    alternate({name: lambda name=name: run(name) for name in arguments.sides}, arguments.rounds)
    return report(found)


def python(arguments: argparse.Namespace, name: str) -> str:
    """The interpreter of a side."""
    return str(arguments.peer_python) if name == "trl" else sys.executable


def summary(steps: list[Line], batch: int, last: int) -> dict[str, float]:
    """What the lines of a run say, rates without its first step."""
    steady = steps[1:]

    def mean(key: str, lines: list[Line]) -> float:
        return statistics.fmean(line[key] for line in lines)

    step = (steps[-1]["time"] - steps[0]["time"]) / len(steady)
    parts = {
        "generate": "generate_seconds",
        "updates": "updates",
        "trained": "trained_parameters",
    }
    return {
        "rate": batch / step,
        "step": step,
        "rollout": mean("rollout_seconds", steady),
        "update": mean("update_seconds", steady),
        "length": mean("length", steady),
        "first": steps[0]["score"],
        "score": mean("score", steps[-last:]),
        "kl": mean("kl", steps[-last:]),
        **{name: mean(key, steady) for name, key in parts.items() if key in steady[0]},
    }


def report(found: dict[str, list[Line]]) -> str:
    """A table of medians, with ranges and with ratios round by round."""
    rows = (
        ("episodes a second", "rate", 2),
        ("a step, s", "step", 3),
        ("rollout, s", "rollout", 3),
        ("update, s", "update", 3),
        ("whole run, s", "whole", 1),
        ("whole run, CPU s", "cpu", 1),
        ("peak memory, MB", "peak", 0),
        ("peak memory beyond imports, MB", "beyond", 0),
        ("tokens of a response", "length", 1),
        ("score of the first step", "first", 3),
        ("score of the last steps", "score", 3),
        ("KL of the last steps", "kl", 2),
    )
    lines = []
    for title, key, digits in rows:
        sides = [[line[key] for line in runs] for runs in found.values()]
        compared = len(sides) == 2 and key not in {"length", "first", "score", "kl"}
        shown = f"{ratio(*sides):.2f}" if compared else ""
        lines.append([title, *(show(side, digits) for side in sides), shown])
    return table(["", *found, " / ".join(found)], lines)


def trl(settings: dict[str, Any], out: Path) -> list[str]:
    """The command of the peer, told all by a file."""
    out.mkdir()
    file = out / "settings.json"
    file.write_text(json.dumps({**settings, "out": out}, default=str))
    script = Path(__file__).with_name("ppo_trl.py")
    return [str(settings["peer_python"]), str(script), str(file)]


def llmctl(settings: dict[str, Any], out: Path) -> list[str]:
    """The command of llmctl, with what TRL does not do turned off."""
    flags = {
        "--model": settings["model"],
        "--reward-model": settings["reward_model"],
        "--value-init": "reward",
        "--score-normalization": "none",
        "--data": settings["prompts"],
        "--val-size": 0,
        "--samples": 0,
        "--batch-size": settings["batch_size"],
        "--rollout-batch-size": settings["batch_size"],
        "--minibatches": settings["minibatches"],
        "--ppo-epochs": settings["ppo_epochs"],
        "--max-steps": settings["steps"],
        "--save-every": settings["steps"],
        "--max-new-tokens": settings["length"],
        "--temperature": settings["temperature"],
        "--kl-coef": settings["kl_coef"],
        "--kl-estimator": "k1",
        "--clip": settings["clip"],
        "--value-clip": settings["value_clip"],
        "--value-coef": settings["value_coef"],
        "--gamma": settings["gamma"],
        "--lam": settings["lam"],
        "--lr": settings["lr"],
        "--schedule": "constant",
        "--warmup": 0,
        "--max-grad-norm": 0,
        "--precision": settings["precision"],
        "--device": "cpu",
        "--threads": settings["threads"],
        "--seed": settings["seed"],
        "-o": out,
    }
    command = [sys.executable, "-m", "llmctl", "ppo", "--plain", "--json"]
    command += [str(part) for pair in flags.items() for part in pair]
    command += ["--ignore-eos"] if settings["ending"] == "fixed" else []
    return command + (["--lora", "--lora-r", "16"] if settings["lora"] else [])


if __name__ == "__main__":
    main()
