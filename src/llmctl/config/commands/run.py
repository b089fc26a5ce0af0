"""Config of `run`."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import model_validator

from llmctl.config.base import Argument, Flag
from llmctl.config.sections import Control, Stages


class RunConfig(Stages):
    """Run a life cycle: the stages of a recipe, each on the results of those before it."""

    recipe_file: Annotated[Path | None, Argument("RECIPE"), Control] = None
    """Recipe of a life cycle, or of one stage."""

    config_file: Annotated[Path | None, Flag("--config", "-c"), Control] = None
    """The recipe, as other commands take theirs."""

    @model_validator(mode="after")
    def _check_recipe(self) -> Self:
        if (self.recipe_file is None) == (self.config_file is None):
            raise ValueError("give one RECIPE: a YAML file with `stages` in it")
        return self

    @property
    def recipe_path(self) -> Path:
        """Where the recipe is, however it was given."""
        path = self.recipe_file or self.config_file
        assert path is not None
        return path
