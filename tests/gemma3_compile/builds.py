"""Requests for builds of nano, and where their weights come from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Ggml

from gemma3_compile import stage_graphs
from gemma3_compile.checkpoints import Checkpoint, open_checkpoint
from gemma3_compile.pipeline import BuildRequest
from gemma3_compile.presets import preset
from runtimes.bundle import Bundle
from tests.gemma3_compile.checkpoints.gguf_files import ggml_name, metadata_of, write_gguf
from tests.twins import seeded_model

SEED = 7
KINDS = ("float32", "int8", "int4", "int4 exact", "auto", "kept", "empty")
"""``kept`` is ``auto`` from a GGUF, ``empty`` is float32 with nothing written into the weights file."""


def request(out: Path, **changes: object) -> BuildRequest:
    base = BuildRequest(target="ort", out=out, size="nano", random_seed=SEED, dtype="float32")
    return replace(base, **changes)


ARCHITECTURES = (80, 86, 89, 120)
TRT_KINDS: dict[str, dict[str, object]] = {
    "bfloat16": {},
    "int4": {"dtype": "int4", "architectures": (80,)},
    "fp8": {"dtype": "fp8", "architectures": (89, 120)},
}
"""Bundles for TensorRT. int4 is from a GGUF, without a vision tower."""


def trt_request(out: Path, **changes: object) -> BuildRequest:
    """nano for TensorRT for RTX; plans for chunks of 32 tokens, two sequences and 96 slots."""
    base = BuildRequest(target="trt", out=out, size="nano", random_seed=SEED, architectures=ARCHITECTURES)
    return replace(base, **{"context": 96, "chunk": 32, "batch": 2, **changes})


@cache
def nano_gguf(folder: Path) -> Path:
    """nano's decoder as GGUF on several grids; norms as ggml has them, with the 1 added."""
    model = seeded_model(replace(preset("nano"), vision=None))
    kinds = {"v_proj": Ggml.Q8_0, "down_proj": Ggml.Q5_0, "embed_tokens": Ggml.Q8_0, "gate_proj": Ggml.F16}
    tensors = {}
    for name, weight in model.state_dict().items():
        array = weight.numpy().copy()
        plain = array.ndim == 1
        kind = Ggml.F32 if plain else kinds.get(name.split(".")[-2], Ggml.Q4_0)
        tensors[ggml_name(name)] = (array + 1 if plain else array, kind)
    return write_gguf(folder / "nano.gguf", metadata_of(model.config), tensors)


def ledger_of(bundle: Bundle) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(bundle.path(bundle.manifest.weights.ledger).read_bytes())
    return rows


def checkpoint_of(kind: str, root: Path) -> Checkpoint:
    """What the bundle of ``kind`` was built from."""
    if kind == "kept":
        return open_checkpoint(nano_gguf(root), size="nano")
    return open_checkpoint(None, size="nano", random_seed=SEED)


_EXPORTED: dict[object, object] = {}


@contextmanager
def exported_once() -> Iterator[None]:
    """torch.export takes seconds and gives the same for every dtype: within this, it runs once for each stage.

    Not for a model that a test has changed: configuration and stage alone tell two exports apart.
    """
    export = stage_graphs.export_stage

    def once(model: Any, stage: object, **options: object) -> object:
        key = (model.config, stage)
        if key not in _EXPORTED:
            _EXPORTED[key] = export(model, stage, **options)
        return _EXPORTED[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_graphs, "export_stage", once)
        yield
