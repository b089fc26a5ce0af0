"""Fetch from the Hugging Face Hub: names in, local folders and commits out, one error a failure."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from llmctl.console import is_terminal
from llmctl.errors import NetworkError, UserError
from llmctl.runs.directory import resolve_model


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a repository's, with or without `@revision`."""
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(@\w[\w./-]*)?", name))


def split_revision(name: str) -> tuple[str, str | None]:
    """Split `owner/name@revision`: a branch, a tag or a commit; None without one."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def commit_of(reference: str) -> str | None:
    """Return the commit of a model that was fetched from the Hub; None for a local one."""
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
    """Return a model as PEFT names it: the absolute path of its folder, or Hub id and commit."""
    path = Path(resolve_model(reference)).expanduser()
    if path.exists():
        return str(path.resolve()), None
    return split_revision(reference)[0], commit_of(reference)


def model_input(role: str, reference: str, sha256: str | None) -> dict[str, str | None]:
    """Return the manifest's record of a model or tokenizer, with its commit on the Hub."""
    entry = {"role": role, "path": reference, "sha256": sha256}
    commit = commit_of(reference)
    return entry if commit is None else {**entry, "revision": commit}


def download(
    reference: str,
    patterns: Sequence[str],
    repo_type: Literal["model", "dataset"] = "model",
    missing: type[UserError] = NetworkError,
) -> Path:
    """Return the local folder of a repository on the Hub, with the files that match.

    No patterns for the commit alone; `missing` is the error for what the Hub does not have or does
    not hand out.

    Raises:
        UserError: of the class `missing`: no such repository or revision, or it wants a login.
        NetworkError: the Hub is switched off or cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not is_terminal():
        disable_progress_bars()
    place, what = ("folder", "model") if repo_type == "model" else ("file", "data set")
    name, revision = split_revision(reference)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, repo_type=repo_type, revision=revision, allow_patterns=list(patterns)
            )
        )
    except errors.GatedRepoError:
        raise missing(f"`{name}` on the Hub wants a login", hint="run: hf auth login") from None
    except errors.RevisionNotFoundError:
        raise missing(
            f"the Hub knows no revision `{revision}` of `{name}`",
            hint="pass a branch, a tag or a commit after the @",
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise missing(
            f"no {place} `{reference}` here, and the Hub knows no such {what}",
            hint="check the spelling and the path, or run: hf auth login",
        ) from None
    except OSError:
        offline = huggingface_hub.is_offline_mode()
        raise NetworkError(
            f"no {place} `{reference}` here, and the Hub "
            + ("is switched off (HF_HUB_OFFLINE)" if offline else "cannot be reached"),
            hint=f"pass the path of a local {place}",
        ) from None
