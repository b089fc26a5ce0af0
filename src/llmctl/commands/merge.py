"""`llmctl merge`: an adapter and its base in, a plain model out."""

from typing import Any

from llmctl import hardware
from llmctl.config.commands.merge import MergeConfig
from llmctl.console import log, show_recipe
from llmctl.files import sha256_folder
from llmctl.models.adapters import weights_sha256
from llmctl.models.hub import model_input
from llmctl.models.merging import find_mergeable, merge, save_merged
from llmctl.runs.directory import open_run


def run(config: MergeConfig) -> dict[str, Any] | None:
    """Merge, compare, write; None after a dry run."""
    threads = hardware.set_threads(config.threads)
    device = hardware.pick_device(config.device)
    mergeable = find_mergeable(config.model, config.base)
    if config.dry_run:
        log.info("would merge %s into %s, on %s", mergeable.adapter.folder, mergeable.base, device)
        return show_recipe("merge", config)
    with open_run("merge", config) as run:
        adapter, base = mergeable.adapter, mergeable.base
        inputs = [
            model_input("adapter", config.model, sha256_folder(adapter.folder)),
            model_input("base", config.base or adapter.base, weights_sha256(base)),
        ]
        run.record(threads=threads, inputs=inputs)
        with hardware.memory_errors():
            merged = merge(mergeable, device)
        save_merged(merged, run.path / "model")
        log.info("logits differ from the adapter's by at most %.2g", merged.difference)
        if merged.quantized_difference is not None:
            log.info(
                "the base is dequantized from %s, in which the adapter was trained; logits differ "
                "from the adapter's on those by at most %.2g",
                *(merged.trained_in.replace("bit", " bits"), merged.quantized_difference),
            )
        result = {
            "stage": "merge",
            "out": str(run.path),
            "model": str(run.path / "model"),
            "status": "completed",
            **merged.as_result(),
        }
        run.record(result=result)
    return result
