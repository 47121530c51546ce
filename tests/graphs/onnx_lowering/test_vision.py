"""The vision tower of nano in ONNX Runtime against eager."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from gemma3_compile.model import Gemma3
from tests.graphs.ort import run
from tests.tolerances import TOLERANCES, check, relative_error


def pixels(count: int) -> torch.Tensor:
    return torch.randn((count, 3, 56, 56), generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("count", [1, 3])
def test_features_as_eager_gives_them(graphs: Mapping[str, Any], nano_model: Gemma3, count: int) -> None:
    assert nano_model.vision is not None
    given = pixels(count)
    ours = run(graphs["vision"], {"pixels": given})["features"]
    assert ours.shape == (count, 4, 64)
    check("ort.features", ours, nano_model.vision(given))


def test_a_picture_does_not_depend_on_its_neighbours(graphs: Mapping[str, Any]) -> None:
    given = pixels(3)
    together = run(graphs["vision"], {"pixels": given})["features"]
    alone = run(graphs["vision"], {"pixels": given[1:2]})["features"]
    check("ort.features", together[1:2], alone)


def test_the_comparison_can_fail(graphs: Mapping[str, Any], nano_model: Gemma3) -> None:
    """A picture upside down is far off."""
    assert nano_model.vision is not None
    given = pixels(1)
    ours = run(graphs["vision"], {"pixels": given.flip(2)})["features"]
    assert relative_error(ours, nano_model.vision(given)) > 100 * TOLERANCES["ort.features"].relative
