"""Which sizes a plan is made for: optimisation profiles over the named dimensions of a stage.

Legend: B sequences, S tokens of each in a chunk, R rows of logits, M rows of image features; N pictures.

A decoder has two profiles in one plan: chunks of a prompt, and single tokens. TensorRT picks its code for each of them
by the middle of its three sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtimes.errors import UsageError

PREFILL, DECODE = 0, 1
"""Numbers of the decoder's profiles."""
BEST_CHUNK = 1024
"""The chunk that prefill is tuned for, in tokens, where the longest is not shorter."""
MAX_IMAGES = 4
"""Pictures that go through the vision tower at once: a picture and the crops of Pan & Scan are more than one call."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """The least, the usual and the most of a dimension."""

    least: int
    best: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.best <= self.most:
            raise UsageError(f"`1 <= least <= best <= most` must hold for the sizes of a plan, but got {self}")


Profile = Mapping[str, Range]
"""By the name of the dimension."""


@dataclass(frozen=True, kw_only=True)
class PlanSizes:
    """The most that a bundle's plans take.

    Args:
        batch: sequences.
        chunk: tokens of a prompt at a time.
        images: pictures at a time.
    """

    batch: int = 1
    chunk: int = 2048
    images: int = MAX_IMAGES

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("chunk", 2), ("images", 1)):
            value = getattr(self, name)
            if value < least:
                raise UsageError(f"`{name} >= {least}` must hold for a plan, but got {value}")


def decoder_profiles(sizes: PlanSizes) -> tuple[Profile, ...]:
    """Prefill, then decode. A chunk of text carries one row of image features that it does not read."""
    one = Range(least=1, best=1, most=1)
    batch = Range(least=1, best=1, most=sizes.batch)
    chunk = Range(least=2, best=min(BEST_CHUNK, sizes.chunk), most=sizes.chunk)
    features = Range(least=1, best=1, most=sizes.chunk)
    return (
        {"B": batch, "S": chunk, "R": one, "M": features},
        {"B": batch, "S": one, "R": one, "M": one},
    )


def vision_profiles(sizes: PlanSizes) -> tuple[Profile, ...]:
    """One picture as a rule, several with Pan & Scan."""
    return ({"N": Range(least=1, best=1, most=sizes.images)},)


def dims_of(shape: Sequence[int | str], profile: Profile) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The three shapes of an input, in TensorRT's order: least, best, most.

    Raises:
        UsageError: the profile does not name a dimension.
    """
    ranges = []
    for dim in shape:
        if isinstance(dim, str) and dim not in profile:
            raise UsageError(f"no profile says how large the dimension {dim!r} of {list(shape)} gets")
        ranges.append(profile[dim] if isinstance(dim, str) else Range(least=dim, best=dim, most=dim))
    least, best, most = (tuple(getattr(r, field) for r in ranges) for field in ("least", "best", "most"))
    return least, best, most
