"""A small manifest that is right in every field, for tests to break in one place at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from runtimes.bundle import Bundle
from runtimes.bundle_writer import BundleWriter
from runtimes.manifest import (
    CacheFacts,
    ImageFacts,
    LayerFacts,
    Manifest,
    ModelFacts,
    PanAndScanFacts,
    StageFacts,
    TensorFacts,
    TokenFacts,
    TokenizerFacts,
    WeightFacts,
)

LOCAL = LayerFacts(kind="local", kv_heads=2, head_dim=32, window=16)
GLOBAL = LayerFacts(kind="global", kv_heads=2, head_dim=32, window=None)
IMAGE = ImageFacts(
    size=56,
    tokens_per_image=4,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    rescale=1 / 255,
    resample="bilinear",
    pan_and_scan=PanAndScanFacts(),
)
TOKENS = TokenFacts(bos=2, pad=0, unk=3, end=(1, 106), start_of_image=255, end_of_image=256, image=511)
FILES = {
    "decoder.onnx": b"decoder",
    "vision.onnx": b"vision",
    "weights.safetensors": b"weights" * 100,
    "weights.json": b"{}",
    "tokenizer.model": b"tokenizer",
}


def manifest(**changes: Any) -> Manifest:
    """A bundle of the nano model; ``changes`` replace its fields."""
    model = ModelFacts(
        name="nano",
        vocab_size=512,
        hidden_size=64,
        max_context=512,
        layers=(LOCAL,) * 5 + (GLOBAL,),
        tokens=TOKENS,
        image=IMAGE,
    )
    stage = StageFacts(
        graph="decoder.onnx",
        inputs=(TensorFacts(name="token_ids", dtype="int64", shape=("B", "S")),),
        outputs=(TensorFacts(name="logits", dtype="float32", shape=("B", "R", 512)),),
    )
    whole = Manifest(
        producer={"gemma3c": "0.1.0", "torch": "2.13.0"},
        target="ort",
        model=model,
        caches=CacheFacts(dtype="float32", local_layout="compact"),
        stages={"decoder": stage, "vision": replace(stage, graph="vision.onnx")},
        weights=WeightFacts(file="weights.safetensors", dtype="float32", ledger="weights.json"),
        tokenizer=TokenizerFacts(file="tokenizer.model"),
        probes={"decoder": ("layers.0", "layers.1")},
        settings={"image_in_place": False, "block_size": 32},
    )
    return replace(whole, **changes)


def write(dest: Path, **changes: Any) -> Bundle:
    """A bundle on disk whose files hold a few bytes each."""
    with BundleWriter(dest) as writer:
        for name, data in FILES.items():
            writer.path(name).write_bytes(data)
        return writer.finish(manifest(**changes))
