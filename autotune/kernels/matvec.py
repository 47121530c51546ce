"""Products of a decode step: few rows of activations with a matrix that is read once, and what stands beside them.

Legend: M rows of activations, K depth, N rows of W, F columns of y (N, or N / 2 for GeGLU), n = K / 32 blocks in a row of W,
P bytes of codes.

    y = x' W^T                                  x' = x, or rms(x) norm_scale, rounded to bf16
    geglu:      y = gelu(x' A^T) (x' B^T)       W [2F, K] holds A, then B
    residual:   y = h + x' W^T
    post-norm:  y = h + rms(x' W^T) post_scale  rounded after the norm and after the sum

W is bf16, or codes of 4 or 8 bits in blocks of 32 along K (:mod:`autotune.kernels.matmul_blocks`), with scales in fp32 or,
for fewer bytes, in bf16. From x' to y all is fp32 and rounded once. transformers rounds gate and up to bf16 on the way;
not to do so errs less and costs nothing. The bytes of W are the floor.

A post-norm needs whole rows, which no program has: the last one to end makes them, from sums in the L2 cache. One program
does for all rows, so it pays for few of them, where it takes the place of a launch. Many rows are better off with the residual form of
:mod:`autotune.kernels.rms_norm`, a program for each.

Source: Gemma 3 report (arXiv 2503.19786), section 2; RMSNorm: arXiv 1910.07467; GeGLU: arXiv 2002.05202.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from autotune.chosen import chosen_config
from autotune.draw import Draw
from autotune.gpu import GPUS, Gpu, present
from autotune.kernel import Case, Config, Cost, Kernel, Space, Stage, Tensors, Use
from autotune.kernels.matmul_blocks import dequantise_oracle
from autotune.kernels.matmul_product import INTEGER_ZEROS, MINIMUMS
from autotune.kernels.matvec_kernel import matvec_kernel
from autotune.kernels.matvec_pieces import matvec_pieces_kernel
from autotune.kernels.matvec_space import (
    ADD,
    BLOCK,
    MOST_ROWS,
    PIECES,
    POST_NORM,
    SPREAD,
    Row,
    default_of,
    refusal_of,
    row_of,
    space_of,
)
from autotune.kernels.matvec_spread import matvec_spread_kernel
from autotune.kernels.product_case import drawn_inputs, product_bucket
from autotune.kernels.rms_norm import EPS, rms_norm_oracle
from autotune.launch import Launch
from autotune.model_shapes import ModelShapes
from autotune.tensor_checks import check_tensor
from runtimes.errors import UsageError

_POINTERS = {
    "x": "x_ptr", "norm": "norm_ptr", "w": "w_ptr", "codes": "w_ptr", "scales": "scales_ptr", "zeros": "zeros_ptr",
    "minimums": "minimums_ptr", "y": "y_ptr", "h": "h_ptr", "post": "post_ptr", "_parts": "parts_ptr",
    "_whole": "whole_ptr", "_zero_counters": "counters_ptr",
}  # fmt: skip


def matvec_oracle(
    x_MK: Tensor,
    w_NK: Tensor,
    *,
    norm_K: Tensor | None = None,
    geglu: bool = False,
    h_MF: Tensor | None = None,
    post_F: Tensor | None = None,
) -> Tensor:
    """The torch oracle: [M, F] in the dtype of ``x_MK``, rounded where transformers rounds."""
    if norm_K is not None:
        x_MK = rms_norm_oracle(x_MK, norm_K)
    y_MF = F.linear(x_MK, w_NK)
    if geglu:
        gate_MF, up_MF = y_MF.chunk(2, dim=1)
        y_MF = F.gelu(gate_MF, approximate="tanh") * up_MF
    if post_F is not None:
        y_MF = rms_norm_oracle(y_MF, post_F)
    return y_MF if h_MF is None else h_MF + y_MF


def matvec(
    x_MK: Tensor,
    w_NK: Tensor,
    *,
    norm_K: Tensor | None = None,
    geglu: bool = False,
    h_MF: Tensor | None = None,
    post_F: Tensor | None = None,
    fp32: bool = False,
    config: Config | None = None,
) -> Tensor:
    """The product with bf16 weights: [M, F], bf16 or fp32.

    Args:
        x_MK: bf16, 16 rows at most.
        w_NK: bf16; [2F, K] for ``geglu``.
        norm_K: fp32, 1 + w of a norm before the product.
        h_MF: bf16, what y is added to.
        post_F: fp32, 1 + w of a norm after the product; it goes with ``h_MF``.
        fp32: whether y is fp32.
        config: None takes what was tuned for this GPU, or the heuristic.

    Raises:
        UsageError: a shape, dtype or device that does not fit, or a configuration that the GPU refuses.
    """
    return _run({"x": x_MK, "w": w_NK, "norm": norm_K, "h": h_MF, "post": post_F}, 16, geglu, fp32, config)


def matvec_blocks(
    x_MK: Tensor,
    codes_NP: Tensor,
    scales_Nn: Tensor,
    *,
    bits: Literal[4, 8],
    zeros_NP: Tensor | None = None,
    minimums_Nn: Tensor | None = None,
    norm_K: Tensor | None = None,
    geglu: bool = False,
    h_MF: Tensor | None = None,
    post_F: Tensor | None = None,
    fp32: bool = False,
    config: Config | None = None,
) -> Tensor:
    """The product with weights in blocks of 32, K a multiple of it: [M, F], bf16 or fp32.

    Args:
        x_MK: bf16, 16 rows at most.
        codes_NP: uint8, as ``graphs.packing`` packs them, [N, n * 4 * bits].
        scales_Nn: fp32 or bf16.
        bits: of a code.
        zeros_NP: uint8 [N, ceil(n * bits / 8)]; None for the middle code.
        minimums_Nn: fp32, what is taken from a block besides the middle code.
        norm_K, geglu, h_MF, post_F, fp32, config: see :func:`matvec`.

    Raises:
        UsageError: a shape, dtype or device that does not fit, or a configuration that the GPU refuses.
    """
    if zeros_NP is not None and minimums_Nn is not None:
        raise UsageError("weights in blocks have zeros or minimums, but both were given")
    weights = {"codes": codes_NP, "scales": scales_Nn, "zeros": zeros_NP, "minimums": minimums_Nn}
    given = {"x": x_MK, **weights, "norm": norm_K, "h": h_MF, "post": post_F}
    return _run(given, bits, geglu, fp32, config)


def _run(given: dict[str, Tensor | None], bits: int, geglu: bool, fp32: bool, config: Config | None) -> Tensor:
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    x_MK, weights = tensors["x"], tensors["w" if bits == 16 else "codes"]
    if "post" in tensors and "h" not in tensors:
        raise UsageError("a norm after the product is added to h, but h is missing")
    dims = {"rows": x_MK.shape[0], "columns": weights.shape[0] // (2 if geglu else 1), "depth": x_MK.shape[1]}
    dims |= {"norm": int("norm" in tensors), "geglu": int(geglu), "fp32": int(fp32)}
    dims["residual"] = POST_NORM if "post" in tensors else ADD if "h" in tensors else 0
    if bits < 16:
        dims["zeros"] = INTEGER_ZEROS if "zeros" in tensors else MINIMUMS if "minimums" in tensors else 0
        dims["scale_bits"] = 8 * tensors["scales"].itemsize
    case = Case(dtype="bfloat16" if bits == 16 else f"int{bits}", dims=dims)
    _check(row_of(case), tensors)
    gpu = present(x_MK.device.index or 0) if x_MK.is_cuda else GPUS["h100"]
    kernel = Matvec()
    config = config or chosen_config(kernel, case, x_MK.device)
    refused = kernel.refusal(case, config, gpu)
    if refused is not None:
        raise UsageError(f"matvec cannot run {config} on {gpu.name}: {refused}")
    return kernel.run(case, config, tensors)["y"]


def _shapes(row: Row) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every input that the case has."""
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"x": ((row.rows, row.depth), torch.bfloat16)}
    if row.bits == 16:
        shapes["w"] = ((row.weight_rows, row.depth), torch.bfloat16)
    else:
        shapes["codes"] = ((row.weight_rows, row.blocks * 4 * row.bits), torch.uint8)
        shapes["scales"] = ((row.weight_rows, row.blocks), torch.float32 if row.scale_bits == 32 else torch.bfloat16)
    if row.zeros == INTEGER_ZEROS:
        shapes["zeros"] = ((row.weight_rows, -(-row.blocks * row.bits // 8)), torch.uint8)
    if row.zeros == MINIMUMS:
        shapes["minimums"] = ((row.weight_rows, row.blocks), torch.float32)
    if row.norm:
        shapes["norm"] = ((row.depth,), torch.float32)
    if row.residual:
        shapes["h"] = ((row.rows, row.columns), torch.bfloat16)
    if row.residual == POST_NORM:
        shapes["post"] = ((row.columns,), torch.float32)
    return shapes


def _check(row: Row, tensors: Tensors) -> None:
    if row.rows > MOST_ROWS:
        raise UsageError(f"matvec takes {MOST_ROWS} rows at most, but x has {row.rows}", hint="matmul takes more")
    if row.bits < 16 and row.depth % BLOCK:
        raise UsageError(f"weights in blocks have a depth that {BLOCK} divides, but x has {row.depth} columns")
    for name, (shape, dtype) in _shapes(row).items():
        check_tensor(name, tensors[name], shape=shape, dtypes=(dtype,), device=tensors["x"].device)


class Matvec(Kernel):
    """Dims ``rows``, ``columns``, ``depth``, and the flags of :class:`~autotune.kernels.matvec_space.Row`."""

    name: ClassVar[str] = "matvec"
    dtypes: ClassVar[tuple[str, ...]] = ("bfloat16", "int8", "int4")
    stages: ClassVar[tuple[Stage, ...]] = ("prefill", "decode")
    source: ClassVar[tuple[str, ...]] = (
        *(
            f"autotune.kernels.matvec{part}"
            for part in ("", "_finish", "_kernel", "_pieces", "_space", "_spread", "_weights")
        ),
        "autotune.kernels.dependent",
        "autotune.kernels.matmul_tile",
    )

    def uses(self, model: ModelShapes, stage: Stage, *, batch: int, context: int, dtype: str) -> tuple[Use, ...]:
        if stage == "vision" or batch > MOST_ROWS:
            return ()
        queries = model.heads * model.head_dim
        qkv = queries + 2 * model.kv_heads * model.head_dim
        # The norm ahead of each product comes with the residual before it: see rms_norm.
        products = {
            "qkv": ({"columns": qkv, "depth": model.hidden}, model.layers),
            "attention out": ({"columns": model.hidden, "depth": queries}, model.layers),
            "gate and up": ({"columns": model.ffn, "depth": model.hidden, "geglu": 1}, model.layers),
            "down": ({"columns": model.hidden, "depth": model.ffn}, model.layers),
            "head": ({"columns": model.vocab, "depth": model.hidden, "fp32": 1}, 1),
        }
        if stage == "prefill":  # of a prompt only the last token's logits are wanted
            products = {"head": products["head"]}
        # int4 weights come with integer zero points, int8 ones without (gemma3_compile.formats).
        grid = {"zeros": INTEGER_ZEROS} if dtype == "int4" else {}
        return tuple(
            Use(name=name, case=Case(dtype=dtype, dims={"rows": batch} | dims | grid), count=count)
            for name, (dims, count) in products.items()
        )

    def bucket(self, case: Case) -> str:
        return product_bucket(case, MOST_ROWS)

    def space(self, case: Case) -> Space:
        return space_of(row_of(case))

    def refusal(self, case: Case, config: Config, gpu: Gpu) -> str | None:
        return refusal_of(row_of(case), config, gpu)

    def default(self, case: Case, gpu: Gpu) -> Config:
        return default_of(row_of(case), gpu)

    def inputs(self, case: Case, *, device: torch.device | str, seed: int = 0) -> Tensors:
        row, draw = row_of(case), Draw(device, seed)
        return drawn_inputs(_shapes(row), row.bits, row.depth, draw, deviation=3.0 if row.norm else 1.0)

    def outputs(self, case: Case, config: Config, *, device: torch.device | str) -> Tensors:
        row, split = row_of(case), config.constants["SPLIT"]
        dtype = torch.float32 if row.fp32 else torch.bfloat16
        written = {"y": torch.empty(row.rows, row.columns, dtype=dtype, device=device)}
        if split > 1:
            parts = (split, 2 if row.geglu else 1, row.rows, row.columns)
            written["_parts"] = torch.empty(parts, dtype=torch.float32, device=device)
        if row.residual == POST_NORM:
            written["_whole"] = torch.empty(row.rows, row.columns, dtype=torch.float32, device=device)
        if len(written) > 1:
            written["_zero_counters"] = torch.zeros(row.counters(config), dtype=torch.int32, device=device)
        return written

    def launches(self, case: Case, config: Config, tensors: Tensors) -> tuple[Launch, ...]:
        row, c = row_of(case), config.constants
        pointers = {_POINTERS[name]: tensor for name, tensor in tensors.items()}
        absent = {name: None for name in _POINTERS.values() if name not in pointers}
        shape = {"BATCH": row.rows, "DEPTH": row.depth, "BITS": row.bits, "GEGLU": row.geglu}
        if c["DOT"] >= PIECES:
            return (_launch_of_pieces(row, config, pointers, shape),)
        derived = {"CHUNK": row.chunk(config), "STAGES": config.num_stages, "BLOCK_F": 512 * config.num_warps}
        launch = Launch(
            function=matvec_kernel,
            grid=(row.programs(config), c["SPLIT"], 1),
            arguments=pointers | {"columns": row.columns, "eps": EPS},
            constants=absent | shape | derived | dict(c) | {"DOT": bool(c["DOT"]), "DEPENDENT": bool(c["DEPENDENT"])},
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            dependent=bool(c["DEPENDENT"]),
        )
        return (launch,)

    def oracle(self, case: Case, inputs: Tensors) -> Tensors:
        row, t = row_of(case), inputs
        w_NK = t["w"] if row.bits == 16 else _dequantised(row, t)
        y_MF = matvec_oracle(
            t["x"],
            w_NK.to(t["x"].dtype),
            norm_K=t.get("norm"),
            geglu=row.geglu,
            h_MF=t.get("h"),
            post_F=t.get("post"),
        )
        return {"y": y_MF.float() if row.fp32 else y_MF}

    def cost(self, case: Case) -> Cost:
        row = row_of(case)
        sizes = [dtype.itemsize * torch.Size(shape).numel() for shape, dtype in _shapes(row).values()]
        output = (4 if row.fp32 else 2) * row.rows * row.columns
        return Cost(bytes=sum(sizes) + output, flops=2 * row.rows * row.weight_rows * row.depth)


def _launch_of_pieces(row: Row, config: Config, pointers: Mapping[str, Tensor], shape: Mapping[str, int]) -> Launch:
    """By the matrix units, on weights that stay where they were loaded."""
    c = config.constants
    spread = c["DOT"] == SPREAD
    optional = ["scales_ptr", "zeros_ptr", "h_ptr", *(("norm_ptr", "minimums_ptr") if spread else ())]
    absent: dict[str, int | None] = {name: None for name in optional if name not in pointers}
    ways = {"TILES": c["LOOP"], "AHEAD": config.num_stages, "S": config.num_warps}
    return Launch(
        function=matvec_spread_kernel if spread else matvec_pieces_kernel,
        grid=(row.programs(config), 1, 1),
        arguments=dict(pointers) | {"columns": row.columns} | ({"eps": EPS} if spread else {}),
        constants=absent | dict(shape) | ways | {"DEPENDENT": bool(c["DEPENDENT"])},
        num_warps=config.num_warps,
        num_stages=1,
        dependent=bool(c["DEPENDENT"]),
    )


def _dequantised(row: Row, t: Tensors) -> Tensor:
    return dequantise_oracle(t["codes"], t["scales"], t.get("zeros"), t.get("minimums"), row.bits, row.depth)
