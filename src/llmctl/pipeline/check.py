"""Check every stage against the results of those before it, before the first one begins.

In: stages with their configs. The result of a stage is predicted from its config: positions,
vocabulary, parameters, whether there is a chat template. Deep checks read all data, too, and do the
dry run of stages that depend on no other.
"""

import contextlib
import io
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from llmctl.config.commands.dpo import DpoConfig
from llmctl.config.commands.ppo import PpoConfig
from llmctl.config.commands.reward import RewardConfig
from llmctl.config.commands.sft import SftConfig
from llmctl.data.bad_rows import BadRows
from llmctl.data.examples import read_examples
from llmctl.data.preferences import read_preferences
from llmctl.data.prompts import read_prompts
from llmctl.data.sources import find_sources, split_weight
from llmctl.errors import DataError, UserError
from llmctl.models.hub import split_revision
from llmctl.pipeline.capacity import require_capacity
from llmctl.pipeline.predicted import PredictedModel, predict, require_fitting, trained_model
from llmctl.pipeline.references import Stage


def check(stages: Sequence[Stage], *, deep: bool) -> None:
    """Refuse stages that cannot work; `deep` reads all data and dry-runs what depends on no other.

    Raises:
        UserError: naming the stage and the line of the recipe.
    """
    known: dict[str, PredictedModel] = {}
    for stage in stages:
        try:
            _check_external(stage)
            require_fitting(stage, known)
            known[stage.name] = predict(stage, known)
            if deep:
                _read_data(stage) if stage.inputs else _dry_run(stage)
        except UserError as error:
            if error.file != str(stage.file):
                error.hint = error.hint or f"{stage.file}:{stage.line} is the stage"
            raise stage.named_in(error) from None
    require_capacity(stages, {stage.name: trained_model(stage, known) for stage in stages})


def _check_external(stage: Stage) -> None:
    """Refuse paths where there is nothing, and stdin, which can be read once only."""
    kinds = type(stage.config).inputs()
    for field, texts in stage.external.items():
        for text in texts:
            if text == "-":
                raise DataError(f"{field}: a life cycle does not read stdin", hint="name a file")
            stem, _ = split_weight(text)
            if "data" in kinds[field]:
                with tempfile.TemporaryDirectory(prefix="llmctl-") as spool:
                    find_sources([stem], Path(spool))
            elif kinds[field] and not Path(stem).expanduser().exists():
                hub = "" if kinds[field] == ("tokens",) else " or a Hub id"  # which has no shards
                if hub and _is_hub_id(stem):
                    continue
                text = f"{field}: no stage, run or folder `{stem}`"
                hint = f"name a stage before this one, a run, a folder{hub}"
                raise stage.error(UserError, text, hint)


def _is_hub_id(name: str) -> bool:
    """Whether a name that is no path can be an id on the Hub, pinned to a revision or not."""
    owner, _, rest = split_revision(name)[0].partition("/")
    plain = not name.startswith((".", "~", "/")) and "/" not in rest and ":" not in name
    return plain and not Path(name).suffix[1:].isalpha() and not Path(owner).is_dir()


def _dry_run(stage: Stage) -> None:
    """Dry-run a stage of which nothing that it reads is still to be made."""
    from llmctl.pipeline.isolation import ProcessState

    config = stage.config.model_copy(update={"dry_run": True})
    with ProcessState().restored(), contextlib.redirect_stdout(io.StringIO()):
        import_module(f"llmctl.commands.{stage.stage}").run(config)


def _read_data(stage: Stage) -> None:
    """Read all rows that are there already, as the stage will.

    Raises:
        DataError: rows that it would refuse, with file and line.
    """
    config = stage.config
    if any(field in stage.needs for field in ("data", "val_data")):
        return
    match config:
        case SftConfig():
            read_examples(
                config.data,
                columns=config.columns,
                bad=BadRows(config.skip_bad_rows),
                task=config.task,
            )
        case RewardConfig() | DpoConfig():
            read_preferences(config, config.data, config.seed)
        case PpoConfig():
            read_prompts(
                config.data, config.val_data, config.val_size, BadRows(config.skip_bad_rows)
            )
