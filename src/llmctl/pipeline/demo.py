"""`llmctl demo`: a small model's whole life, on what is built in. Its recipe is demo.yaml."""

from pathlib import Path
from typing import Any

from llmctl.config.commands.demo import DemoConfig
from llmctl.console import log
from llmctl.pipeline.run import run_life_cycle
from llmctl.pipeline.steps import load

RECIPE = Path(__file__).with_name("demo.yaml")


def run(config: DemoConfig) -> dict[str, Any] | None:
    """Run the recipe, then suggest what to try next."""
    result = run_life_cycle(load(RECIPE), config, "demo")
    if result is not None:
        outs = {stage["name"]: stage["out"] for stage in result["stages"]}
        log.info(
            "report: %s\ntry next:\n  llmctl chat --model %s\n  llmctl runs %s",
            *(result["report"], outs["ppo"], result["out"]),
        )
    return result
