"""What TensorRT's own parser makes of the ``trt`` dialect, and whether a plan of TensorRT for RTX copies weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import nn

from gemma3_compile.formats import TRT_INT4, TRT_INT8, trt_formats
from gemma3_compile.presets import preset
from graphs.onnx_lowering.context import TrtOptions, WeightSource
from graphs.onnx_lowering.lower import lower_for_trt
from graphs.weights import BlockFormat
from tests.graphs.nano import linear_names
from tests.graphs.onnx_lowering.test_trt_decoder import blocks_of
from tests.graphs.small import small_program
from tests.graphs.trt_nano import CONTEXT, StoredWeights, lowered_trt, with_weights

Reports = Mapping[str, Any]
DTYPES = ("bfloat16", "int8", "int4", "fp8")
HASH = "5" * 64
LINEARS: dict[str, tuple[BlockFormat | None, WeightSource]] = {
    "bfloat16": (None, "input"),
    "int8": (TRT_INT8, "input"),
    "int4": (TRT_INT4, "input"),
    "int4_constant": (TRT_INT4, "constant"),
}


def linear(form: BlockFormat | None, weights: WeightSource) -> bytes:
    """A linear over [B, S, K] with what stands before and after it in a model."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(256, 512, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.gelu(self.fc1(x * x), approximate="tanh")

    x = torch.ones(2, 5, 256, dtype=torch.bfloat16)
    formats = {} if form is None else {"fc1.weight": form}
    small = small_program(Part().bfloat16(), x, dynamic=[{0: "B", 1: "S"}], formats=formats)
    lowered = lower_for_trt(small.program, TrtOptions(weights=weights))
    if weights == "input":
        return ir.to_proto(lowered.model).SerializeToString()
    state = {"fc1.weight": torch.randn(512, 256, generator=torch.Generator().manual_seed(0))}
    blocks = {} if form is None else blocks_of(state, {"fc1.weight": form})
    return with_weights(lowered, StoredWeights(plain=state, blocks=blocks)).SerializeToString()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    folder = tmp_path_factory.mktemp("trt")
    for dtype in DTYPES:
        formats = trt_formats(linear_names(preset("nano")), dtype)
        lowered = lowered_trt("decoder", TrtOptions(context=CONTEXT, kernels_hash=HASH), formats)
        (folder / f"{dtype}.onnx").write_bytes(ir.to_proto(lowered.model).SerializeToString())
    lowered = lowered_trt("vision", TrtOptions(kernels_hash=HASH))
    (folder / "vision.onnx").write_bytes(ir.to_proto(lowered.model).SerializeToString())
    for name, (form, weights) in LINEARS.items():
        (folder / f"build_{name}.onnx").write_bytes(linear(form, weights))
    command = [sys.executable, "-m", "tests.graphs.onnx_lowering.trt_worker", str(folder)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stdout + done.stderr
    found: Reports = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_decoder_parses_into_the_layers_that_are_meant(reports: Reports, dtype: str) -> None:
    """Five local layers, one global one; nothing of a plugin's function is left."""
    report = reports[dtype]
    assert report["errors"] == []
    assert (
        report["plugins"]
        == [{"plugin": "SlidingWindowAttentionPlugin", "window": 16, "scale": pytest.approx(32**-0.5), "kernels": HASH}]
        * 5
    )
    kinds = report["kinds"]
    assert (kinds["KV_CACHE_UPDATE"], kinds["ATTENTION_INPUT"], kinds["ROTARY_EMBEDDING"]) == (2, 1, 12)
    assert kinds.get("DEQUANTIZE", 0) == (0 if dtype == "bfloat16" else 24)
    assert kinds["MATRIX_MULTIPLY"] == 25, "q+k+v, o, gate+up and down of six layers, and the head"
    assert {f"chunk.{n}" for n in ("start", "length", "filled", "newest", "visible_end")} <= set(report["tensors"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_and_outputs_of_the_network(reports: Reports, dtype: str) -> None:
    inputs, outputs = reports[dtype]["inputs"], reports[dtype]["outputs"]
    assert list(inputs)[:4] == ["token_ids", "start", "length", "rows"]
    assert inputs["cache.0.k"] == outputs["cache.0.k.out"] == ["BF16", [-1, 2, 16, 32]]
    assert inputs["cache.5.v"] == outputs["cache.5.v.out"] == ["BF16", [-1, 2, CONTEXT, 32]]
    assert outputs["logits"] == ["FLOAT", [-1, -1, 512]]
    assert inputs["decoder.norm.weight"] == ["FLOAT", [64]]
    assert inputs["decoder.embed_tokens.weight"] == ["BF16", [512, 64]]
    down = "decoder.layers.3.mlp.down_proj.weight"
    expected = {
        "bfloat16": {down: ["BF16", [64, 128]]},
        "int4": {f"{down}.codes": ["INT4", [64, 128]], f"{down}.scales": ["BF16", [64, 4]]},
        "int8": {f"{down}.codes": ["INT8", [128, 64]], f"{down}.scales": ["BF16", [64]]},
        "fp8": {f"{down}.codes": ["FP8", [128, 64]], f"{down}.scales": ["BF16", [64]]},
    }[dtype]
    assert {name: inputs[name] for name in inputs if down in name} == expected


def test_the_tower_parses(reports: Reports) -> None:
    report = reports["vision"]
    assert report["errors"] == []
    assert report["plugins"] == [{"plugin": "SigLIPPoolPlugin", "pool": 2, "eps": pytest.approx(1e-6), "kernels": HASH}]
    assert report["kinds"]["ATTENTION_INPUT"] == 2 and "CONVOLUTION" not in report["kinds"]
    assert report["outputs"] == {"features": ["BF16", [-1, 4, 64]]}


@pytest.mark.parametrize("name", ["bfloat16", "int8", "int4_constant"])
def test_a_product_reads_its_weight_as_it_is(reports: Reports, name: str) -> None:
    """No kernel of the plan but the product itself reads a weight: none is transposed, copied or written out."""
    kernels = reports[f"build_{name}"]["kernels"]
    assert any(kernel.startswith(("fully_connected", "runtime_fusion")) for kernel, _ in kernels), kernels
    others = [kernel for kernel, reads in kernels if kernel.startswith("function") and "fc1" in reads]
    assert others == []
    if name != "bfloat16":
        assert any(kernel.startswith("runtime_fusion") and kernel.endswith("CastMulCastFc") for kernel, _ in kernels)


def test_int4_inputs_are_written_out_in_one_pass(reports: Reports) -> None:
    """What the documentation warns of; when TensorRT learns better, this fails."""
    kernels = reports["build_int4"]["kernels"]
    reading = [kernel for kernel, reads in kernels if "fc1.weight.codes" in reads]
    assert len(reading) == 1 and reading[0].startswith("function") and "Tran" not in reading[0]
