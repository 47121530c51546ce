"""Matrix product for prefill and vision, with what follows it in the same pass.

Legend: M rows, N columns of y, K depth, F columns of y under GeGLU; P bytes of codes, n blocks of 32 in a row.

    plain:   y = x W^T                      W [N, K]; [K, N] for the projection of image features (x W)
    GeGLU:   y = gelu(x A^T) * (x B^T)      W [2F, K] holds A, then B
    then:    + bias,  GELU (tanh),  + residual; each if asked for

bf16 in and out; sums, bias, activation and residual are fp32, and y is rounded once. W is bf16, or codes of 4 or 8
bits in blocks of 32 along K with fp32 scales (:mod:`autotune.kernels.matmul_blocks`). Those are unpacked in the loop
or, where many rows share the cost, by a launch before it.

Source: Triton's tutorials 03 and 09; GELU: arXiv 1606.08415; GeGLU: arXiv 2002.05202.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from autotune.chosen import chosen_config
from autotune.draw import Draw
from autotune.gpu import GPUS, Gpu, present
from autotune.kernel import Case, Config, Cost, Kernel, Space, Stage, Tensors, Use
from autotune.kernels.matmul_blocks import dequantise_oracle
from autotune.kernels.matmul_launches import product_launches
from autotune.kernels.matmul_product import INTEGER_ZEROS, MINIMUMS, Product, product_of
from autotune.kernels.matmul_space import default_of, refusal_of, space_of
from autotune.kernels.product_case import drawn_inputs, product_bucket
from autotune.launch import Launch
from autotune.model_shapes import ModelShapes
from autotune.tensor_checks import check_tensor
from runtimes.errors import UsageError

Activation = Literal["none", "gelu", "geglu"]
_OPTIONAL = ("bias", "residual", "zeros", "minimums")


def matmul_oracle(
    x_MK: Tensor,
    w_NK: Tensor,
    *,
    bias_N: Tensor | None = None,
    residual_MN: Tensor | None = None,
    activation: Activation = "none",
) -> Tensor:
    """The torch oracle: [M, N], in the dtype of ``x_MK``."""
    y_MN = F.linear(x_MK, w_NK, bias_N)
    if activation == "gelu":
        y_MN = F.gelu(y_MN, approximate="tanh")
    if activation == "geglu":
        gate_MF, up_MF = y_MN.chunk(2, dim=1)
        y_MN = F.gelu(gate_MF, approximate="tanh") * up_MF
    return y_MN if residual_MN is None else residual_MN + y_MN


def matmul(
    x_MK: Tensor,
    w_NK: Tensor,
    *,
    bias_N: Tensor | None = None,
    residual_MN: Tensor | None = None,
    activation: Activation = "none",
    transposed: bool = False,
    config: Config | None = None,
) -> Tensor:
    """The product with bf16 weights: [M, N].

    Args:
        x_MK: bf16.
        w_NK: bf16; [2F, K] for ``geglu``, [K, N] if ``transposed``.
        bias_N, residual_MN: bf16.
        config: None takes what was tuned for this GPU, or the heuristic.

    Raises:
        UsageError: a shape, dtype or device that does not fit, or a configuration that the GPU refuses.
    """
    columns = w_NK.shape[1] if transposed else w_NK.shape[0] // (2 if activation == "geglu" else 1)
    dims = {"columns": columns, "transposed": int(transposed)}
    return _run(x_MK, {"w": w_NK}, "bfloat16", dims, bias_N, residual_MN, activation, config)


def matmul_blocks(
    x_MK: Tensor,
    codes_NP: Tensor,
    scales_Nn: Tensor,
    *,
    bits: Literal[4, 8],
    zeros_NP: Tensor | None = None,
    minimums_Nn: Tensor | None = None,
    bias_N: Tensor | None = None,
    residual_MN: Tensor | None = None,
    activation: Activation = "none",
    config: Config | None = None,
) -> Tensor:
    """The product with weights in blocks of 32: [M, N].

    Args:
        x_MK: bf16.
        codes_NP: uint8, as ``graphs.packing`` packs them, [N, n * 4 * bits].
        scales_Nn: fp32.
        bits: of a code.
        zeros_NP: uint8 [N, ceil(n * bits / 8)]; None for the middle code.
        minimums_Nn: fp32, what is taken from a block besides the middle code.
        bias_N, residual_MN, activation, config: see :func:`matmul`.

    Raises:
        UsageError: a shape, dtype or device that does not fit, or a configuration that the GPU refuses.
    """
    if zeros_NP is not None and minimums_Nn is not None:
        raise UsageError("weights in blocks have zeros or minimums, but both were given")
    grid = INTEGER_ZEROS if zeros_NP is not None else MINIMUMS if minimums_Nn is not None else 0
    dims = {"columns": codes_NP.shape[0] // (2 if activation == "geglu" else 1), "zeros": grid}
    weights = {"codes": codes_NP, "scales": scales_Nn, "zeros": zeros_NP, "minimums": minimums_Nn}
    return _run(x_MK, weights, f"int{bits}", dims, bias_N, residual_MN, activation, config)


def _run(
    x_MK: Tensor,
    weights: dict[str, Tensor] | dict[str, Tensor | None],
    dtype: str,
    dims: dict[str, int],
    bias_N: Tensor | None,
    residual_MN: Tensor | None,
    activation: Activation,
    config: Config | None,
) -> Tensor:
    rows, depth = x_MK.shape
    dims = {"rows": rows, "depth": depth, **dims, "bias": int(bias_N is not None)}
    dims["residual"] = int(residual_MN is not None)
    if activation != "none":
        dims[activation] = 1
    case = Case(dtype=dtype, dims=dims)
    given = {"x": x_MK, **weights, "bias": bias_N, "residual": residual_MN}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    _check(product_of(case), tensors)
    gpu = present(x_MK.device.index or 0) if x_MK.is_cuda else GPUS["h100"]
    kernel = Matmul()
    config = config or chosen_config(kernel, case, x_MK.device)
    refused = kernel.refusal(case, config, gpu)
    if refused is not None:
        raise UsageError(f"matmul cannot run {config} on {gpu.name}: {refused}")
    return kernel.run(case, config, tensors)["y"]


def _shapes(product: Product) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every input that the product has."""
    rows, columns, depth = product.shape
    weight_rows, blocks, bits = product.weight_rows, product.blocks, product.bits
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"x": ((rows, depth), torch.bfloat16)}
    if bits == 16:
        found["w"] = ((depth, columns) if product.transposed else (weight_rows, depth), torch.bfloat16)
    else:
        found["codes"] = ((weight_rows, blocks * 4 * bits), torch.uint8)
        found["scales"] = ((weight_rows, blocks), torch.float32)
    if product.zeros == INTEGER_ZEROS:
        found["zeros"] = ((weight_rows, -(-blocks * bits // 8)), torch.uint8)
    if product.zeros == MINIMUMS:
        found["minimums"] = ((weight_rows, blocks), torch.float32)
    if product.bias:
        found["bias"] = ((weight_rows,), torch.bfloat16)
    if product.residual:
        found["residual"] = ((rows, columns), torch.bfloat16)
    return found


def _check(product: Product, tensors: Tensors) -> None:
    for name, (shape, dtype) in _shapes(product).items():
        check_tensor(name, tensors[name], shape=shape, dtypes=(dtype,), device=tensors["x"].device)


class Matmul(Kernel):
    """Dims ``rows``, ``columns``, ``depth``, and the flags of :class:`~autotune.kernels.matmul_space.Product`."""

    name: ClassVar[str] = "matmul"
    dtypes: ClassVar[tuple[str, ...]] = ("bfloat16", "int8", "int4")
    stages: ClassVar[tuple[Stage, ...]] = ("prefill", "vision")
    source: ClassVar[tuple[str, ...]] = tuple(
        f"autotune.kernels.matmul{part}"
        for part in (
            "", "_blocks", "_dense", "_hopper", "_hopper_space", "_hopper_square", "_launches",
            "_product", "_space", "_tile",
        )
    )  # fmt: skip
    """Tensor descriptors lie in global scratch memory."""

    def uses(self, model: ModelShapes, stage: Stage, *, batch: int, context: int, dtype: str) -> tuple[Use, ...]:
        if stage == "vision":
            return _vision_uses(model, batch)
        if stage != "prefill":
            return ()
        queries = model.heads * model.head_dim
        qkv = queries + 2 * model.kv_heads * model.head_dim
        products = {
            "qkv": {"columns": qkv, "depth": model.hidden},
            "attention out": {"columns": model.hidden, "depth": queries},
            "gate and up": {"columns": model.ffn, "depth": model.hidden, "geglu": 1},
            "down": {"columns": model.hidden, "depth": model.ffn},
        }
        return tuple(
            Use(name=name, case=Case(dtype=dtype, dims={"rows": batch * context} | dims), count=model.layers)
            for name, dims in products.items()
        )

    def bucket(self, case: Case) -> str:
        return product_bucket(case, 8192)

    def space(self, case: Case) -> Space:
        return space_of(product_of(case))

    def refusal(self, case: Case, config: Config, gpu: Gpu) -> str | None:
        return refusal_of(product_of(case), config, gpu)

    def default(self, case: Case, gpu: Gpu) -> Config:
        return default_of(product_of(case), gpu)

    def inputs(self, case: Case, *, device: torch.device | str, seed: int = 0) -> Tensors:
        product = product_of(case)
        return drawn_inputs(_shapes(product), product.bits, product.depth, Draw(device, seed))

    def outputs(self, case: Case, config: Config, *, device: torch.device | str) -> Tensors:
        product = product_of(case)
        written = {"y": torch.empty(product.rows, product.columns, dtype=torch.bfloat16, device=device)}
        if config.constants.get("AHEAD"):
            shape = (product.weight_rows, product.depth)
            written["_weights"] = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return written

    def launches(self, case: Case, config: Config, tensors: Tensors) -> tuple[Launch, ...]:
        return product_launches(product_of(case), config, tensors)

    def oracle(self, case: Case, inputs: Tensors) -> Tensors:
        product = product_of(case)
        if product.bits == 16:
            w_NK = inputs["w"].T if product.transposed else inputs["w"]
        else:
            w_NK = dequantise_oracle(
                inputs["codes"],
                inputs["scales"],
                inputs.get("zeros"),
                inputs.get("minimums"),
                product.bits,
                product.depth,
            )
        activation: Activation = "geglu" if product.geglu else "gelu" if product.gelu else "none"
        y_MN = matmul_oracle(
            inputs["x"],
            w_NK.to(inputs["x"].dtype),
            bias_N=inputs.get("bias"),
            residual_MN=inputs.get("residual"),
            activation=activation,
        )
        return {"y": y_MN}

    def cost(self, case: Case) -> Cost:
        product = product_of(case)
        sizes = [dtype.itemsize * torch.Size(shape).numel() for shape, dtype in _shapes(product).values()]
        output = 2 * product.rows * product.columns
        return Cost(bytes=sum(sizes) + output, flops=2 * product.rows * product.weight_rows * product.depth)


def _vision_uses(model: ModelShapes, batch: int) -> tuple[Use, ...]:
    vision = model.vision
    if vision is None:
        return ()
    hidden, ffn = vision.hidden, vision.ffn
    products: dict[str, tuple[int, dict[str, int], int]] = {
        "vision qkv": (vision.patches, {"columns": 3 * hidden, "depth": hidden, "bias": 1}, vision.layers),
        "vision attention out": (
            vision.patches,
            {"columns": hidden, "depth": hidden, "bias": 1, "residual": 1},
            vision.layers,
        ),
        "vision fc1": (vision.patches, {"columns": ffn, "depth": hidden, "bias": 1, "gelu": 1}, vision.layers),
        "vision fc2": (vision.patches, {"columns": hidden, "depth": ffn, "bias": 1, "residual": 1}, vision.layers),
        "image projection": (vision.tokens, {"columns": model.hidden, "depth": hidden, "transposed": 1}, 1),
    }
    return tuple(
        Use(name=name, case=Case(dtype="bfloat16", dims={"rows": batch * rows} | dims), count=count)
        for name, (rows, dims, count) in products.items()
    )
