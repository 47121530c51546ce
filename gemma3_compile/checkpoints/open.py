"""One door to every kind of checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

from gemma3_compile.checkpoints.base import Checkpoint
from gemma3_compile.checkpoints.check import describe
from gemma3_compile.checkpoints.hf_directory import PICKLES, open_directory, open_file
from gemma3_compile.checkpoints.hub import open_hub
from gemma3_compile.checkpoints.random_weights import RandomCheckpoint
from gemma3_compile.config import ModelConfig
from gemma3_compile.presets import HUB_IDS, preset
from runtimes.errors import CheckpointError, UsageError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_ENDINGS = PICKLES | {".gguf", ".safetensors", ".json"}
_SIZE_FIELDS = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
"""What makes a size: a fine-tune may change vocabulary and context, and a GGUF leaves out the vision tower."""


def check_size(config: ModelConfig, size: str | None, source: str) -> None:
    """Raises CheckpointError where ``config`` is not of the preset ``size``; None takes any."""
    if size is None:
        return
    wanted = preset(size)
    if any(getattr(config.text, field) != getattr(wanted.text, field) for field in _SIZE_FIELDS):
        raise CheckpointError(
            f"{source} is of another size: expected {describe(wanted)}, but it holds {describe(config)}",
            hint="name the checkpoint's own size with --size, or leave --size out",
        )


def open_checkpoint(
    source: str | Path | None,
    *,
    size: str | None,
    random_seed: int | None = None,
    token: str | None = None,
    offline: bool = False,
    revision: str | None = None,
) -> Checkpoint:
    """Opens a checkpoint; no weights are read yet.

    Args:
        source: a folder as Hugging Face lays it out, a ``.safetensors`` or ``.gguf`` file, or a Hugging Face id.
            None stands for the published instruction-tuned checkpoint of ``size``.
        size: a preset's name that the checkpoint must be of; None takes any.
        random_seed: make weights of ``size`` from this seed instead of reading any.
        token, offline, revision: for a Hugging Face id, see :func:`open_hub`.

    Raises:
        UsageError: the request contradicts itself or names no known size.
        CheckpointError: it cannot be had, is refused, damaged, or of another size.
        ConfigError: its configuration is not one of Gemma 3.
    """
    wanted = preset(size) if size is not None else None
    if random_seed is not None:
        if source is not None:
            raise UsageError(
                f"random weights and the checkpoint {source} exclude each other",
                hint="leave out --checkpoint or --random-weights",
            )
        if wanted is None:
            raise UsageError("random weights need a size", hint="name one with --size")
        return RandomCheckpoint(wanted, random_seed)
    repository = _repository(source, size)
    if repository is not None:
        return open_hub(
            repository,
            check=lambda config: check_size(config, size, repository),
            token=token,
            offline=offline,
            revision=revision,
        )
    path = Path(str(source)).expanduser()
    opened = open_directory(path, fallback=wanted) if path.is_dir() else open_file(path, fallback=wanted)
    check_size(opened.config, size, opened.source)
    return opened


def _repository(source: str | Path | None, size: str | None) -> str | None:
    """The Hugging Face id that is meant, None for a path that exists."""
    if source is None:
        if size is None:
            raise UsageError("neither a checkpoint nor a size was named", hint="give --checkpoint or --size")
        if size not in HUB_IDS:
            raise CheckpointError(
                f"size {size} has no published weights",
                hint="build it with --random-weights SEED, or pass --checkpoint",
            )
        return HUB_IDS[size]
    if Path(str(source)).expanduser().exists():
        return None
    if isinstance(source, str) and _HUB_ID.fullmatch(source) and Path(source).suffix not in _FILE_ENDINGS:
        return source
    raise CheckpointError(
        f"there is no checkpoint at {source}",
        hint="give a folder, a .safetensors or .gguf file, or a Hugging Face id such as google/gemma-3-270m-it",
    )
