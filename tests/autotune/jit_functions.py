"""Triton functions for the tests of ahead-of-time compilation; at the top of a module, where a process finds them."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@triton.jit
def scaled_copy(x_ptr, y_ptr, n, stride, factor, wide: tl.int64, FLAG: tl.constexpr = True, BLOCK: tl.constexpr = 64):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset * stride, offset < n, other=0.0)
    if FLAG:
        x = _twice(x)
    tl.store(y_ptr + offset, (x * factor + wide).to(y_ptr.dtype.element_ty), offset < n)


@triton.jit
def _twice(x):
    return x + x


@triton.jit
def hungry(x_ptr, y_ptr, N: tl.constexpr):
    offset = tl.arange(0, N)
    x = tl.load(x_ptr + offset)
    tl.store(y_ptr + offset, tl.sort(x))


@triton.jit
def wrong(x_ptr, y_ptr):
    tl.store(y_ptr, tl.load(x_ptr) + no_such_name)  # noqa: F821


@triton.jit(do_not_specialize=["free"])
def unspecialised(x_ptr, free):
    tl.store(x_ptr, free)


@triton.jit(do_not_specialize_on_alignment=["free"])
def unaligned(x_ptr, free):
    tl.store(x_ptr, free)


@gluon.jit
def in_gluon(x_ptr, y_ptr, N: gl.constexpr):
    offset = gl.arange(0, N, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(y_ptr + offset, gl.load(x_ptr + offset) + 1)
