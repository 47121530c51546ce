"""Where files of tuning records are, and how many records each GPU model has there. Without torch: ``gemma3c doctor`` asks too."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from importlib import resources
from pathlib import Path

from autotune.gpu_model import GpuModel

SCHEMA = "schema.json"
"""What lies beside shipped records and is none."""


def default_folder() -> Path:
    """Where the user's records are on this host."""
    if chosen := os.environ.get("GEMMA3C_RECORDS"):
        return Path(chosen)
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "gemma3c" / "records"


def shipped_files(resources_of: ExitStack, folder: Path | None = None) -> list[Path]:
    """The files that gemma3c ships, there until ``resources_of`` is closed.

    Args:
        folder: None takes the package's.
    """
    entries = folder.iterdir() if folder else resources.files("autotune").joinpath("records").iterdir()
    chosen = [entry for entry in entries if entry.name.endswith(".json") and entry.name != SCHEMA]
    return sorted(resources_of.enter_context(resources.as_file(entry)) for entry in chosen)


def user_files(folder: Path) -> list[Path]:
    """The files of a user's folder, which need not be there."""
    return sorted(folder.glob("*.json")) if folder.is_dir() else []


def record_counts(files: Iterable[Path]) -> Counter[GpuModel]:
    """How many records each GPU model has; files that are damaged have none."""
    counts: Counter[GpuModel] = Counter()
    for file in files:
        try:
            for gpu in json.loads(file.read_bytes())["gpus"]:
                major, minor = gpu["compute_capability"]
                model = GpuModel(
                    name=gpu["name"], compute_capability=(major, minor), multiprocessors=gpu["multiprocessors"]
                )
                counts[model] += len(gpu["records"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return counts


def summary(mine: GpuModel, *, user_folder: Path | None = None, shipped_folder: Path | None = None) -> str:
    """In a line, what tuning records a GPU has: shipped, the user's, or a similar model's that stand in."""
    with ExitStack() as stack:
        shipped = record_counts(shipped_files(stack, shipped_folder))
    own = record_counts(user_files(user_folder or default_folder()))
    counts = shipped + own
    nearest = min((model for model in counts if model.is_similar(mine)), key=mine.distance, default=None)
    if nearest is None:
        return f"no records of {mine.name} or a similar GPU; `gemma3c tune` makes some"
    count = f"{counts[nearest]} record{'' if counts[nearest] == 1 else 's'}"
    if nearest.name != mine.name:
        return f"no records of {mine.name}, {count} of {nearest.name} stand in; `gemma3c tune` makes some"
    return f"{count} of {mine.name} ({shipped[nearest]} shipped, {own[nearest]} your own)"
