"""What a dry run prints: the resolved recipe, and what the command says of it."""

from collections.abc import Sequence
from typing import Any

from llmctl.config.base import Config
from llmctl.console import rank


def show_recipes(
    recipes: Sequence[tuple[str, Config]], plan: Any = None, *, as_json: bool
) -> dict[str, Any] | None:
    """Print recipes as YAML; or return one object, which is the result with `--json`.

    Args:
        recipes: each command's name and its config.
        plan: what a run would take, as JSON.
        as_json: whether an object is wanted.
    """
    if as_json:
        shown = [config.recipe(stage) for stage, config in recipes]
        return {"recipe": shown[0] if len(shown) == 1 else shown, "plan": plan}
    if rank() == 0:
        print("---\n".join(config.to_yaml(stage) for stage, config in recipes), end="")
    return None
