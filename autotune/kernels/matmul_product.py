"""Which product a case of :mod:`autotune.kernels.matmul` is."""

from __future__ import annotations

from dataclasses import dataclass

from autotune.kernel import Case
from runtimes.errors import UsageError

BITS = {"int4": 4, "int8": 8}
NO_ZEROS, INTEGER_ZEROS, MINIMUMS = 0, 1, 2
_FLAGS = ("bias", "gelu", "geglu", "residual", "transposed", "zeros")


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
