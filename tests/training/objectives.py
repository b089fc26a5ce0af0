"""Every objective that the loop trains, as a command on tiny inputs; and what compares runs."""

import importlib.util
import multiprocessing
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import free_port
from tests.run_files import metrics

CURVES = Path(__file__).parents[1] / "fixtures" / "curves"
CLOCKED = ("time", "tokens_per_second", "mfu", "memory_bytes")
"""Metrics that a clock or the machine decides."""
LIMIT = 120
"""Seconds that processes may take."""


def _load_recorder() -> Any:
    """`tests/fixtures/curves/record.py` as a module: it makes models and data."""
    spec = importlib.util.spec_from_file_location("curves_record", CURVES / "record.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


RECORDER = _load_recorder()


@dataclass(frozen=True)
class Objective:
    """A training method, as a command and its flags; paths are below the folder of the inputs."""

    name: str
    command: str
    data: tuple[str, str]
    """The flag that takes the data, and what it takes."""
    flags: tuple[str, ...] = ()
    model: str = "llama"

    def arguments(self, inputs: Path, out: Path, *more: object) -> list[str]:
        """The whole command line of a run to `out`; later flags win."""
        own = ("--samples", "0") if self.name not in ("classify", "reward") else ()
        held_out = () if self.command == "pretrain" else ("--val-size", "6")
        return [
            *(self.command, "--model", str(inputs / self.model)),
            *(self.data[0], str(inputs / self.data[1])),
            *(*COMMON, *own, *held_out, *self.flags, "-o", str(out)),
            *map(str, more),
        ]

    def __str__(self) -> str:
        """Return the name, as the id of a test."""
        return self.name


COMMON = (
    *("--batch-size", "8", "--max-steps", "4", "--log-every", "1", "--lr", "2e-3"),
    *("--eval-every", "2", "--save-every", "2", "--warmup", "2", "--schedule", "linear"),
    *("--seed", "3", "--device", "cpu", "--threads", "1", "--precision", "fp32"),
)
CHATS, RANKED = (("--data", f"{name}.jsonl") for name in ("chats", "ranked"))
LORA = ("--lora", "--lora-r", "4", "--lr", "1e-2")
PRETRAIN = Objective(
    "pretrain", "pretrain", ("--tokens", "tokens"), ("--context", "16", "--optimizer", "adamw")
)
SFT = Objective("sft", "sft", CHATS)
OBJECTIVES = (
    PRETRAIN,
    SFT,
    Objective("sft-packed", "sft", CHATS, ("--packing", "--max-length", "96")),
    Objective("sft-lora", "sft", CHATS, LORA),
    Objective("classify", "sft", ("--data", "texts.jsonl"), ("--task", "classify")),
    Objective("reward", "reward", RANKED, ("--center-rewards", "0.1")),
    Objective("dpo", "dpo", RANKED, ("--beta", "0.5")),
    Objective("dpo-lora", "dpo", RANKED, (*LORA, "--beta", "0.5")),
)
every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=str)


def ranked(count: int = 30) -> list[dict[str, Any]]:
    """Requests with two or three answers by rank: three are three pairs of a third each."""
    draw, rows = random.Random("ranked"), []
    for number in range(count):
        who, what = draw.choice(RECORDER.WHO), draw.choice(RECORDER.WHAT)
        answers = [
            f"yes , here it is : the {what} of the {who} ." + " thank you ." * draw.randint(0, 3),
            f"the {what} ." + " yes ." * draw.randint(0, 5),
            f"no . go away , {who} ." + " no ." * draw.randint(0, 6),
        ]
        ranks = [1, 2, 3] if number % 3 else [1, 2]
        prompt = f"please write the word of the {what} and the {who}" + " ." * (number % 9)
        rows.append({"prompt": prompt, "responses": answers[: len(ranks)], "ranks": ranks})
    return rows


def documents(count: int = 60) -> list[dict[str, Any]]:
    """Texts of many lengths."""
    draw, rows = random.Random("documents"), []
    words = [*RECORDER.WHO, *RECORDER.WHAT, *RECORDER.VERBS, *RECORDER.COLORS]
    for _ in range(count):
        rows.append({"text": " ".join(draw.choice(words) for _ in range(draw.randint(8, 60)))})
    return rows


@dataclass
class Whole:
    """A run that nothing disturbed."""

    out: Path
    gradients: list[torch.Tensor] = field(default_factory=list)
    """Of the first step."""

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Its metrics."""
        return lines_of(self.out)


def keep_gradients(patch: pytest.MonkeyPatch, kept: list[torch.Tensor]) -> None:
    """Put a run's gradients of the first step, before they are clipped, into a list."""
    from llmctl.training import loop

    update = loop.update

    def watched(state, optimizers, weights, *rest, **options):
        weights = list(weights)
        if not kept:
            kept.extend(weight.grad.clone() for weight in weights if weight.grad is not None)
        return update(state, optimizers, weights, *rest, **options)

    patch.setattr(loop, "update", watched)


def lines_of(run: Path) -> list[dict[str, Any]]:
    """Metrics of a run without those that a clock decides."""
    return [{k: v for k, v in line.items() if k not in CLOCKED} for line in metrics(run)]


def result_of(run: Path) -> Path:
    """The weights that a run left: of its adapter where it trained one."""
    folder = run / "adapter" if (run / "adapter").exists() else run / "model"
    return next(folder.glob("*.safetensors"))


def assert_close_weights(run: Path, wanted: Path) -> None:
    """Compare what two runs left, whose gradients differ by rounding that Adam makes larger."""
    ours, theirs = load_file(result_of(run)), load_file(result_of(wanted))
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)


def assert_same_metrics(
    lines: list[dict[str, Any]], wanted: list[dict[str, Any]], rel: float
) -> None:
    """Compare every figure of every line.

    Before dpo's first step all rewards are rounding, and so is the share of the positive ones.
    """
    assert [line["step"] for line in lines] == [line["step"] for line in wanted]
    for line, expected in zip(lines, wanted, strict=True):
        if line["step"] == 1 and abs(line.get("reward_margin", 1)) < rel:
            line, expected = ({**row, "reward_accuracy": 0} for row in (line, expected))
        assert line == pytest.approx(expected, rel=rel, abs=rel / 10), f"step {line['step']}"


def assert_same_gradients(
    gradients: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], rel: float = 1e-5
) -> None:
    """Compare each tensor by the norm of the difference, relative to its own norm.

    A tensor whose gradient is rounding is compared relative to the norm of all.
    """
    assert len(gradients) == len(wanted) > 0
    total = float(torch.stack([tensor.norm() for tensor in wanted]).norm())
    assert total > 0
    for gradient, expected in zip(gradients, wanted, strict=True):
        difference = float((gradient - expected).norm())
        assert difference <= rel * max(float(expected.norm()), 1e-2 * total)


# --- several processes

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "training.objectives",
        "llmctl.commands.pretrain",
        "llmctl.commands.sft",
        "llmctl.commands.dpo",
    ]
)


def run_ranks(
    target: Callable[..., Any], arguments: Sequence[Any], folder: Path, world: int = 2
) -> list[tuple[int, str]]:
    """Call a function of this many processes that know each other, and wait for all of them.

    Args:
        target: of a module, called with the arguments in every process.
        arguments: for it.
        folder: of what they write.
        world: number of processes.

    Returns:
        Exit code and output of each: the code is what the function returned, if it is a number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes, logs = [], [folder / f"rank-{rank}.log" for rank in range(world)]
    for rank, log in enumerate(logs):
        environment = {
            **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        }
        inside = (target, arguments, {k: str(v) for k, v in environment.items()}, log)
        process = _context.Process(target=_be_a_rank, args=inside)
        process.start()
        processes.append(process)
    for process in processes:
        process.join(LIMIT)
        if process.exitcode is None:
            for other in processes:
                other.kill()
            pytest.fail("still running:\n" + "\n".join(log.read_text() for log in logs))
    codes = [process.exitcode for process in processes]
    return list(zip(codes, [log.read_text() for log in logs], strict=True))


def _be_a_rank(
    target: Callable[..., Any], arguments: Sequence[Any], environment: dict[str, str], log: Path
) -> None:
    import traceback

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    code = 1
    try:
        code = int(target(*arguments) or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
