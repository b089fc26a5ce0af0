"""Configs of the commands around the stages: `run`, `demo`, `runs` and `doctor`."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, PositiveInt, model_validator

from llmctl.config.base import Also, Argument, Config, Flag
from llmctl.config.sections import Control, Output, Reporting


class Stages(Config, Output):
    """Which stages of a life cycle to run, and how."""

    out: Annotated[
        Path | None, Flag("--out", "-o"), Also("output-dir", "out-dir", "output"), Control
    ] = None
    """Directory for the runs of all stages; by default the recipe's `out`, else runs/ and the
    recipe's name."""

    overwrite: Annotated[bool, Control] = False
    """Run every stage anew, also where nothing has changed."""

    dry_run: Annotated[bool, Control] = False
    """Check every stage against the results of those before it, print what would be done, write
    nothing."""

    from_stage: Annotated[str | None, Flag("--from"), Control] = None
    """Begin at this stage: those before it are taken as they are, it and what builds on it run
    anew."""

    only: Annotated[str | None, Control] = None
    """Run this stage alone, on what the others left."""

    seed: Annotated[int | None, Field(ge=0, lt=2**32), Control] = None
    """Seed of every stage, in place of the recipe's."""

    threads: Annotated[PositiveInt | None, Control] = None
    """CPU threads of every stage, in place of the recipe's."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.from_stage and self.only:
            raise ValueError("give --from or --only, not both")
        if self.overwrite and self.only:
            raise ValueError("--overwrite runs every stage anew: use --from, or drop --only")
        return self


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


class DemoConfig(Stages):
    """Take a small model through its whole life, on what is built in."""


class RunsConfig(Config, Reporting):
    """List runs: how they went, how far they are, how to resume them."""

    directory: Annotated[Path | None, Argument("DIR"), Control] = None
    """Directory to look in; by default runs/ where there is one, else the current directory."""


class DoctorConfig(Config, Reporting):
    """Check the installation and the machine, with a fix for each flaw."""
