"""The ``trt`` dialect's vision tower of nano against eager: patches as a product, the pool through its function."""

from __future__ import annotations

import pytest
import torch

from gemma3_compile.model import Gemma3
from graphs.onnx_lowering.context import TrtOptions
from tests.graphs.onnx_lowering.test_trt_decoder import plain, rounded_model
from tests.graphs.onnx_lowering.test_vision import pixels
from tests.graphs.ort import run
from tests.graphs.trt_nano import in_float32, lowered_trt, open_trt, with_weights
from tests.tolerances import TOLERANCES, check, relative_error


@pytest.mark.parametrize("count", [1, 3])
def test_features_as_eager_gives_them(nano_model: Gemma3, count: int) -> None:
    assert nano_model.vision is not None
    graph = open_trt(with_weights(lowered_trt("vision", TrtOptions(dtype="float32")), plain(nano_model)))
    given = pixels(count)
    features = run(graph, {"pixels": given})["features"]
    check("ort.features", features, nano_model.vision(given))
    upside_down = run(graph, {"pixels": given.flip(2)})["features"]
    assert relative_error(upside_down, nano_model.vision(given)) > 100 * TOLERANCES["ort.features"].relative


def test_the_graph_in_bfloat16_is_the_same_graph(nano_model: Gemma3) -> None:
    model = rounded_model(nano_model)
    assert model.vision is not None
    graph = open_trt(in_float32(with_weights(lowered_trt("vision"), plain(nano_model))))
    given = torch.cat([pixels(1), pixels(1).flip(3)])
    check("ort.features", run(graph, {"pixels": given})["features"], model.vision(given))
