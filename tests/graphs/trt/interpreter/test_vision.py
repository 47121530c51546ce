"""Nano's vision tower, as TensorRT's parser reads it, interpreted beside the eager one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gemma3_compile.model import Gemma3
from graphs.onnx_lowering.context import TrtOptions, WeightSource
from graphs.trt.interpreter import Interpreter
from tests.graphs.onnx_lowering.test_trt_decoder import plain, rounded_model
from tests.graphs.onnx_lowering.test_vision import pixels
from tests.graphs.trt.interpreter.stages import in_bfloat16, interpreted, outputs_of
from tests.graphs.trt_nano import lowered_trt, with_weights
from tests.tolerances import TOLERANCES, check, relative_error


@pytest.mark.parametrize("weights", ["input", "constant"])
def test_features_as_eager_gives_them(nano_model: Gemma3, tmp_path: Path, weights: WeightSource) -> None:
    model = rounded_model(nano_model)
    assert model.vision is not None
    graph = with_weights(lowered_trt("vision", TrtOptions(weights=weights)), plain(nano_model))
    wide, given = interpreted(graph, tmp_path, wide=True), torch.cat([pixels(1), pixels(1).flip(3)])
    expected = model.vision(given)
    check("ort.features", outputs_of(wide, {"pixels": given}), expected)
    upside_down = outputs_of(wide, {"pixels": given.flip(2)})
    assert relative_error(upside_down, expected) > 100 * TOLERANCES["ort.features"].relative
    short = Interpreter(wide.program, constants=wide.constants)
    ours = relative_error(outputs_of(short, {"pixels": given.bfloat16()}).float(), expected)
    eager = in_bfloat16(model).vision
    assert eager is not None
    theirs = relative_error(eager(given.bfloat16()).float(), expected)
    assert 1e-4 < ours < 2 * theirs < 0.1, (ours, theirs)


def test_the_pool_is_the_plugins(nano_model: Gemma3, tmp_path: Path) -> None:
    graph = with_weights(lowered_trt("vision"), plain(nano_model))
    program = interpreted(graph, tmp_path, wide=True).program
    (layer,) = (layer for layer in program.layers if layer.kind == "PLUGIN_V3")
    assert (layer.attributes["plugin"].pool, layer.attributes["plugin"].eps) == (2, pytest.approx(1e-6))
    assert "CONVOLUTION" not in program.kinds()
