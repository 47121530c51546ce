"""The lowered stages of nano in fp32, saved and opened once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from gemma3_compile.model import Gemma3
from graphs.onnx_lowering.context import OrtOptions
from graphs.onnx_lowering.lower import LoweredStage, lower_for_ort
from tests.graphs.nano import STAGES, nano_program
from tests.graphs.ort import Stored, open_graph, save


@pytest.fixture(scope="session")
def lowered() -> Mapping[str, LoweredStage]:
    """Every stage of nano in fp32. Shared: do not write to it."""
    return {name: lower_for_ort(nano_program(name), OrtOptions()) for name in STAGES}


@pytest.fixture(scope="session")
def graphs(
    lowered: Mapping[str, LoweredStage], nano_model: Gemma3, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Any]:
    """The same as ONNX Runtime sessions over one weights file with the seeded model's weights."""
    paths = save(tmp_path_factory.mktemp("nano"), lowered.values(), Stored(plain=nano_model.state_dict()))
    return {name: open_graph(path) for name, path in paths.items()}
