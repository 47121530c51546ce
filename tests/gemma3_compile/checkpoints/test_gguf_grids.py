"""Each kept grid against the ``gguf`` package's own dequantisation, to the bit, over arbitrary bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Ggml

from gemma3_compile.checkpoints.gguf_grids import GRID_KINDS, unpack_grid

# Where each format keeps its fp16 numbers inside a block: these get ordinary values, all other bytes are random.
_HALVES = {Ggml.Q8_0: [0], Ggml.Q4_0: [0], Ggml.Q5_0: [0], Ggml.Q6_K: [208], Ggml.Q4_K: [0, 2]}


def random_rows(kind: Ggml, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Packed rows, uint8 [rows, blocks * bytes of a block]."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, blocks, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    for at in _HALVES[kind]:
        halves = (rng.standard_normal((rows, blocks)) * 0.01).astype("<f2")
        raw[:, :, at : at + 2] = halves[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", list(GRID_KINDS), ids=lambda kind: kind.name)
def test_grid_is_ggufs_dequantisation_to_the_bit(kind: Ggml) -> None:
    raw = random_rows(kind, rows=33, blocks=3)
    want = torch.from_numpy(np.array(gguf.dequantize(raw, kind)))
    grid = unpack_grid(raw, GRID_KINDS[kind])
    assert torch.equal(grid.dequantize().view(torch.int32), want.view(torch.int32))
    info = GRID_KINDS[kind].info
    assert (grid.bits, grid.block_size) == (info.bits, info.block_size)
    assert int(grid.codes.max()) < 2**grid.bits
    assert grid.scales.shape == grid.zeros.shape == (33, want.shape[1] // grid.block_size)
    assert info.integer_zero == bool((grid.zeros == grid.zeros.round()).all())


def _by_zero_points(grid) -> torch.Tensor:
    """The contract's form: (code - zero) * scale in fp32."""
    blocks = grid.codes.view(*grid.scales.shape, grid.block_size).float()
    return ((blocks - grid.zeros[..., None]) * grid.scales[..., None]).view(grid.codes.shape)


@pytest.mark.parametrize("kind", [k for k in GRID_KINDS if k is not Ggml.Q4_K], ids=lambda kind: kind.name)
def test_zero_point_form_is_exact_for_integer_zeros(kind: Ggml) -> None:
    grid = unpack_grid(random_rows(kind, rows=16, blocks=4, seed=1), GRID_KINDS[kind])
    assert grid.minimums is None
    assert torch.equal(_by_zero_points(grid), grid.dequantize())


def test_zero_point_form_of_q4_k_stays_within_the_documented_bound() -> None:
    grid = unpack_grid(random_rows(Ggml.Q4_K, rows=64, blocks=8, seed=2), GRID_KINDS[Ggml.Q4_K])
    error = (_by_zero_points(grid) - grid.dequantize()).abs().view(*grid.scales.shape, 32)
    bound = 2**-22 * (15 * grid.scales.abs() + grid.minimums.abs())
    assert (error <= bound[..., None]).all()
    assert error.max() > 0, "if the form were exact, the bound would not need to be said"


@pytest.mark.parametrize("minimum", [0, 21])
def test_q4_k_block_without_scale_is_a_constant_in_both_forms(minimum: int) -> None:
    raw = random_rows(Ggml.Q4_K, rows=1, blocks=1, seed=3)
    raw[0, 4:16] = 0
    raw[0, 4], raw[0, 8] = 0, minimum  # sub-block 0: scale 0, six-bit minimum
    raw[0, 5] = 7  # sub-block 1 has a scale
    want = torch.from_numpy(np.array(gguf.dequantize(raw, Ggml.Q4_K)))
    grid = unpack_grid(raw, GRID_KINDS[Ggml.Q4_K])
    for got in (grid.dequantize(), _by_zero_points(grid)):
        assert torch.equal(got[:, :32], want[:, :32])
    assert torch.isfinite(grid.zeros).all()
    assert (grid.codes[0, :32] == 0).all()
    assert torch.equal(grid.dequantize(), want)
