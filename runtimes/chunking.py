"""Splitting a prompt into chunks that never cut a picture.

Legend: S tokens of the prompt, T tokens a picture, M feature rows, H hidden.

The tokens of a picture see each other both ways, so they must go through the decoder together. A chunk
closes before a picture that no longer fits, and grows past its size for a picture that is larger than it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from runtimes.errors import UsageError
from runtimes.session import Chunk

DEFAULT_CHUNK = 512


def split(image_ids: NDArray[np.int64], size: int, begin: int = 0) -> list[tuple[int, int]]:
    """Bounds (from, up to) of the chunks from token ``begin`` to the end.

    Args:
        image_ids: int64 [S], which picture a token belongs to, -1 for text. A picture is a run of one id.
        size: tokens a chunk holds, unless a single picture is longer.
        begin: the first token to be fed; it must not lie within a picture.

    Raises:
        UsageError: ``size`` is below 1.
    """
    if size < 1:
        raise UsageError(f"`chunk >= 1` must hold, but got {size}")
    total = len(image_ids)
    assert begin == 0 or begin >= total or not _joined(image_ids, begin), f"token {begin} lies within a picture"
    bounds = []
    while begin < total:
        end = min(begin + size, total)
        if end < total and _joined(image_ids, end):
            picture = end
            while picture > begin and _joined(image_ids, picture):
                picture -= 1
            end = picture if picture > begin else _end_of_picture(image_ids, end)
        bounds.append((begin, end))
        begin = end
    return bounds


def chunks(
    token_ids: NDArray[np.int64],
    image_ids: NDArray[np.int64],
    features: NDArray[np.float32] | None,
    size: int,
    begin: int = 0,
) -> Iterator[Chunk]:
    """The prompt from ``begin`` on as chunks.

    Args:
        token_ids: int64 [S].
        image_ids: int64 [S], as :func:`split` takes them.
        features: float32 [M, H], the rows of all pictures from ``begin`` on, in order; None without pictures.
        size: tokens a chunk.
    """
    row = 0
    for first, last in split(image_ids, size, begin):
        ids = image_ids[first:last]
        is_image = ids >= 0
        count = int(is_image.sum())
        if not count:
            yield Chunk(token_ids=token_ids[first:last])
            continue
        assert features is not None and row + count <= len(features), "every picture token has a feature row"
        yield Chunk(
            token_ids=token_ids[first:last],
            features=features[row : row + count],
            feature_rows=np.where(is_image, np.cumsum(is_image) - 1, -1),
            image_ids=ids,
        )
        row += count


def _joined(image_ids: NDArray[np.int64], place: int) -> bool:
    """Whether tokens ``place - 1`` and ``place`` belong to one picture."""
    return bool(image_ids[place] >= 0 and image_ids[place] == image_ids[place - 1])


def _end_of_picture(image_ids: NDArray[np.int64], place: int) -> int:
    while place < len(image_ids) and _joined(image_ids, place):
        place += 1
    return place
