"""`llmctl quantize`: a model in, a smaller one and a report on what it lost out."""

from typing import Any

from llmctl import hardware
from llmctl.config.commands.quantize import QuantizeConfig
from llmctl.console import show_recipe
from llmctl.quantize.convert import convert_to_folder, convert_to_gguf
from llmctl.quantize.job import announce, prepare
from llmctl.quantize.methods import check_method
from llmctl.runs.directory import open_run


def run(config: QuantizeConfig) -> dict[str, Any] | None:
    """Quantize, compare, write where the gate holds; None after a dry run."""
    threads = hardware.set_threads(config.threads)
    device = hardware.pick_device(config.device)
    check_method(config, device)
    job = prepare(config, device)
    if config.dry_run:
        announce(job, config)
        return show_recipe("quantize", config)
    with open_run("quantize", config) as run:
        run.record(threads=threads, device=hardware.device_name(device), inputs=job.inputs())
        with hardware.memory_errors():
            if config.gguf is None:
                model = run.path / "model"
                report = convert_to_folder(job, config, model)
            else:
                report, model = convert_to_gguf(job, config, run.path / "gguf")
        report.show()
        result = {
            "stage": "quantize",
            "out": str(run.path),
            "model": str(model),
            "status": "completed",
            **report.as_dict(),
        }
        run.record(result=result)
    return result
