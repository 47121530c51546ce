"""Which configurations :mod:`autotune.kernels.matmul` may take: the space, what does not fit a GPU, and the heuristic.

Constants:
    AHEAD: for weights in blocks only. 1 makes the weights bf16 in a launch of their own, and the rest is the product
        with bf16 weights; 0 unpacks them in the loop.
    LOADS: 0 by pointers, 1 by tensor descriptors. Triton 3.6's own warp specialisation is left out: on an H100 its
        results are wrong.
    PROGRAMS: 0 for a program a tile; otherwise as many programs as multiprocessors, each of which takes many tiles.
    BLOCK_M, BLOCK_N, BLOCK_K: rows, columns and depth of a tile. GROUP: tiles of rows side by side.
    PARTS: in how many pieces a tile is written.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton

from autotune.gpu import Gpu
from autotune.kernel import Case, Config, Space
from runtimes.errors import UsageError

POINTERS, DESCRIPTORS = 0, 1
BITS = {"int4": 4, "int8": 8}
NO_ZEROS, INTEGER_ZEROS, MINIMUMS = 0, 1, 2
AHEAD_FROM_ROWS = 1024
"""From here on a pass over the weights costs less than unpacking them once for every tile of rows."""
_FLAGS = ("bias", "gelu", "geglu", "residual", "transposed", "zeros")
_BARRIER_BYTES = 1024
_PERSISTENT_PROGRAMS = (114, 132, 148)
"""Multiprocessors of H100 PCIe, of H100 SXM and H200, of B200."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """What a case's ``dims`` say, flags left out being 0.

    Args:
        rows, columns, depth: of y [rows, columns] and x [rows, depth].
        bias, gelu, geglu, residual: what follows the sum.
        transposed: the weights lie as [depth, columns].
        zeros: of weights in blocks: the middle code (0), packed integers (1), or a minimum besides it (2).
        bits: of weights in blocks; 16 for bf16.
    """

    rows: int
    columns: int
    depth: int
    bias: bool
    gelu: bool
    geglu: bool
    residual: bool
    transposed: bool
    zeros: int
    bits: int

    def __post_init__(self) -> None:
        if min(self.rows, self.columns, self.depth) < 1:
            raise UsageError(f"rows, columns and depth must be at least 1, but are {self.shape}")
        if self.gelu and self.geglu:
            raise UsageError("gelu and geglu cannot both follow a product")
        if self.transposed and (self.geglu or self.bits < 16):
            raise UsageError("transposed weights must be bf16 and without geglu")
        if self.zeros not in (NO_ZEROS, INTEGER_ZEROS, MINIMUMS) or (self.zeros and self.bits == 16):
            raise UsageError(f"zeros must be 0, 1 or 2, and 0 for bf16, but is {self.zeros} for {self.bits} bits")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, columns and depth."""
        return self.rows, self.columns, self.depth

    @property
    def weight_rows(self) -> int:
        """Rows of the weights: with GeGLU those of the gate, then those of up."""
        return self.columns * 2 if self.geglu else self.columns

    @property
    def blocks(self) -> int:
        """Blocks of 32 in a row of weights."""
        return -(-self.depth // 32)


def product_of(case: Case) -> Product:
    """The product that a case is.

    Raises:
        UsageError: dims or a dtype that make no product.
    """
    dims = dict(case.dims)
    unknown = dims.keys() - {"rows", "columns", "depth", *_FLAGS}
    if unknown or case.dtype not in ("bfloat16", *BITS):
        raise UsageError(f"matmul knows no case `{case}`", hint=f"flags are {', '.join(_FLAGS)}")
    flags = {name: bool(dims.get(name, 0)) for name in _FLAGS if name != "zeros"}
    return Product(
        rows=dims["rows"],
        columns=dims["columns"],
        depth=dims["depth"],
        zeros=dims.get("zeros", 0),
        bits=BITS.get(case.dtype, 16),
        **flags,
    )


def space_of(product: Product) -> Space:
    """All that may be tried."""
    constants: dict[str, tuple[int, ...]] = {} if product.bits == 16 else {"AHEAD": (0, 1)}
    constants |= {
        "LOADS": (POINTERS, DESCRIPTORS),
        "PROGRAMS": (0, *_PERSISTENT_PROGRAMS),
        "BLOCK_M": (64, 128, 256) if product.bits == 16 else (16, 32, 64, 128, 256),
        "BLOCK_N": (32, 64, 128, 256),
        "BLOCK_K": (32, 64, 128),
        "GROUP": (4, 8, 16),
        "PARTS": (1, 2),
    }
    return Space(constants=constants, num_warps=(4, 8), num_stages=(2, 3, 4, 5))


def in_loop(product: Product, config: Config) -> bool:
    """Whether weights in blocks are unpacked in the loop."""
    return product.bits < 16 and not config.constants["AHEAD"]


def refusal_of(product: Product, config: Config, gpu: Gpu) -> str | None:
    """Why a configuration cannot run, or is another one under another name."""
    c, loads, programs = config.constants, config.constants["LOADS"], config.constants["PROGRAMS"]
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
    if product.bits < 16 and product.rows < AHEAD_FROM_ROWS:
        return _default_in_loop(product, gpu)
    roomy = gpu.shared_bytes > 2**17
    described = roomy and gpu.architecture >= 90 and not product.depth % 8
    described = described and not (product.transposed and product.columns % 8)
    block_m, block_n, warps = _default_tile(product, gpu, roomy)
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
    return Config(constants=constants, num_warps=warps, num_stages=4 if roomy and not product.residual else 3)


def _default_tile(product: Product, gpu: Gpu, roomy: bool) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_N and warps; a tile's rate as a share of the best is a guess from published tunings."""
    if product.depth % 16:  # loads of single values, whose addresses take the registers
        return 64, 32 if product.geglu else 64, 4
    wide = 256 if roomy else 128
    if product.geglu:
        wide = 128 if gpu.architecture >= 90 and roomy else 64
    half_warps = 8 if gpu.architecture >= 100 else 4
    choices = {(128, wide, 8): 1.0, (128, wide // 2, half_warps): 0.85, (64, 64, 4): 0.6, (64, 32, 4): 0.45}

    def time(choice: tuple[int, int, int]) -> float:
        block_m, block_n, _ = choice
        tiles = triton.cdiv(product.rows, block_m) * triton.cdiv(product.columns, block_n)
        return float(triton.cdiv(tiles, gpu.multiprocessors) * block_m * block_n) / choices[choice]

    return min(choices, key=time)


def _default_in_loop(product: Product, gpu: Gpu) -> Config:
    block_m = min(128, max(16, triton.next_power_of_2(product.rows)))
    few = triton.cdiv(product.rows, block_m) * triton.cdiv(product.columns, 128) < gpu.multiprocessors
    constants = {
        "AHEAD": 0,
        "LOADS": DESCRIPTORS if gpu.architecture in (90, 100) and not product.depth % 8 else POINTERS,
        "PROGRAMS": 0,
        "BLOCK_M": block_m if not product.geglu else min(block_m, 64),
        "BLOCK_N": 64 if few or product.geglu else 128,
        "BLOCK_K": 64,
        "GROUP": 8,
        "PARTS": 1,
    }
    return Config(constants=constants, num_warps=4, num_stages=3)
