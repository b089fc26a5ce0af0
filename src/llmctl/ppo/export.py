"""What a PPO run leaves: the policy as a plain model or adapter, and the value model beside it."""

from typing import Any

from llmctl.adapters import save_adapter
from llmctl.config.stages import PpoConfig
from llmctl.console import log
from llmctl.files import writing
from llmctl.merging import find_mergeable, merge, save_merged
from llmctl.models import save_model, write_folder
from llmctl.ppo.setup import Setup
from llmctl.ppo.trainer import PpoTrainer
from llmctl.training.export import put_best
from llmctl.training.guard import together


def export(config: PpoConfig, trainer: PpoTrainer, setup: Setup) -> dict[str, Any]:
    """Write the weights that did best on the held-out prompts, the last where there are none.

    Raises:
        ModelError: an adapter and its merged model do not agree.
        ResourceError: the disk is full.
    """
    job, run = trainer.job, trainer.job.run
    with together(job.accelerator), writing(run.path):
        put_best(job, trainer.actors)
        if job.rank != 0:
            return {}
        policy, value_model = trainer.actors.policy, setup.models.value_model
        if not config.has_adapter:
            write_folder(
                value_model, value_model.state_dict(), setup.tokenizer, run.path / "value_model"
            )
            save_model(policy, policy.state_dict(), setup.tokenizer, run.path / "model")
            return {"model": str(run.path / "model")}
        for model, name in ((value_model, "value_model"), (policy, "adapter")):
            save_adapter(
                model,
                setup.tokenizer,
                run.path / name,
                base=config.model,
                base_sha256=setup.base_sha256,
                generation_config=policy.generation_config if name == "adapter" else None,
            )
        value_model.config.save_pretrained(run.path / "value_model")
        folder = run.path / "adapter"
        if not config.merge:
            return {"model": str(folder)}
        merged = merge(find_mergeable(str(folder)), job.device)
        save_merged(merged, run.path / "model")
        log.info("merged: logits differ from the adapter's by at most %.2g", merged.difference)
        facts = {f"merge_{name}": value for name, value in merged.facts().items()}
        return {"model": str(run.path / "model"), "adapter": str(folder), **facts}
