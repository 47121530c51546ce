"""What :mod:`autotune.kernels.matvec` may be configured to: shapes of launches, search space, refusals, heuristic.

``DOT``: matrix units or multiply-adds. ``BLOCK_N``, ``BLOCK_K``: rows and depth of a tile of weights. ``LOOP``: tiles that a
program works through. ``SPLIT``: parts of the depth, each to a program of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import triton

from autotune.gpu import Gpu
from autotune.kernel import Case, Config, Space
from autotune.kernels.matmul_space import INTEGER_ZEROS, MINIMUMS, NO_ZEROS

BLOCK = 32
MOST_ROWS = 16
MOST_ROWS_BY_FMA = 8
ADD, POST_NORM = 1, 2
"""Values of ``residual``."""
BITS = {"bfloat16": 16, "int8": 8, "int4": 4}
_SM_THREADS = 2048
_REGISTERS = 200
"""What a thread may need for values; the rest of its 255 holds addresses."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A case in its kernel's terms: ``rows`` of activations, ``columns`` of y, ``depth`` of W.

    ``residual`` is 0, :data:`ADD` or :data:`POST_NORM`; ``zeros`` is one of ``matmul_space``'s grids; ``scale_bits`` 32 or 16.
    """

    bits: int
    rows: int
    columns: int
    depth: int
    norm: bool = False
    geglu: bool = False
    residual: int = 0
    fp32: bool = False
    zeros: int = NO_ZEROS
    scale_bits: int = 32

    def __post_init__(self) -> None:
        if self.zeros not in (NO_ZEROS, INTEGER_ZEROS, MINIMUMS) or (self.zeros and self.bits == 16):
            raise ValueError(f"no weights of {self.bits} bits have the zeros {self.zeros}")

    @property
    def weight_rows(self) -> int:
        """Rows of W: gate and up for GeGLU."""
        return self.columns * (2 if self.geglu else 1)

    @property
    def blocks(self) -> int:
        """Blocks in a row of W."""
        return -(-self.depth // BLOCK)

    @property
    def piece(self) -> int:
        """Weights in 16 bytes."""
        return 128 // self.bits

    def chunk(self, config: Config) -> int:
        """Depth of one part: a multiple of 64, and of the tile where it takes several tiles."""
        split, block = config.constants["SPLIT"], config.constants["BLOCK_K"]
        if split == 1:
            return self.depth
        chunk = -(-self.depth // (64 * split)) * 64
        return chunk if chunk <= block else -(-chunk // block) * block

    def programs(self, config: Config) -> int:
        """Programs along the columns of y."""
        return -(-self.columns // (config.constants["BLOCK_N"] * config.constants["LOOP"]))

    def counters(self, config: Config) -> int:
        """One for each tile, and one for all."""
        return self.programs(config) * config.constants["LOOP"] + 1


def row_of(case: Case) -> Row:
    """The case in its kernel's terms."""
    d = case.dims
    return Row(
        bits=BITS[case.dtype],
        rows=d["rows"],
        columns=d["columns"],
        depth=d["depth"],
        norm=bool(d.get("norm")),
        geglu=bool(d.get("geglu")),
        residual=d.get("residual", 0),
        fp32=bool(d.get("fp32")),
        zeros=d.get("zeros", NO_ZEROS),
        scale_bits=d.get("scale_bits", 32),
    )


def space_of(row: Row) -> Space:
    """Everything that may be tried."""
    units = (1,) if row.rows > MOST_ROWS_BY_FMA else (0, 1)
    return Space(
        constants={
            "DOT": units,
            "BLOCK_N": (1, 2, 4, 8, 16, 32, 64),
            "BLOCK_K": (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
            "LOOP": (1, 2, 4, 8, 16),
            "SPLIT": (1, 2, 3, 4, 5, 6, 8),
        },
        num_warps=(1, 2, 4, 8, 16),
        num_stages=(1, 2, 3, 4, 5),
    )


def refusal_of(row: Row, config: Config, gpu: Gpu) -> str | None:
    """Why a configuration cannot run, or why it cannot be any good."""
    return next(_refusals(row, config, gpu), None)


def _refusals(row: Row, config: Config, gpu: Gpu) -> Iterator[str]:
    c, kinds = config.constants, 2 if row.geglu else 1
    chunk, block, threads = row.chunk(config), c["BLOCK_K"], 32 * config.num_warps
    if c["SPLIT"] > 1 and chunk * (c["SPLIT"] - 1) >= row.depth:
        yield f"{c['SPLIT']} parts of {chunk} leave some of them nothing of a depth of {row.depth}"
    if block >= 2 * max(chunk, 64):
        yield f"most of a tile {block} deep lies outside a depth of {chunk}"
    if c["LOOP"] > 1 and (c["DOT"] or chunk > block):
        yield "only tiles as deep as the part share their activations in a loop"
    steps = c["LOOP"] if chunk <= block else -(-chunk // block)
    if config.num_stages > max(1, steps):
        yield f"{steps} steps do not fill {config.num_stages} stages"
    shared = _shared_bytes(row, config)
    if shared > gpu.shared_bytes:
        yield f"{shared} bytes of shared memory, but {gpu.name} has {gpu.shared_bytes}"
    if c["BLOCK_N"] * block < row.piece * threads:
        yield f"a tile of {c['BLOCK_N']} by {block} leaves some of {threads} threads without a load"
    if c["DOT"]:
        if c["BLOCK_N"] < 16 or not 64 <= block <= 512:
            yield "matrix units want tiles of 16 rows, 64 to 512 deep"
        if kinds * c["BLOCK_N"] * block > 128 * threads and row.bits < 16:
            yield f"{kinds} tiles of {c['BLOCK_N']} by {block} take more registers than {threads} threads have"
        return
    if row.rows > MOST_ROWS_BY_FMA:
        yield f"multiply-adds take {MOST_ROWS_BY_FMA} rows at most"
    if block < row.piece:
        yield f"a thread loads {row.piece} weights at once"
    registers = _fma_registers(row, config)
    if registers > _REGISTERS:
        yield f"about {registers} registers a thread"


def _fma_registers(row: Row, config: Config) -> int:
    """fp32 activations, weights as loaded (and one piece as numbers), and sums; none crosses threads."""
    c, threads = config.constants, 32 * config.num_warps
    across = max(1, c["BLOCK_K"] // row.piece // threads)  # pieces of a row that one thread holds
    down = max(1, c["BLOCK_N"] * c["BLOCK_K"] // row.piece // threads // across)
    kinds = 2 if row.geglu else 1
    sums = row.rows * across * down * kinds
    return row.rows * across * (row.piece + 1) + across * down * kinds * 4 + row.piece + sums


def _shared_bytes(row: Row, config: Config) -> int:
    """Tiles that are on their way, and for the matrix units the activations and weights that they read."""
    c, kinds = config.constants, 2 if row.geglu else 1
    tile = c["BLOCK_N"] * c["BLOCK_K"]
    scales = 0 if row.bits == 16 else tile // BLOCK * row.scale_bits // 8
    one = kinds * (tile * row.bits // 8 + scales)
    ahead = 0 if config.num_stages == 1 else config.num_stages
    if not c["DOT"]:
        return ahead * one + (0 if c["LOOP"] > 1 else ahead * 2 * row.rows * c["BLOCK_K"])
    batch = 16 if row.rows > 8 else 8
    operands = 2 * batch * c["BLOCK_K"] + (kinds * 2 * tile if row.bits < 16 else 0)
    return max(ahead, 1) * (one + 2 * batch * c["BLOCK_K"]) + operands


def default_of(row: Row, gpu: Gpu) -> Config:
    """The heuristic: programs of 128 threads, enough of them to fill the GPU, each thread with a few loads on its way."""
    threads, rooms = 128, gpu.multiprocessors * _SM_THREADS // 128
    if row.rows > (4 if row.bits > 4 else 2):
        block_n = 16 if row.columns < 8 * rooms else 32
        block_k = max(64, min(256 if row.bits == 4 else 128, triton.next_power_of_2(row.depth)))
        split = 1
        while split < 4 and -(-row.columns // block_n) * split < rooms // 4 and row.depth >= 1024 * split:
            split *= 2
        constants = {"DOT": 1, "BLOCK_N": block_n, "BLOCK_K": block_k, "LOOP": 1, "SPLIT": split}
        warps = min(threads // 32, block_n * block_k // (32 * row.piece))
        return _fitting(row, Config(constants=constants, num_warps=warps, num_stages=4), gpu)
    block_k = min(triton.next_power_of_2(row.depth), threads * row.piece)
    if block_k < row.depth < 0.75 * block_k * -(-row.depth // block_k):
        block_k //= 2  # the last step is mostly empty
    threads = max(32, min(threads, block_k // row.piece))  # where a row's pieces meet them all, nothing is handed round
    least = max(1, threads * row.piece // block_k)
    block_n = max(4 // row.rows // (2 if row.geglu else 1), least)
    while block_n > least and row.columns < block_n * rooms // 2:
        block_n //= 2
    loop = 1
    while block_k >= row.depth and loop < 8 and row.columns >= block_n * loop * rooms:
        loop *= 2
    constants = {"DOT": 0, "BLOCK_N": block_n, "BLOCK_K": block_k, "LOOP": loop, "SPLIT": 1}
    return _fitting(row, Config(constants=constants, num_warps=threads // 32, num_stages=1), gpu)


def _fitting(row: Row, config: Config, gpu: Gpu) -> Config:
    """The configuration with as many stages as fit."""
    for stages in range(config.num_stages, 1, -1):
        candidate = Config(constants=config.constants, num_warps=config.num_warps, num_stages=stages)
        if refusal_of(row, candidate, gpu) is None:
            return candidate
    return Config(constants=config.constants, num_warps=config.num_warps, num_stages=1)
