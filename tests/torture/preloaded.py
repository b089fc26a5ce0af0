"""What the fork server does once, so that no trial has to."""

import gc
from importlib import import_module

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

STAGES = ("dpo", "ppo", "pretrain", "reward", "sft")

for module in (
    "tests.torture.plants",
    "llmctl.options",
    *(f"llmctl.commands.{name}" for name in STAGES),
):
    import_module(module)
get_checkpoint_conversion_mapping("llama")  # compiles a thousand patterns
gc.collect()
gc.freeze()  # else each trial's collector looks through, and copies, all of this
