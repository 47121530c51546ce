"""Pan & Scan's crops, against transformers' for 40 sizes and several thresholds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtimes.errors import BundleError
from runtimes.manifest import PanAndScanFacts
from runtimes.pan_and_scan import boxes, crops

# Around each threshold: ratio 1.2, side 256, halves where the count is rounded, at most 4 crops; both ways up.
SIZES = [
    *[(1, 1), (256, 256), (896, 896), (1000, 1000), (4000, 3000), (3000, 4000), (1200, 1000), (1000, 1200)],
    *[(1199, 1000), (1000, 1199), (307, 256), (308, 256), (256, 308), (511, 256), (512, 256), (256, 512)],
    *[(513, 256), (512, 255), (640, 480), (480, 640), (1500, 1000), (1499, 1000), (1000, 1500), (2500, 1000)],
    *[(2499, 1000), (1000, 2500), (3500, 1000), (3501, 1000), (4500, 1000), (1000, 4500), (10000, 1000)],
    *[(1920, 1080), (1080, 1920), (1080, 2340), (3840, 1080), (767, 300), (768, 300), (300, 769), (1023, 256)],
    *[(1025, 257), (257, 5000)],
]
THRESHOLDS = [
    PanAndScanFacts(),
    PanAndScanFacts(min_crop_size=100, max_num_crops=8, min_ratio_to_activate=1.5),
    PanAndScanFacts(min_crop_size=400, max_num_crops=3, min_ratio_to_activate=1.0),
    PanAndScanFacts(max_num_crops=1),
]


@pytest.fixture(scope="module")
def processor() -> Any:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    return Gemma3ImageProcessorPil()


def theirs(processor: Any, array_3HW: Any, facts: PanAndScanFacts) -> list[Any]:
    result: list[Any] = processor.pan_and_scan(
        array_3HW,
        pan_and_scan_min_crop_size=facts.min_crop_size,
        pan_and_scan_max_num_crops=facts.max_num_crops,
        pan_and_scan_min_ratio_to_activate=facts.min_ratio_to_activate,
    )
    return result


def test_the_table_has_forty_sizes() -> None:
    assert len(set(SIZES)) >= 40


@pytest.mark.parametrize("facts", THRESHOLDS, ids=["usual", "small crops", "large crops", "one crop"])
def test_boxes_are_those_of_transformers(processor: Any, facts: PanAndScanFacts) -> None:
    """Each pixel holds its own number, so that a crop's corners give its box away."""
    cut = 0
    for width, height in SIZES:
        numbers_3HW = np.broadcast_to(
            np.arange(width * height, dtype=np.int32).reshape(height, width), (3, height, width)
        )
        corners = [(int(crop[0, 0, 0]), int(crop[0, -1, -1])) for crop in theirs(processor, numbers_3HW, facts)]
        expected = [(a % width, a // width, b % width + 1, b // width + 1) for a, b in corners]
        assert boxes(width, height, facts) == expected, (width, height)
        cut += bool(expected)
    assert 0 < cut < len(SIZES)


@pytest.mark.parametrize("size", [(1200, 500), (500, 1201), (1023, 300), (600, 600)])
def test_pixels_of_the_crops_are_those_of_transformers(processor: Any, size: tuple[int, int]) -> None:
    array_HW3 = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    facts = PanAndScanFacts()
    ours = crops(Image.fromarray(array_HW3), facts)
    expected = theirs(processor, array_HW3.transpose(2, 0, 1), facts)
    assert len(ours) == len(expected)
    for crop, reference_3HW in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(crop).transpose(2, 0, 1), reference_3HW)


def test_crops_cover_the_picture_once() -> None:
    for width, height in SIZES:
        found = boxes(width, height, PanAndScanFacts())
        area = sum((right - left) * (lower - upper) for left, upper, right, lower in found)
        assert area in (0, width * height)


def test_an_empty_slice_is_dropped() -> None:
    """transformers would make a crop without pixels here: 5 pixels in 4 slices of 2."""
    facts = PanAndScanFacts(min_crop_size=1, max_num_crops=4)
    assert boxes(5, 1, facts) == [(0, 0, 2, 1), (2, 0, 4, 1), (4, 0, 5, 1)]


def test_thresholds_must_be_positive() -> None:
    with pytest.raises(BundleError, match="min_crop_size"):
        PanAndScanFacts(min_crop_size=0)
    with pytest.raises(BundleError, match="max_num_crops"):
        PanAndScanFacts(max_num_crops=0)
