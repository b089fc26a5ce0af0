"""Fetch from the Hugging Face Hub, with its many failures told as ours."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from llmctl.console import is_terminal
from llmctl.errors import DataError, ModelError, NetworkError
from llmctl.runs.directory import resolve_model


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a repository's, with or without `@` and a revision."""
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(@\w[\w./-]*)?", name))


def split_revision(name: str) -> tuple[str, str | None]:
    """`owner/name@revision` in its two parts: a branch, a tag or a commit; None without one."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def commit_of(reference: str) -> str | None:
    """The commit of a model that was fetched from the Hub; None for what lies here."""
    import huggingface_hub
    from huggingface_hub import errors

    if Path(reference).expanduser().exists() or not is_hub_id(reference):
        return None
    name, revision = split_revision(reference)
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=[], local_files_only=True
        )
    except (errors.HFValidationError, OSError):
        return None
    return Path(folder).name


def base_reference(reference: str) -> tuple[str, str | None]:
    """A model as PEFT names it: the absolute path of its folder, or its Hub id and its commit."""
    path = Path(resolve_model(reference)).expanduser()
    if path.exists():
        return str(path.resolve()), None
    return split_revision(reference)[0], commit_of(reference)


def model_input(role: str, reference: str, sha256: str | None) -> dict[str, str | None]:
    """What a manifest says of a model or tokenizer that went in, with its commit on the Hub."""
    entry = {"role": role, "path": reference, "sha256": sha256}
    commit = commit_of(reference)
    return entry if commit is None else {**entry, "revision": commit}


def download(reference: str, repo_type: str, patterns: Sequence[str]) -> Path:
    """The local folder of a repository on the Hub, with the files that match.

    Raises:
        DataError: there is no such data set, or no such revision of it.
        ModelError: there is no such model or revision, or the name cannot be one.
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
    name, revision = split_revision(reference)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, repo_type=repo_type, revision=revision, allow_patterns=list(patterns)
            )
        )
    except errors.RevisionNotFoundError:
        raise missing(
            f"the Hub knows no revision `{revision}` of this {what}",
            file=name,
            hint="pass a branch, a tag or a commit after the @",
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise missing(
            f"nothing of this name here, and no such {what} on the Hub (or it wants a login)",
            file=name,
            hint="check the spelling, or run: hf auth login",
        ) from None
    except OSError:
        offline = huggingface_hub.is_offline_mode()
        raise NetworkError(
            f"no file `{reference}` here, and the Hub "
            + ("is switched off (HF_HUB_OFFLINE)" if offline else "cannot be reached"),
            hint="pass the path of a local file or folder",
        ) from None
