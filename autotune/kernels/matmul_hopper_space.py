"""Which configurations the products for Hopper may take, and which of them the heuristic takes.

They are ``LOADS=2`` of :mod:`autotune.kernels.matmul_space`.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton

from autotune.gpu import Gpu
from autotune.kernel import Config
from autotune.kernels import matmul_hopper, matmul_hopper_square
from autotune.kernels.matmul_hopper_square import SIDE
from autotune.kernels.matmul_product import Product

_RATES = {(128, 256): 1.0, (SIDE, SIDE): 0.96, (256, 128): 0.96, (128, 128): 0.88}
"""Rows of a tile and sums of a row: the rate while no multiprocessor idles, as a share of the best, measured on an H100."""
_SUMS = (128, 256)


def hopper_refusal(product: Product, config: Config, gpu: Gpu, *, unpacks: bool) -> str | None:
    """Why a configuration cannot run.

    Args:
        unpacks: weights in blocks are unpacked in the loop.
    """
    c = config.constants
    if gpu.architecture != 90:
        return f"the kernel for Hopper needs compute capability 9.0, but {gpu.name} has {gpu.compute_capability}"
    if triton.knobs.runtime.interpret:
        return "Triton's interpreter does not run Gluon, in which the kernel for Hopper is written"
    if product.transposed or product.depth % 8 or product.columns % 8:
        return "the kernel for Hopper needs weights [N, K], and N and K that are multiples of 8"
    if unpacks:
        return "the kernel for Hopper takes bf16 weights: those in blocks need AHEAD 1"
    if (c["BLOCK_K"], c["PARTS"], config.num_warps) != (matmul_hopper.DEPTH.value, 1, 8):
        return f"the kernel for Hopper is BLOCK_K={matmul_hopper.DEPTH.value} PARTS=1 warps=8"
    tiles = triton.cdiv(product.rows, c["BLOCK_M"]) * triton.cdiv(product.columns, c["BLOCK_N"])
    if c["PROGRAMS"] and (c["PROGRAMS"] != gpu.multiprocessors or tiles <= c["PROGRAMS"]):
        return f"PROGRAMS {c['PROGRAMS']} needs more tiles ({tiles}) and as many multiprocessors as {gpu.name} has"
    return _tile_refusal(product, config, gpu)


def _tile_refusal(product: Product, config: Config, gpu: Gpu) -> str | None:
    block_m, block_n = config.constants["BLOCK_M"], config.constants["BLOCK_N"]
    width = block_n * (2 if product.geglu else 1)
    if SIDE in (block_m, block_n):
        if block_m != block_n or product.geglu:
            return f"tiles of {SIDE} rows are square, and without GeGLU"
        shared = matmul_hopper_square.shared_bytes(config.num_stages)
    elif block_m not in (128, 256) or width not in _SUMS or block_m * width > 2**15:
        return f"the kernel for Hopper has no tile of {block_m} rows and {width} sums a row"
    else:
        shared = matmul_hopper.shared_bytes(block_m, block_n, width, config.num_stages)
    return (
        f"{shared} bytes of shared memory, but {gpu.name} has {gpu.shared_bytes}" if shared > gpu.shared_bytes else None
    )


def hopper_choice(product: Product, gpu: Gpu, ahead: Mapping[str, int]) -> tuple[Config, float] | None:
    """The tile that finishes first, and its time in sums; None where no tile runs.

    Args:
        ahead: AHEAD, or nothing.
    """
    choices = []
    for (block_m, width), rate in _RATES.items():
        block_n = width // 2 if product.geglu else width
        tiles = triton.cdiv(product.rows, block_m) * triton.cdiv(product.columns, block_n)
        constants = dict(ahead) | {
            "LOADS": 2,
            "PROGRAMS": gpu.multiprocessors if tiles > gpu.multiprocessors else 0,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": matmul_hopper.DEPTH.value,
            "GROUP": 8,
            "PARTS": 1,
        }
        config = Config(constants=constants, num_warps=8, num_stages=6 if block_m * width < 2**15 else 4)
        if hopper_refusal(product, config, gpu, unpacks=False) is None:
            choices.append((config, float(triton.cdiv(tiles, gpu.multiprocessors) * block_m * block_n) / rate))
    return min(choices, key=lambda choice: choice[1], default=None)
