"""Fetch from the Hugging Face Hub, with its many failures told as ours."""

import logging
from collections.abc import Sequence
from pathlib import Path

from llmctl.console import is_terminal
from llmctl.errors import DataError, ModelError, NetworkError


def download(name: str, repo_type: str, patterns: Sequence[str]) -> Path:
    """The local folder of a repository on the Hub, with the files that match.

    Raises:
        DataError: there is no such data set.
        ModelError: there is no such model, or the name cannot be one.
        NetworkError: the Hub is switched off or cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not is_terminal():
        disable_progress_bars()
    missing = DataError if repo_type == "dataset" else ModelError
    what = "data set" if repo_type == "dataset" else "model"
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, repo_type=repo_type, allow_patterns=list(patterns)
            )
        )
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise missing(
            f"nothing of this name here, and no such {what} on the Hub (or it wants a login)",
            file=name,
            hint="check the spelling, or run: hf auth login",
        ) from None
    except OSError:
        offline = huggingface_hub.is_offline_mode()
        raise NetworkError(
            f"no file `{name}` here, and the Hub "
            + ("is switched off (HF_HUB_OFFLINE)" if offline else "cannot be reached"),
            hint="pass the path of a local file or folder",
        ) from None
