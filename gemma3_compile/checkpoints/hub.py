"""A checkpoint from the Hugging Face hub, through huggingface_hub's own cache and login.

config.json comes first, so that a wrong size is noticed before the weights are fetched.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gemma3_compile.checkpoints.base import Checkpoint
from gemma3_compile.checkpoints.hf_directory import open_directory, read_config
from gemma3_compile.config import ModelConfig
from runtimes.errors import CheckpointError, Gemma3CompileError, HostError

FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.model",
    "model*.safetensors",
    "model.safetensors.index.json",
)
"""What is fetched of a repository: no pickle, no second copy of the weights."""


def ways_on(repository: str) -> str:
    """What to do where a repository cannot be had."""
    return (
        f"accept the licence at https://huggingface.co/{repository} and log in with `hf auth login`; "
        "or pass a local checkpoint with --checkpoint PATH; or build with --random-weights SEED"
    )


def _reason(error: Exception, token: str | None) -> str:
    """Why the hub did not give a file, in words and without a secret."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "access is gated: its licence was not accepted, or nobody is logged in"
    if isinstance(error, errors.RevisionNotFoundError):
        return "there is no such revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private and nobody with access is logged in"
    offline = isinstance(error, errors.OfflineModeIsEnabled) or isinstance(error.__cause__, errors.OfflineModeIsEnabled)
    if isinstance(error, errors.LocalEntryNotFoundError):
        if error.__cause__ is None or offline:
            return "it is not in the local cache and the hub may not be asked (offline)"
        return "it is not in the local cache and the hub cannot be reached"
    if offline:
        return "the hub may not be asked (offline)"
    if isinstance(error, errors.EntryNotFoundError):
        return "it lacks a file that a checkpoint needs (config.json)"
    lines = str(error).strip().splitlines() or [""]
    shown = lines[0].replace(token, "***") if token else lines[0]
    return f"{type(error).__name__}: {shown}"


def open_hub(
    repository: str,
    *,
    check: Callable[[ModelConfig], None],
    token: str | None = None,
    offline: bool = False,
    revision: str | None = None,
) -> Checkpoint:
    """Fetches ``repository`` (``google/gemma-3-12b-it``) into huggingface_hub's cache and opens it.

    Args:
        repository: owner and name.
        check: called with the configuration before the weights are fetched; raises what it does not want.
        token: instead of the one that huggingface_hub finds by itself.
        offline: look into the cache only.
        revision: branch, tag or commit.

    Raises CheckpointError where it cannot be had, with the ways on as hint; HostError without huggingface_hub.
    """
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
    except ImportError as error:
        raise HostError(
            f"{repository}: the package huggingface_hub is not installed",
            hint="install gemma3-compile[build], or pass --checkpoint PATH",
        ) from error
    try:
        config_path = hf_hub_download(
            repository, "config.json", token=token, local_files_only=offline, revision=revision
        )
        check(read_config(Path(config_path).parent, None))
        folder = snapshot_download(
            repository, token=token, local_files_only=offline, revision=revision, allow_patterns=list(FILES)
        )
    except Gemma3CompileError:
        raise
    except Exception as error:  # noqa: BLE001 - huggingface_hub passes on whatever its HTTP library raises
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"the checkpoint {repository}{at} cannot be had: {_reason(error, token)}", hint=ways_on(repository)
        ) from None
    return open_directory(Path(folder), fallback=None, source=f"{repository}@{Path(folder).name[:12]}")
