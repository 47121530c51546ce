"""A folder as Hugging Face lays it out, or one safetensors file of such a folder.

Read are config.json, generation_config.json, preprocessor_config.json, tokenizer.model and the weights.
"""

from __future__ import annotations

from pathlib import Path

from gemma3_compile.checkpoints.base import Checkpoint
from gemma3_compile.checkpoints.gguf_reader import GgufCheckpoint
from gemma3_compile.checkpoints.safetensors_reader import INDEX, SINGLE, SafetensorsCheckpoint, read_json, shards
from gemma3_compile.config import ModelConfig
from gemma3_compile.hf_config import from_hf_config
from runtimes.errors import CheckpointError

PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
PICKLE_HINT = (
    "pickle files run code when they are loaded; on a machine you trust, load it with transformers and "
    "`save_pretrained` it, which writes safetensors"
)


def read_config(folder: Path, fallback: ModelConfig | None) -> ModelConfig:
    """The configuration in ``folder``; ``fallback`` (the size that was asked for) where it has no config.json."""
    path = folder / "config.json"
    if not path.is_file():
        if fallback is not None:
            return fallback
        raise CheckpointError(
            f"{folder.name}: config.json is missing beside the weights",
            hint="copy it from the original checkpoint, or name the size with --size",
        )
    raw = read_json(path)
    if "quantization_config" in raw:
        raise CheckpointError(
            f"{folder.name}: config.json has a `quantization_config`: the weights were quantised by another tool",
            hint="give the original checkpoint, or a GGUF, whose grid can be kept",
        )
    generation = folder / "generation_config.json"
    return from_hf_config(raw, generation_config=read_json(generation) if generation.is_file() else None)


def _weights(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of the model in ``folder``."""
    if (folder / INDEX).is_file():
        return shards(folder)
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{folder.name}: the weights are a pickle file ({pickles[0]}), which is refused", hint=PICKLE_HINT
        )
    raise CheckpointError(
        f"{folder.name}: neither {SINGLE} nor {INDEX} is there",
        hint="give a folder as transformers writes it, one .safetensors file, or a .gguf file",
    )


def open_directory(folder: Path, *, fallback: ModelConfig | None, source: str | None = None) -> Checkpoint:
    """The checkpoint in ``folder``; a folder with nothing but one GGUF file is that file.

    Raises CheckpointError where weights or configuration are missing, refused or damaged.
    """
    name = source or folder.resolve().name
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1 and not (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        return GgufCheckpoint(ggufs[0])
    files = _weights(folder)
    config = read_config(folder, fallback)
    return SafetensorsCheckpoint(files, config=config, folder=folder, source=name)


def open_file(path: Path, *, fallback: ModelConfig | None) -> Checkpoint:
    """The checkpoint in one file: ``.gguf``, or ``.safetensors`` with its config.json beside it.

    Raises CheckpointError for other endings, and as :func:`open_directory`.
    """
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path.name}: pickle files are refused", hint=PICKLE_HINT)
    if path.suffix == ".gguf":
        return GgufCheckpoint(path)
    if path.name == INDEX:
        return open_directory(path.parent, fallback=fallback)
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path.name}: a .safetensors or .gguf file or a folder was expected",
            hint="give the folder that holds config.json and the weights",
        )
    config = read_config(path.parent, fallback)
    return SafetensorsCheckpoint((path,), config=config, folder=path.parent, source=path.name)
