"""Frame of the commands that train, from threads to the run's result."""

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from llmctl import hardware
from llmctl.config.commands.ppo import PpoConfig
from llmctl.config.commands.pretrain import PretrainConfig
from llmctl.config.finetuning import Tuning
from llmctl.runs.directory import Run
from llmctl.runs.resume import earlier_manifest
from llmctl.training.consistency import require_same, settings_of
from llmctl.training.distributed import lost_peers_named, make_accelerator, require_in_force
from llmctl.training.fault_tolerance import open_together, together


def run_stage(
    stage: str,
    config: PretrainConfig | Tuning | PpoConfig,
    dry_run: Callable[[Accelerator, str], dict[str, Any] | None],
    train: Callable[[Run, Accelerator, str], dict[str, Any]],
) -> dict[str, Any] | None:
    """Train in a run's directory and return the result; or check only, and show what would be done.

    `dry_run` checks all that can be checked without training, and shows it; `train` trains and
    exports. Both are given the processes and the type of device.
    """
    threads = hardware.set_threads(config.threads or earlier_manifest(config).get("threads"))
    accelerator, device = make_accelerator(config)
    with lost_peers_named(config.peer_timeout):
        require_same(accelerator, settings_of(stage, config))
        with together(accelerator):
            require_in_force(config, accelerator)
        if config.dry_run:
            with together(accelerator):
                return dry_run(accelerator, device)
        with open_together(accelerator, stage, config) as run:
            run.record(threads=threads)
            result: dict[str, Any] = {"stage": stage, "out": str(run.path), "status": "completed"}
            result |= train(run, accelerator, device)
            run.record(result=result)
    return result


def clock_of(config: Tuning | PpoConfig, run: Run) -> str:
    """When the run began, as all processes and resumptions of it know it. Collective.

    A chat template may write the date.
    """
    began = earlier_manifest(config).get("clock") or run.manifest.get("started")
    (clock,) = broadcast_object_list([began])
    run.record(clock=clock)
    return str(clock)
