"""What a PPO run leaves: the policy as a plain model or adapter, and the value model beside it."""

from typing import Any

from llmctl.adapters import save_adapter
from llmctl.config.stages import PpoConfig
from llmctl.files import writing
from llmctl.models import save_model, write_folder
from llmctl.ppo.setup import Setup
from llmctl.ppo.trainer import PpoTrainer
from llmctl.training.export import put_best, write_adapter
from llmctl.training.fault_tolerance import together


def export(config: PpoConfig, trainer: PpoTrainer, setup: Setup) -> dict[str, Any]:
    """Write the weights that did best on the held-out prompts, the last where there are none.

    Raises:
        ModelError: an adapter and its merged model do not agree.
        ResourceError: the disk is full.
    """
    state, run = trainer.state, trainer.state.run
    put_best(state, trainer.actors)
    with together(state.accelerator), writing(run.path):
        if state.rank != 0:
            return {}
        policy, value_model = trainer.actors.policy, setup.models.value_model
        if not config.has_adapter:
            write_folder(
                value_model, value_model.state_dict(), setup.tokenizer, run.path / "value_model"
            )
            save_model(policy, policy.state_dict(), setup.tokenizer, run.path / "model")
            return {"model": str(run.path / "model")}
        save_adapter(
            value_model,
            setup.tokenizer,
            run.path / "value_model",
            base=setup.base.reference,
            base_sha256=setup.base.sha256,
            generation_config=None,
        )
        value_model.config.save_pretrained(run.path / "value_model")
        return write_adapter(policy, None, setup.tokenizer, state, setup.base, merges=config.merge)
