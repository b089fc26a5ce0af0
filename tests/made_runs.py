"""Run directories as llmctl leaves them, made by hand: any stage, any state, in no time."""

import json
import math
from pathlib import Path
from typing import Any

from tests.run_files import write_rows

VERSIONS = {"llmctl": "0.1.0", "python": "3.11.7", "torch": "2.13.0"}


def make_run(
    path: Path,
    stage: str,
    *,
    state: str = "completed",
    minute: int = 0,
    recipe: dict[str, Any] | None = None,
    metrics: list[Any] = (),
    samples: list[dict[str, Any]] = (),
    status: dict[str, Any] | None = None,
    **facts: Any,
) -> Path:
    path.mkdir(parents=True)
    manifest = {
        "run_id": path.name,
        "stage": stage,
        "command": ["llmctl", stage, "-o", str(path)],
        "versions": VERSIONS,
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "seed": 7,
        "threads": 2,
        "world_size": 1,
        "inputs": [],
        "outputs": [],
        "started": f"2026-01-31T12:{minute:02d}:00+0000",
        "finished": f"2026-01-31T12:{minute:02d}:30+0000",
        "energy": {"kwh": 0.0012, "seconds": 31.0, "method": "CPU assumed to draw 12 W"},
        **facts,
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    said = {"state": state, "updated": manifest["finished"], "exit_code": 0, **(status or {})}
    (path / "status.json").write_text(json.dumps(said))
    rows = [row if isinstance(row, str) else json.dumps(row) for row in metrics]
    (path / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows))
    write_rows(path / "samples.jsonl", samples)
    values = {"stage": stage, **(recipe or {})}
    (path / "recipe.yaml").write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in values.items()))
    return path


def checkpoint_content(step: int, shape: tuple[int, int], best: int | None = None):
    """What a checkpoint holds of a model of one weight; the step decides the numbers."""
    import torch

    from llmctl.runs.checkpoint import CheckpointContent

    torch.manual_seed(step)
    return CheckpointContent(
        step=step,
        model={"weight": torch.randn(*shape)},
        optimizer={"state.weight.exp_avg": torch.randn(*shape)},
        rng={"cpu": torch.get_rng_state()},
        state={"progressed": {"step": step}},
        best=best,
    )


def curve(steps: int, *, start: float = 5.0, val_every: int = 10) -> list[dict[str, Any]]:
    """Metrics of a run that learns."""
    rows = []
    for step in range(1, steps + 1):
        loss = start * math.exp(-step / steps) + 0.1 * math.sin(step)
        rows.append({"step": step, "time": step / 10, "tokens": step * 64, "loss": loss,
                     "lr": 1e-3 * step / steps, "grad_norm": 1.0, "tokens_per_second": 640.0,
                     "mfu": None, "memory_bytes": 10**8})  # fmt: skip
        if step % val_every == 0:
            rows.append({"step": step, "val_loss": loss + 0.2, "val_bits_per_byte": loss / 2})
    return rows


def ppo_rows(steps: int) -> list[dict[str, Any]]:
    rows = []
    for step in range(1, steps + 1):
        rows.append({"step": step, "loss": 1 / step, "score": step / 10, "score/helpful": step / 9,
                     "score/length": -step / 20, "kl": step / 30, "entropy": 2.0, "length": 20.0,
                     "eos_share": 0.9, "clip_fraction": 0.1, "explained_variance": 0.5,
                     "lr": 1e-5, "alarms": ["KL explodes"] if step == 3 else []})  # fmt: skip
        rows.append({"step": step, "val_loss": -step / 11, "val_score": step / 11,
                     "val_kl": step / 25, "val_win_rate": 0.8, "val_win_rate_low": 0.6,
                     "val_win_rate_high": 0.92, "val_length": 21.0})  # fmt: skip
    return rows


def calibration() -> dict[str, Any]:
    """The report of a reward model."""
    side = {"mean": 1.0, "std": 0.5, "q5": 0.1, "q25": 0.6, "q50": 1.0, "q75": 1.4, "q95": 2.0}
    bins = [
        {"from": 0.5, "to": 0.75, "confidence": 0.6, "accuracy": 0.65, "weight": 30.0},
        {"from": 0.75, "to": 1.0, "confidence": 0.9, "accuracy": 0.85, "weight": 70.0},
    ]
    rejected = {k: v - 2 for k, v in side.items()}
    return {"reliability": bins, "calibration_error": 0.05, "chosen": side, "rejected": rejected}


def make_life(folder: Path) -> Path:
    """A folder of runs that fed each other, with what lies beside them."""
    role = {"sha256": "ab" * 32}
    tok = make_run(
        folder / "tok",
        "tokenize",
        metrics=[{"documents": 40, "tokens": 123_456, "vocab_size": 512, "bytes_per_token": 3.2}],
        inputs=[{"role": "data", "path": "corpus.txt", **role}],
        recipe={"data": ["corpus.txt"], "vocab_size": 512},
    )
    base = make_run(
        folder / "base",
        "pretrain",
        minute=1,
        metrics=curve(120),
        plan={"max_steps": 120, "lr": 1e-3},
        recipe={"tokens": str(tok), "max_steps": 120},
        inputs=[{"role": "tokens", "path": str(tok), **role}],
        result={"step": 120, "val_loss": 2.03, "best_step": 120, "parameters": 1_016_960},
    )
    audit = {"rows": 100, "tokens": 3000, "val": {"rows": 10, "tokens": 300}, "findings": [
        {"level": "warning", "message": "rows cut: 4", "hint": "raise --max-length", "file": None}
    ]}  # fmt: skip
    sft = make_run(
        folder / "sft",
        "sft",
        minute=2,
        metrics=curve(60),
        samples=[
            {"step": step, "prompt": f"Question {n}?", "response": said, "finish_reason": "eos"}
            for step, said in ((10, "mumble"), (60, "An answer."))
            for n in (1, 2)
        ],
        recipe={"model": str(base), "data": ["builtin:tasks"], "max_steps": 60, "lora": True},
        inputs=[
            {"role": "model", "path": str(base), **role},
            {"role": "data", "path": "builtin:tasks", **role},
        ],
        audit=audit,
        result={"step": 60, "val_loss": 2.1, "best_step": 60, "val_token_accuracy": 0.512},
    )
    reward = make_run(
        folder / "reward",
        "reward",
        minute=3,
        metrics=curve(40),
        inputs=[{"role": "model", "path": str(sft), **role}],
        report=calibration(),
        result={"val_accuracy": 0.91, "val_accuracy_interval": [0.86, 0.95]},
    )
    make_run(
        folder / "ppo",
        "ppo",
        minute=4,
        metrics=ppo_rows(30),
        samples=[
            {
                "step": 30,
                "prompt": "Say hi.",
                "before": "no",
                "now": "Hi, please.",
                "score_before": -1.5,
                "score": 2.25,
            }
        ],
        inputs=[
            {"role": "model", "path": str(sft), **role},
            {"role": "reward_model", "path": str(reward), **role},
        ],
        result={
            "val_win_rate": 0.8,
            "val_win_rate_low": 0.6,
            "val_win_rate_high": 0.92,
            "val_score": 2.7,
            "best_step": 30,
        },
    )
    row = {"prompt": "Once", "response": "upon a time", "finish_reason": "length", "seed": 0}
    (folder / "texts.jsonl").write_text(json.dumps(row) + "\n")
    gates = [
        {"figure": "val_win_rate", "sign": ">=", "bound": 0.75, "value": 0.8, "holds": True},
        {"figure": "val_kl", "sign": "<=", "bound": 1, "value": 1.2, "holds": False},
    ]
    (folder / "pipeline.json").write_text(json.dumps({"stages": [{"name": "ppo", "gates": gates}]}))
    return folder
