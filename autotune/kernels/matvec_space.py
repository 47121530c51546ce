"""What :mod:`autotune.kernels.matvec` may be configured to: shapes of launches, search space, refusals, heuristic.

``DOT``: 0 multiply-adds, 1 matrix units, and without shared memory :data:`PIECES` and :data:`SPREAD`. ``BLOCK_N``, ``BLOCK_K``: rows and depth of a tile of weights. ``LOOP``: tiles that a
program works through. ``SPLIT``: parts of the depth, each to a program of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import triton

from autotune.gpu import Gpu
from autotune.kernel import Case, Config, Space
from autotune.kernels.dependent import best_dependent, dependent_refusal
from autotune.kernels.matmul_product import INTEGER_ZEROS, MINIMUMS, NO_ZEROS

BLOCK = 32
MOST_ROWS = 16
MOST_ROWS_BY_FMA = 8
MOST_ROWS_SPREAD = 2
PIECES, SPREAD = 2, 3
"""Values of ``DOT``: matrix units on weights that stay in the registers into which they were loaded."""
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
    units: tuple[int, ...] = (1,) if row.rows > MOST_ROWS_BY_FMA else (0, 1)
    units += (PIECES, SPREAD) if row.bits < 16 and row.rows <= MOST_ROWS_SPREAD else (PIECES,)
    return Space(
        constants={
            "DOT": units,
            "BLOCK_N": (1, 2, 4, 8, 16, 32, 64),
            "BLOCK_K": (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
            "LOOP": (1, 2, 4),
            "SPLIT": (1, 2, 3, 4, 5, 6, 8),
            "DEPENDENT": (0, 1),
        },
        num_warps=(1, 2, 4, 8, 16),
        num_stages=(1, 2, 3, 4, 5),
    )


def refusal_of(row: Row, config: Config, gpu: Gpu) -> str | None:
    """Why a configuration cannot run, or why it cannot be any good."""
    return next(_refusals(row, config, gpu), None)


def _refusals(row: Row, config: Config, gpu: Gpu) -> Iterator[str]:
    c, kinds = config.constants, 2 if row.geglu else 1
    dependent = dependent_refusal(c["DEPENDENT"], gpu)
    if dependent is not None:
        yield dependent
    if c["DOT"] >= PIECES:
        yield from _pieces_refusals(row, config, gpu)
        return
    chunk, block, threads = row.chunk(config), c["BLOCK_K"], 32 * config.num_warps
    if c["SPLIT"] > 1 and chunk * (c["SPLIT"] - 1) >= row.depth:
        yield f"{c['SPLIT']} parts of {chunk} leave some of them nothing of a depth of {row.depth}"
    if block >= 2 * max(chunk, 64):
        yield f"most of a tile {block} deep lies outside a depth of {chunk}"
    if c["LOOP"] > 1 and (c["DOT"] or chunk > block):
        yield "only tiles as deep as the part share their activations in a loop"
    steps = 1 if chunk <= block else -(-chunk // block)
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


def _pieces_refusals(row: Row, config: Config, gpu: Gpu) -> Iterator[str]:
    c, warps, ahead, spread = config.constants, config.num_warps, config.num_stages, config.constants["DOT"] == SPREAD
    tiles, batch = c["LOOP"] * (2 if row.geglu else 1), 16 if row.rows > 8 else 8
    deep = 4 * row.piece * warps
    steps = -(-row.depth // deep)
    if row.depth % row.piece or row.residual == POST_NORM or c["SPLIT"] > 1 or c["BLOCK_N"] != 16 or c["LOOP"] > 4:
        yield "pieces come in up to 4 tiles of 16 columns, over the whole depth, and no norm follows"
    if c["BLOCK_K"] != deep:
        yield f"a step of {warps} warps is {deep} deep, not {c['BLOCK_K']}"
    if ahead > steps:
        yield f"{steps} steps do not fill {ahead} stages"
    if spread and (row.bits == 16 or row.rows > MOST_ROWS_SPREAD):
        yield f"only {MOST_ROWS_SPREAD} rows of activations can be spread over the blocks of weights"
    if not spread and (row.norm or row.zeros == MINIMUMS):
        yield "pieces that become bf16 are without minimums, and no norm precedes"
    if spread:
        registers, shared = 60 + ahead * 14 * tiles + 4 * tiles, _spread_bytes(row, -(-steps // ahead) * ahead, warps)
    else:
        x = row.piece // 2 * (batch // 8)
        registers, shared = 60 + ahead * ((8 if row.bits == 16 else 12) * tiles + x) + batch // 2 * tiles, 0
    shared += 64 * batch * warps
    if shared > gpu.shared_bytes:
        yield f"{shared} bytes of shared memory, but {gpu.name} has {gpu.shared_bytes}"
    if registers > 235 or registers * 24 * warps > 65536:
        yield f"about {registers} registers a thread"
    if triton.knobs.runtime.interpret:
        yield "Triton's interpreter does not run Gluon, in which the kernels for pieces are written"


def _spread_bytes(row: Row, steps: int, warps: int) -> int:
    """Shared memory for activations and their sums over pieces; steps are staged in groups of up to 8."""
    group: int = min(8, triton.next_power_of_2(steps))
    return -(-steps // group) * group * warps * (row.rows * 256 + 32)


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
    """The heuristic, from what an H100 was fastest with; where a GPU or Triton's interpreter cannot, what all can."""
    for chosen in _preferred(row, gpu):
        if refusal_of(row, chosen, gpu) is None:
            return chosen
    return _anywhere(row, gpu)


def _config(gpu: Gpu, dot: int, n: int, k: int, *, loop: int = 1, warps: int, stages: int = 1) -> Config:
    constants = {"DOT": dot, "BLOCK_N": n, "BLOCK_K": k, "LOOP": loop, "SPLIT": 1, "DEPENDENT": best_dependent(gpu)}
    return Config(constants=constants, num_warps=warps, num_stages=stages)


def _preferred(row: Row, gpu: Gpu) -> Iterator[Config]:
    whole = triton.next_power_of_2(row.depth)
    if row.bits == 4 and row.rows <= 2 and (row.rows == 2 or whole > 1.5 * row.depth):
        warps = 4 if row.depth <= 4096 else 8
        steps = -(-row.depth // (128 * warps))
        ahead = steps if steps <= 5 else min(4, -(-steps // 2))
        yield _config(gpu, SPREAD, 16, 128 * warps, warps=warps, stages=max(1, ahead // (2 if row.geglu else 1)))
    if row.bits < 16 and row.rows > 2:
        warps = 4 if row.depth <= 8192 else 8
        loop = 1 if row.geglu or row.columns < 4096 else 2
        stages = 2 if row.depth > 8192 or row.bits == 8 else 1
        yield _config(gpu, PIECES, 16, 4 * row.piece * warps, loop=loop, warps=warps, stages=stages)
    if row.bits == 16 and row.rows > 4:
        if row.depth > 8192:
            yield _config(gpu, PIECES, 16, 256, warps=8, stages=5)
        yield _config(gpu, 1, 32, 256, warps=4, stages=4)
    if row.bits == 16 and row.rows <= 2 and row.depth > 1024:
        k = min(whole, 4096 if row.depth <= 4096 else 8192)
        yield _config(gpu, 0, 1, k, warps=min(8, k // 256))
    if row.bits == 8 and row.rows == 1 and row.depth > 2048:
        yield _config(gpu, 0, 2, 4096, warps=8)
    if row.bits == 4 and row.rows == 1 and row.depth > 2048:
        yield _config(gpu, 0, 4, 4096, loop=2 if row.columns >= 8192 and row.depth <= 4096 else 1, warps=4)


def _anywhere(row: Row, gpu: Gpu) -> Config:
    """Programs of 128 threads, enough of them to fill the GPU, each thread with a few loads on its way."""
    threads, rooms = 128, gpu.multiprocessors * _SM_THREADS // 128
    if row.rows > (4 if row.bits > 4 else 2):
        block_n = 16 if row.columns < 8 * rooms else 32
        block_k = max(64, min(256 if row.bits == 4 else 128, triton.next_power_of_2(row.depth)))
        split = 1
        while split < 4 and -(-row.columns // block_n) * split < rooms // 4 and row.depth >= 1024 * split:
            split *= 2
        constants = {"DOT": 1, "BLOCK_N": block_n, "BLOCK_K": block_k, "LOOP": 1, "SPLIT": split}
        constants |= {"DEPENDENT": best_dependent(gpu)}
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
    while block_k >= row.depth and loop < 4 and row.columns >= block_n * loop * rooms:
        loop *= 2
    constants = {"DOT": 0, "BLOCK_N": block_n, "BLOCK_K": block_k, "LOOP": loop, "SPLIT": 1}
    constants |= {"DEPENDENT": best_dependent(gpu)}
    return _fitting(row, Config(constants=constants, num_warps=threads // 32, num_stages=1), gpu)


def _fitting(row: Row, config: Config, gpu: Gpu) -> Config:
    """The configuration with as many stages as fit."""
    for stages in range(config.num_stages, 1, -1):
        candidate = Config(constants=config.constants, num_warps=config.num_warps, num_stages=stages)
        if refusal_of(row, candidate, gpu) is None:
            return candidate
    return Config(constants=config.constants, num_warps=config.num_warps, num_stages=1)
