"""Config of `plan`."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from llmctl.config.base import Also, Argument, Config
from llmctl.config.sections import Control, PositiveCount, Reporting


class PlanConfig(Config, Reporting):
    """Tell what a run takes before it runs: memory, FLOPs, time, tokens, devices."""

    file: Annotated[Path | None, Argument("RECIPE"), Control] = None
    """Recipe of pretrain, sft, reward, dpo or ppo. No weights are loaded and nothing is written."""

    shape: Annotated[str | None, Also("model", "size"), Control] = None
    """Plan for this model, in place of the recipe's or without a recipe: a published one
    (gpt2-124m, llama-2-7b, llama-2-70b, …), a preset of pretrain, a run, folder or Hub id."""

    devices: Annotated[PositiveInt, Also("num-devices", "processes"), Control] = 1
    """Devices to train on."""

    device: Annotated[Literal["auto", "cpu", "cuda"], Control] = "auto"
    """Kind of device. auto: this machine's, or a GPU where its memory or speed is given."""

    device_memory: Annotated[PositiveCount | None, Also("gpu-memory"), Control] = None
    """Memory of each device in bytes, such as 80GB; by default this machine's."""

    tflops: Annotated[PositiveFloat | None, Control] = None
    """Speed that each device reaches in training, in 10^12 FLOP/s; by default 40 % of this GPU's
    peak, and on a CPU not known."""

    tokens_per_second: Annotated[PositiveFloat | None, Control] = None
    """Speed in tokens instead, over all devices."""

    measure: Annotated[bool, Control] = False
    """Measure the speed on this machine: steps of one block of the model."""

    tokens: Annotated[PositiveCount | None, Also("tokens-budget"), Control] = None
    """Tokens to pretrain on, where no data says; by default 20 for each parameter."""

    rows: Annotated[PositiveCount | None, Control] = None
    """Training examples, or prompts, where the data is not read."""

    length: Annotated[PositiveInt | None, Also("context", "max-length"), Control] = None
    """Tokens of a sequence, or of a prompt of ppo; the data is then not read."""

    batch_size: Annotated[PositiveInt | None, Control] = None
    """Sequences of a forward pass on one device, in place of the recipe's."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.file is None and self.shape is None:
            raise ValueError("RECIPE or --shape is required: what is to be planned?")
        self.at_most_one("tflops", "tokens_per_second", "measure")
        if self.rows and self.file is None:
            raise ValueError("--rows goes with a recipe")
        return self
