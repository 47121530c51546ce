"""Which configurations :mod:`autotune.kernels.matmul` may take: the space, what does not fit a GPU, and the heuristic.

Constants:
    AHEAD: for weights in blocks only. 1 makes the weights bf16 in a launch of their own, and the rest is the product
        with bf16 weights; 0 unpacks them in the loop.
    LOADS: 0 by pointers, 1 by tensor descriptors, 2 by a warp of its own (:mod:`autotune.kernels.matmul_hopper`).
        Triton 3.6's own warp specialisation is left out: on an H100 its results are wrong.
    PROGRAMS: 0 for a program a tile; otherwise as many programs as multiprocessors, each of which takes many tiles.
    BLOCK_M, BLOCK_N, BLOCK_K: rows, columns and depth of a tile. GROUP: tiles of rows side by side.
    PARTS: in how many pieces a tile is written.
"""

from __future__ import annotations

import math

import triton

from autotune.gpu import Gpu
from autotune.kernel import Config, Space
from autotune.kernels.matmul_hopper_space import hopper_choice, hopper_refusal
from autotune.kernels.matmul_hopper_square import SIDE
from autotune.kernels.matmul_product import INTEGER_ZEROS as INTEGER_ZEROS
from autotune.kernels.matmul_product import MINIMUMS as MINIMUMS
from autotune.kernels.matmul_product import NO_ZEROS as NO_ZEROS
from autotune.kernels.matmul_product import Product

POINTERS, DESCRIPTORS, OWN_WARP = 0, 1, 2
AHEAD_FROM_ROWS = 1024
"""From here on a pass over the weights costs less than unpacking them once for every tile of rows."""
_AHEAD_FROM_ROWS_ON_HOPPER = 257
"""On an H100 the pass pays at 512 rows for every product of the 4B and the 12B, and at 128 for none."""
_BARRIER_BYTES = 1024
_HOPPER_GAIN = 0.9
"""Time of a tile by the kernels for Hopper, as a share of the others'."""
_PERSISTENT_PROGRAMS = (114, 132, 148)
"""Multiprocessors of H100 PCIe, of H100 SXM and H200, of B200."""


def space_of(product: Product) -> Space:
    """All that may be tried."""
    constants: dict[str, tuple[int, ...]] = {} if product.bits == 16 else {"AHEAD": (0, 1)}
    constants |= {
        "LOADS": (POINTERS, DESCRIPTORS, OWN_WARP),
        "PROGRAMS": (0, *_PERSISTENT_PROGRAMS),
        "BLOCK_M": (64, 128, SIDE, 256) if product.bits == 16 else (16, 32, 64, 128, SIDE, 256),
        "BLOCK_N": (32, 64, 128, SIDE, 256),
        "BLOCK_K": (32, 64, 128),
        "GROUP": (4, 8, 16),
        "PARTS": (1, 2),
    }
    return Space(constants=constants, num_warps=(4, 8), num_stages=(2, 3, 4, 5, 6))


def in_loop(product: Product, config: Config) -> bool:
    """Whether weights in blocks are unpacked in the loop."""
    return product.bits < 16 and not config.constants["AHEAD"]


def refusal_of(product: Product, config: Config, gpu: Gpu) -> str | None:
    """Why a configuration cannot run, or is another one under another name."""
    c, loads, programs = config.constants, config.constants["LOADS"], config.constants["PROGRAMS"]
    if loads == OWN_WARP:
        return hopper_refusal(product, config, gpu, unpacks=in_loop(product, config))
    if SIDE in (c["BLOCK_M"], c["BLOCK_N"]):
        return f"tiles of {SIDE} rows and columns are the kernel for Hopper's"
    if in_loop(product, config):
        if programs or c["PARTS"] > 1:
            return "weights unpacked in the loop take one program a tile, written in one part"
        if c["BLOCK_N"] < 64:
            return f"BLOCK_N, the left side of a product of unpacked weights, must be 64 or more, but is {c['BLOCK_N']}"
    elif c["BLOCK_M"] < 64:
        return f"BLOCK_M must be 64 or more where weights are bf16, but is {c['BLOCK_M']}"
    if loads and gpu.architecture < 90:
        return f"tensor descriptors need compute capability 9.0, but {gpu.name} has {gpu.compute_capability}"
    if loads and (product.depth % 8 or (product.transposed and product.columns % 8)):
        return f"tensor descriptors need rows of a multiple of 16 bytes, but the depth is {product.depth}"
    if programs:
        tiles = triton.cdiv(product.rows, c["BLOCK_M"]) * triton.cdiv(product.columns, c["BLOCK_N"])
        if not loads or programs != gpu.multiprocessors or tiles <= programs:
            return (
                f"PROGRAMS {programs} needs LOADS > 0, more tiles ({tiles}) and as many multiprocessors "
                f"({gpu.name} has {gpu.multiprocessors})"
            )
    elif c["PARTS"] > 1:
        return "PARTS 2 spares shared memory only where PROGRAMS is not 0"
    threads = 32 * config.num_warps
    weights = 2 if product.geglu else 1
    sums = weights * c["BLOCK_M"] * c["BLOCK_N"] // threads
    if sums > 128:
        return f"{sums} sums a thread leave too few registers for the rest"
    unpacked = weights * c["BLOCK_N"] * c["BLOCK_K"] // threads if in_loop(product, config) else 0
    if unpacked > 128:
        return f"{unpacked} unpacked weights a thread take more registers than there are"
    needed = shared_bytes(product, config, gpu)
    if needed > gpu.shared_bytes:
        return f"{needed} bytes of shared memory, but {gpu.name} has {gpu.shared_bytes} for a block"
    return None


def shared_bytes(product: Product, config: Config, gpu: Gpu) -> int:
    """Shared memory at most: the pipeline's buffers and the tile on its way out, which share it if one program has one tile."""
    c = config.constants
    weights = 2 if product.geglu else 1
    # Pointer loads before Hopper are waited for before the product reads them: one buffer less.
    stages = config.num_stages if gpu.architecture >= 90 else config.num_stages - 1
    tile = c["BLOCK_M"] * c["BLOCK_N"] * 2 // c["PARTS"]
    if in_loop(product, config):
        codes = c["BLOCK_N"] * c["BLOCK_K"] * product.bits // 8
        factors = c["BLOCK_N"] * c["BLOCK_K"] // 32 * (8 if product.zeros else 4)
        unpacked = config.num_stages * weights * (codes + factors)
        if gpu.architecture == 100:  # its left operand comes from shared or tensor memory
            unpacked += weights * c["BLOCK_N"] * c["BLOCK_K"] * 2
        return max(stages * c["BLOCK_M"] * c["BLOCK_K"] * 2 + unpacked, tile + tile // 8) + _BARRIER_BYTES
    pipeline = stages * (c["BLOCK_M"] + weights * c["BLOCK_N"]) * c["BLOCK_K"] * 2
    if c["PROGRAMS"]:
        through = product.residual + (1 if product.columns % 8 == 0 else 2)
        return pipeline + tile * through + _BARRIER_BYTES
    return max(pipeline, tile + tile // 8) + _BARRIER_BYTES


def default_of(product: Product, gpu: Gpu) -> Config:
    """The heuristic: of a few tiles the one that finishes first, if a multiprocessor takes one tile after the other."""
    if product.bits < 16 and product.rows < (_AHEAD_FROM_ROWS_ON_HOPPER if gpu.architecture == 90 else AHEAD_FROM_ROWS):
        return _default_in_loop(product, gpu)
    choice, time = _default_dense(product, gpu)
    hopper = hopper_choice(product, gpu, {} if product.bits == 16 else {"AHEAD": 1})
    return hopper[0] if hopper is not None and _HOPPER_GAIN * hopper[1] <= time else choice


def _default_dense(product: Product, gpu: Gpu) -> tuple[Config, float]:
    """With its time, in sums."""
    roomy = gpu.shared_bytes > 2**17
    described = roomy and gpu.architecture >= 90 and not product.depth % 8
    described = described and not (product.transposed and product.columns % 8)
    (block_m, block_n, warps), time = _default_tile(product, gpu, roomy)
    tiles = triton.cdiv(product.rows, block_m) * triton.cdiv(product.columns, block_n)
    stays = described and warps == 8 and tiles > gpu.multiprocessors in _PERSISTENT_PROGRAMS
    constants = {} if product.bits == 16 else {"AHEAD": 1}
    constants |= {
        "LOADS": DESCRIPTORS if described else POINTERS,
        "PROGRAMS": gpu.multiprocessors if stays else 0,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": 64 if described else 32,
        "GROUP": 8,
        "PARTS": 2 if stays else 1,
    }
    stages = 4 if roomy and not product.residual else 3
    return Config(constants=constants, num_warps=warps, num_stages=stages), time


def _default_tile(product: Product, gpu: Gpu, roomy: bool) -> tuple[tuple[int, int, int], float]:
    """BLOCK_M, BLOCK_N and warps, and the time; a tile's rate as a share of the best is a guess from published tunings."""
    if product.depth % 16:  # loads of single values, whose addresses take the registers
        return (64, 32 if product.geglu else 64, 4), math.inf
    wide = 256 if roomy else 128
    if product.geglu:
        wide = 128 if gpu.architecture >= 90 and roomy else 64
    half_warps = 8 if gpu.architecture >= 100 else 4
    choices = {(128, wide, 8): 1.0, (128, wide // 2, half_warps): 0.85, (64, 64, 4): 0.6, (64, 32, 4): 0.45}

    def time(choice: tuple[int, int, int]) -> float:
        block_m, block_n, _ = choice
        tiles = triton.cdiv(product.rows, block_m) * triton.cdiv(product.columns, block_n)
        return float(triton.cdiv(tiles, gpu.multiprocessors) * block_m * block_n) / choices[choice]

    return min(((choice, time(choice)) for choice in choices), key=lambda pair: pair[1])


def _default_in_loop(product: Product, gpu: Gpu) -> Config:
    block_m = min(128, max(16, triton.next_power_of_2(product.rows)))
    if product.geglu and gpu.architecture != 90:
        block_m = min(block_m, 64)
    few = triton.cdiv(product.rows, block_m) * triton.cdiv(product.columns, 128) < gpu.multiprocessors
    if 2 * triton.cdiv(product.rows, block_m) * triton.cdiv(product.columns, 64) <= gpu.multiprocessors:
        block_m = min(block_m, 64)
    constants = {
        "AHEAD": 0,
        "LOADS": DESCRIPTORS if gpu.architecture in (90, 100) and not product.depth % 8 else POINTERS,
        "PROGRAMS": 0,
        "BLOCK_M": block_m,
        "BLOCK_N": 64 if few or product.geglu else 128,
        "BLOCK_K": 64,
        "GROUP": 8,
        "PARTS": 1,
    }
    return Config(constants=constants, num_warps=4, num_stages=3)
