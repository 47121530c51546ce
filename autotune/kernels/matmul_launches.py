"""The launches of a product: which kernel a configuration is, its grid and its constants."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import triton
from torch import Tensor

from autotune.kernel import Config, Tensors
from autotune.kernels import matmul_hopper, matmul_hopper_square
from autotune.kernels.matmul_blocks import dequantise_kernel, matmul_blocks_kernel
from autotune.kernels.matmul_dense import matmul_dense_kernel
from autotune.kernels.matmul_product import Product
from autotune.kernels.matmul_space import OWN_WARP, in_loop
from autotune.launch import Launch


def product_launches(product: Product, config: Config, tensors: Tensors) -> tuple[Launch, ...]:
    """In order: the weights made bf16, if they are to be before the product, and the product."""
    if in_loop(product, config):
        return (_blocks_launch(product, config, tensors),)
    w = tensors["w" if product.bits == 16 else "_weights"]
    hopper = config.constants["LOADS"] == OWN_WARP
    dense = (_hopper_launch if hopper else _dense_launch)(product, config, tensors, w)
    return (dense,) if product.bits == 16 else (_dequantise_launch(product, tensors), dense)


def _dense_launch(product: Product, config: Config, t: Tensors, w: Tensor) -> Launch:
    c = dict(config.constants)
    loads, programs = c.pop("LOADS"), c.pop("PROGRAMS")
    c.pop("AHEAD", None)
    tiles = triton.cdiv(product.rows, c["BLOCK_M"]) * triton.cdiv(product.columns, c["BLOCK_N"])
    modes = {
        "TRANSPOSED": product.transposed,
        "EVEN_K": product.depth % c["BLOCK_K"] == 0,
        "DESCRIPTORS": loads > 0,
        "DESCRIPTOR_Y": loads > 0 and product.columns % 8 == 0,
        "PERSISTENT": programs > 0,
        "GEGLU": product.geglu,
    }
    return _launch(product, config, t, matmul_dense_kernel, programs or tiles, {"w_ptr": w}, c | modes)


def _hopper_launch(product: Product, config: Config, t: Tensors, w: Tensor) -> Launch:
    c = config.constants
    constants: dict[str, int] = {"GROUP": c["GROUP"], "STAGES": config.num_stages}
    function: Any = matmul_hopper_square.matmul_hopper_square_kernel
    registers = matmul_hopper_square.REGISTERS
    if c["BLOCK_M"] != matmul_hopper_square.SIDE:
        function, registers = matmul_hopper.matmul_hopper_kernel, matmul_hopper.REGISTERS
        constants |= {"BLOCK_M": c["BLOCK_M"], "BLOCK_N": c["BLOCK_N"], "GEGLU": product.geglu}
        constants["BUFFERS"] = matmul_hopper.parts_at_once(c["BLOCK_M"], c["BLOCK_N"])
    tiles = triton.cdiv(product.rows, c["BLOCK_M"]) * triton.cdiv(product.columns, c["BLOCK_N"])
    launch = _launch(product, config, t, function, c["PROGRAMS"] or tiles, {"w_ptr": w}, constants)
    # The warps of one consumer: Gluon adds the others.
    return dataclasses.replace(launch, num_warps=4, max_registers=registers)


def _blocks_launch(product: Product, config: Config, t: Tensors) -> Launch:
    c = {name: config.constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP")}
    tiles = triton.cdiv(product.rows, c["BLOCK_M"]) * triton.cdiv(product.columns, c["BLOCK_N"])
    modes = {
        "BITS": product.bits,
        "EVEN_K": product.depth % c["BLOCK_K"] == 0,
        "DESCRIPTORS": config.constants["LOADS"] > 0,
        "GEGLU": product.geglu,
    }
    weights = {f"{name}_ptr": t.get(name) for name in ("codes", "scales", "zeros", "minimums")}
    return _launch(product, config, t, matmul_blocks_kernel, tiles, weights, c | modes)


def _launch(
    product: Product,
    config: Config,
    t: Tensors,
    function: Any,
    programs: int,
    weights: Mapping[str, Tensor | None],
    constants: dict[str, int],
) -> Launch:
    pointers = {"x_ptr": t["x"], **weights, "y_ptr": t["y"]}
    pointers |= {"bias_ptr": t.get("bias"), "residual_ptr": t.get("residual")}
    rows, columns, depth = product.shape
    return Launch(
        function=function,
        grid=(programs, 1, 1),
        arguments={name: p for name, p in pointers.items() if p is not None}
        | {"rows": rows, "columns": columns, "depth": depth},
        constants={name: None for name, p in pointers.items() if p is None} | {**constants, "GELU": product.gelu},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _dequantise_launch(product: Product, t: Tensors) -> Launch:
    """16 rows by 256 columns a program: bound by memory, so that nothing is left to tune."""
    pointers = {f"{name}_ptr": t.get(name) for name in ("codes", "scales", "zeros", "minimums")}
    return Launch(
        function=dequantise_kernel,
        grid=(triton.cdiv(product.weight_rows, 16), triton.cdiv(product.depth, 256), 1),
        arguments={name: p for name, p in pointers.items() if p is not None}
        | {"w_ptr": t["_weights"], "rows": product.weight_rows, "depth": product.depth},
        constants={name: None for name, p in pointers.items() if p is None}
        | {"BITS": product.bits, "BLOCK_N": 16, "BLOCK_K": 256},
        num_warps=4,
        num_stages=1,
    )
