"""What is asked of a build, and what it would take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gemma3_compile.formats import Dtype, TrtDtype
from graphs.onnx_lowering.context import Activations, WeightSource
from runtimes.trt.binding import Flavour

Rounding = Literal["calibrated", "nearest"]


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What is to be built. A target refuses what is another's.

    Args:
        context: for `trt` the slots of a global layer's cache, which are part of its plans; for `ort` only what a dry run
            counts the caches for, since such a bundle takes any.
    """

    target: str
    out: Path
    size: str | None = None
    checkpoint: str | Path | None = None
    random_seed: int | None = None
    dtype: Dtype | TrtDtype = "auto"
    overwrite: bool = False
    context: int | None = None
    rounding: Rounding | None = None
    """How int4 is rounded. None calibrates, but for random weights, which no text tells anything of."""
    calibration: Path | None = None
    token: str | None = None
    offline: bool = False
    revision: str | None = None
    empty_weights: bool = False
    """Lays the weights file out but writes nothing into it: a hole of zeros, to time a build or look at its graphs.
    The hole is not hashed, so ``verify`` says that the weights are not what the manifest tells."""
    # --- ort ---
    activations: Activations | None = None
    """None takes the default of ``dtype``."""
    # --- trt ---
    flavour: Flavour | None = None
    """None takes what is installed and serves the architectures."""
    architectures: tuple[int, ...] = ()
    """80 for sm_80. Empty takes those of the host's GPUs, or without any all that the flavour serves."""
    weights: WeightSource | None = None
    chunk: int | None = None
    """The most tokens of a prompt at a time."""
    batch: int | None = None
    """The most sequences at a time."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Something that was left to the build, and why it decides as it does."""

    name: str
    choice: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """What a build would take, in bytes, before anything is written."""

    target: str
    size: str
    source: str
    weights_bytes: int
    context: int
    cache_bytes: int
    peak_bytes: int
    decisions: tuple[Decision, ...]
    notes: tuple[str, ...]


def only_for(target: str, given: Mapping[str, object]) -> str | None:
    """What to say where options of ``target`` are given to another; None where none is."""
    used = [f"--{name}" for name, value in given.items() if value not in (None, ())]
    return f"{', '.join(used)} {'is' if len(used) == 1 else 'are'} for --target {target} only" if used else None
