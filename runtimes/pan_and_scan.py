"""Pan & Scan: a picture that is far from square is also shown in crops along its longer side.

The crops are those of transformers' ``Gemma3ImageProcessor.pan_and_scan``: equal slices, in reading
order, that do not overlap. The whole picture is always shown too, in front of its crops.

Source: Gemma 3 Technical Report (arXiv:2503.19786), section 2.1, and
transformers/models/gemma3/image_processing_pil_gemma3.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

    from runtimes.manifest import PanAndScanFacts

Box = tuple[int, int, int, int]  # left, upper, right, lower, in pixels, as Pillow counts them


def boxes(width: int, height: int, facts: PanAndScanFacts) -> list[Box]:
    """Where the crops of a ``width`` × ``height`` picture lie; an empty list where it needs none.

    There are as many crops as the aspect ratio says, rounded half up, but at least 2, and at most
    ``facts.max_num_crops`` and what ``facts.min_crop_size`` allows. A picture whose ratio is below
    ``facts.min_ratio_to_activate``, or whose crops would be smaller than ``min_crop_size`` pixels,
    gets none.
    """
    long_side, short_side = max(width, height), min(width, height)
    if long_side / short_side < facts.min_ratio_to_activate:
        return []
    wished = min(math.floor(long_side / short_side + 0.5), long_side // facts.min_crop_size)
    count = min(max(2, wished), facts.max_num_crops)
    step = math.ceil(long_side / count)
    if min(step, short_side) < facts.min_crop_size:
        return []
    # Thresholds far below the usual ones can leave a last slice with nothing in it: it is dropped.
    edges = [(start, min(start + step, long_side)) for start in range(0, step * count, step) if start < long_side]
    if width >= height:
        return [(start, 0, end, height) for start, end in edges]
    return [(0, start, width, end) for start, end in edges]


def crops(image: Image, facts: PanAndScanFacts) -> list[Image]:
    """The crops of a picture, without the picture itself. Whether to use them is the caller's choice."""
    return [image.crop(box) for box in boxes(image.width, image.height, facts)]
