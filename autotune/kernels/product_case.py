"""What cases of :mod:`autotune.kernels.matmul` and :mod:`autotune.kernels.matvec` share: their buckets and random inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton

from autotune.draw import Draw
from autotune.kernel import Case, Tensors


def product_bucket(case: Case, most_rows: int) -> str:
    """Rows up to a power of two, ``most_rows`` at most, and every other dim that is not 0."""
    rows = min(triton.next_power_of_2(case.dims["rows"]), most_rows)
    others = [f"{name}={value}" for name, value in sorted(case.dims.items()) if value and name != "rows"]
    return " ".join([case.dtype, f"rows<={rows}", *others])


def drawn_inputs(
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], bits: int, depth: int, draw: Draw, deviation: float = 1.0
) -> Tensors:
    """Tensors by name: ``x`` has the deviation given, weights are of about 1 / sqrt(K), K being ``depth``."""
    tensors: Tensors = {}
    for name, (shape, dtype) in shapes.items():
        if dtype == torch.uint8:
            tensors[name] = draw.integers(*shape, high=256, dtype=dtype)
        elif name in ("scales", "minimums"):
            size = 3.5 / 2**bits / depth**0.5  # the codes are even
            tensors[name] = draw.uniform(*shape, low=0.5 * size, high=1.5 * size).to(dtype)
        elif name in ("norm", "post"):
            tensors[name] = draw.scale(*shape)
        else:
            size = {"w": depth**-0.5, "x": deviation}.get(name, 1.0)
            tensors[name] = draw.normal(*shape, dtype=dtype, deviation=size)
    return tensors
