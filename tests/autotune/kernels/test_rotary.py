"""Rotary embedding against float64 and against its own law: products depend on distances only."""

from __future__ import annotations

import math

import pytest
import torch

from autotune.kernels.rotary import inverse_frequencies, rotary_table, rotate
from tests.tolerances import check


@pytest.mark.parametrize("base", [10_000.0, 1_000_000.0])
@pytest.mark.parametrize("factor", [1.0, 8.0])
@pytest.mark.parametrize("dim", [2, 32, 128, 256])
def test_table_equals_float64(base: float, factor: float, dim: int) -> None:
    position = torch.tensor([[0, 1, 7, 31], [1000, 32_767, 131_071, 131_072]])
    cos, sin = rotary_table(position, dim, base, factor)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (2, 4, dim // 2)
    for row, name in ((0, "kernel.rotary_near"), (1, "kernel.rotary")):
        exact = [[int(p) / factor * base ** (-2 * i / dim) for i in range(dim // 2)] for p in position[row]]
        angle = torch.tensor(exact, dtype=torch.float64)
        check(name, cos[row], angle.cos(), f"cosines of row {row}")
        check(name, sin[row], angle.sin(), f"sines of row {row}")


def test_factor_divides_positions() -> None:
    """Position 80 with factor 8 is position 10 without: frequencies are exact eighths."""
    scaled = rotary_table(torch.tensor([[80]]), 64, 1e6, 8.0)
    plain = rotary_table(torch.tensor([[10]]), 64, 1e6, 1.0)
    check("kernel.rotary_near", scaled[0], plain[0])
    assert torch.equal(inverse_frequencies(64, 1e6, 8.0) * 8.0, inverse_frequencies(64, 1e6, 1.0))


def test_rotation_is_by_halves() -> None:
    """Dimension i turns with i + D/2, by the i-th angle."""
    x = torch.randn((1, 3, 2, 6), generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_table(torch.tensor([[4, 5, 6]]), 6, 100.0, 1.0)
    y = rotate(x, cos, sin).double()
    for step, position in enumerate((4, 5, 6)):
        for i in range(3):
            angle = position * 100.0 ** (-i / 3)
            a, b = x[0, step, :, i].double(), x[0, step, :, i + 3].double()
            check("kernel.rotary_near", y[0, step, :, i], a * math.cos(angle) - b * math.sin(angle))
            check("kernel.rotary_near", y[0, step, :, i + 3], b * math.cos(angle) + a * math.sin(angle))


def test_products_depend_on_the_distance_only() -> None:
    q, k = torch.randn((2, 1, 1, 1, 32), generator=torch.Generator().manual_seed(1))

    def product(query: int, key: int) -> torch.Tensor:
        turned = [rotate(x, *rotary_table(torch.tensor([[p]]), 32, 1e4, 1.0)) for x, p in ((q, query), (k, key))]
        return (turned[0] * turned[1]).sum()

    scale = float(q.norm() * k.norm())
    assert abs(float(product(9, 4) - product(25, 20))) < 1e-5 * scale
    assert abs(float(product(9, 4) - product(9, 5))) > 1e-3 * scale


def test_dtype_of_the_rotated_is_kept() -> None:
    x = torch.randn((1, 2, 1, 8)).bfloat16()
    assert rotate(x, *rotary_table(torch.tensor([[0, 1]]), 8, 1e4, 1.0)).dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "base", "factor"), [("full_attention", 1e6, 8.0), ("sliding_attention", 1e4, 1.0)])
def test_table_equals_transformers_to_the_bit(kind: str, base: float, factor: float) -> None:
    """The last positions of a 128k context, where float64 would differ: the models know the fp32 product."""
    import transformers
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    scaling = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
    config = transformers.Gemma3TextConfig(
        head_dim=256, rope_parameters={**scaling, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    )
    position = torch.cat([torch.arange(100), torch.arange(130_972, 131_072)])[None]
    theirs = Gemma3RotaryEmbedding(config)(torch.zeros(1), position, kind)
    for ours, right in zip(rotary_table(position, 256, base, factor), theirs, strict=True):
        check("kernel.rotary_peer", torch.cat([ours, ours], dim=-1), right)
