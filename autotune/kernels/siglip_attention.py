"""Attention of the vision tower: every patch of an image sees every other.

Legend: I images, P patches, A heads, D head_dim (72); a program has M queries of one head, a block K keys.

    out_p = softmax_j(scale q_p . k_j) v_j,      scale = 1 / sqrt(D)

Two halves of a step meet the matrix units, which take powers of two only: D either fills up to one (128), or is split
into the largest below it and a rest (64 + 16, of which 8 are real). Lanes past D are read as zeros and never stored.
Scores, maximum, sum and accumulator are fp32; weights are rounded to bf16 for the second product.

Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1, without a mask; SigLIP (arXiv 2303.15343).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from autotune.chosen import chosen_config
from autotune.draw import Draw
from autotune.gpu import GPUS, Gpu, present
from autotune.kernel import Case, Config, Cost, Kernel, Space, Stage, Tensors, Use
from autotune.launch import Launch
from autotune.model_shapes import ModelShapes
from runtimes.errors import UsageError

LOG2_E = 1.4426950408889634
POINTERS, DESCRIPTORS = 0, 1


def siglip_attention_oracle(q_IPAD: Tensor, k_IPAD: Tensor, v_IPAD: Tensor) -> Tensor:
    """The torch oracle: [I, P, A, D], in the dtype of ``q_IPAD``."""
    q, k, v = (x.transpose(1, 2) for x in (q_IPAD, k_IPAD, v_IPAD))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


@triton.jit
def _lanes(ptr, tiles, row, rows, stride, lane: tl.constexpr, D: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr):
    """Rows ``row`` to ``row`` + R, WIDTH lanes from ``lane``; zeros past ``rows`` and D."""
    if tiles is not None:
        x_RW = tiles.load([row, lane])
    else:
        row_R = row + tl.arange(0, R)
        lane_W = lane + tl.arange(0, WIDTH)
        inside_RW = (row_R < rows)[:, None] & (lane_W < D)[None, :]
        x_RW = tl.load(ptr + row_R[:, None] * stride + lane_W[None, :], inside_RW, other=0.0)
    return x_RW


@triton.jit
def _store_lanes(
    ptr, out_MW, row, rows, stride, lane: tl.constexpr, D: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr
):
    row_M = row + tl.arange(0, M)
    lane_W = lane + tl.arange(0, WIDTH)
    inside_MW = (row_M < rows)[:, None] & (lane_W < D)[None, :]
    tl.store(ptr + row_M[:, None] * stride + lane_W[None, :], out_MW.to(ptr.dtype.element_ty), inside_MW)


@triton.jit
def _siglip_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, patches, heads, image_stride, patch_stride, head_stride, scale,
    D: tl.constexpr, QK: tl.constexpr, QK_REST: tl.constexpr, PV: tl.constexpr, PV_REST: tl.constexpr,
    EVEN_K: tl.constexpr, ALIGNED: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M
    offset = tl.program_id(2).to(tl.int64) * image_stride + tl.program_id(1) * head_stride
    if ALIGNED:  # a head stride of 72 hides from the compiler that 16 bytes can be read at once
        offset = tl.multiple_of(offset, 8)
    q_ptr += offset
    k_ptr += offset
    v_ptr += offset
    k_tiles, k_rest_tiles, v_tiles, v_rest_tiles = None, None, None, None
    if DESCRIPTORS:
        k_tiles = tl.make_tensor_descriptor(k_ptr, [patches, D], [patch_stride, 1], [BLOCK_N, QK])
        v_tiles = tl.make_tensor_descriptor(v_ptr, [patches, D], [patch_stride, 1], [BLOCK_N, PV])
        if QK_REST:
            k_rest_tiles = tl.make_tensor_descriptor(k_ptr, [patches, D], [patch_stride, 1], [BLOCK_N, QK_REST])
        if PV_REST:
            v_rest_tiles = tl.make_tensor_descriptor(v_ptr, [patches, D], [patch_stride, 1], [BLOCK_N, PV_REST])
    q_MD = _lanes(q_ptr, None, row, patches, patch_stride, 0, D, BLOCK_M, QK)
    if QK_REST:
        q_rest_MD = _lanes(q_ptr, None, row, patches, patch_stride, QK, D, BLOCK_M, QK_REST)
    max_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sum_M = tl.zeros((BLOCK_M,), tl.float32)
    out_MD = tl.zeros((BLOCK_M, PV), tl.float32)
    rest_MD = tl.zeros((BLOCK_M, PV_REST if PV_REST else 16), tl.float32)
    for key in tl.range(0, patches, BLOCK_N):
        k_KD = _lanes(k_ptr, k_tiles, key, patches, patch_stride, 0, D, BLOCK_N, QK)
        score_MK = tl.dot(q_MD, k_KD.T)
        if QK_REST:
            k_rest_KD = _lanes(k_ptr, k_rest_tiles, key, patches, patch_stride, QK, D, BLOCK_N, QK_REST)
            score_MK = tl.dot(q_rest_MD, k_rest_KD.T, score_MK)
        if not EVEN_K:
            score_MK = tl.where((key + tl.arange(0, BLOCK_N) < patches)[None, :], score_MK, float("-inf"))
        new_M = tl.maximum(max_M, tl.max(score_MK, 1) * scale)
        weight_MK = tl.exp2(score_MK * scale - new_M[:, None])
        shrink_M = tl.exp2(max_M - new_M)
        sum_M = sum_M * shrink_M + tl.sum(weight_MK, 1)
        max_M = new_M
        weight_MK = weight_MK.to(k_ptr.dtype.element_ty)
        v_KD = _lanes(v_ptr, v_tiles, key, patches, patch_stride, 0, D, BLOCK_N, PV)
        out_MD = tl.dot(weight_MK, v_KD, out_MD * shrink_M[:, None])
        if PV_REST:
            v_rest_KD = _lanes(v_ptr, v_rest_tiles, key, patches, patch_stride, PV, D, BLOCK_N, PV_REST)
            rest_MD = tl.dot(weight_MK, v_rest_KD, rest_MD * shrink_M[:, None])
    out_ptr += (tl.program_id(2).to(tl.int64) * patches * heads + tl.program_id(1)) * D
    _store_lanes(out_ptr, out_MD / sum_M[:, None], row, patches, heads * D, 0, D, BLOCK_M, PV)
    if PV_REST:
        _store_lanes(out_ptr, rest_MD / sum_M[:, None], row, patches, heads * D, PV, D, BLOCK_M, PV_REST)


def siglip_attention(q_IPAD: Tensor, k_IPAD: Tensor, v_IPAD: Tensor, *, config: Config | None = None) -> Tensor:
    """Two-way attention without a mask: [I, P, A, D].

    Args:
        q_IPAD, k_IPAD, v_IPAD: bf16; views with equal strides, as of one buffer [I, P, 3, A, D].
        config: None takes what was tuned for this GPU, or the heuristic.

    Raises:
        UsageError: shapes, dtypes, devices or strides that do not fit, or a configuration that the GPU refuses.
    """
    images, patches, heads, head_dim = q_IPAD.shape
    for name, tensor in (("k", k_IPAD), ("v", v_IPAD)):
        if tensor.shape != q_IPAD.shape or tensor.stride() != q_IPAD.stride():
            raise UsageError(
                f"{name} must have the shape {tuple(q_IPAD.shape)} and the strides {q_IPAD.stride()} of q, "
                f"but has {tuple(tensor.shape)} and {tensor.stride()}"
            )
    for name, tensor in (("q", q_IPAD), ("k", k_IPAD), ("v", v_IPAD)):
        if tensor.dtype != torch.bfloat16 or tensor.device != q_IPAD.device:
            raise UsageError(
                f"{name} must be torch.bfloat16 on {q_IPAD.device}, but is {tensor.dtype} on {tensor.device}"
            )
    if q_IPAD.stride(3) != 1:
        raise UsageError(f"the lanes of a head must lie side by side, but q has the strides {q_IPAD.stride()}")
    dims = {"images": images, "patches": patches, "heads": heads, "head_dim": head_dim}
    case, kernel = Case(dtype="bfloat16", dims=dims), SiglipAttention()
    gpu = present(q_IPAD.device.index or 0) if q_IPAD.is_cuda else GPUS["h100"]
    config = config or chosen_config(kernel, case, q_IPAD.device)
    refused = kernel.refusal(case, config, gpu)
    if refused is not None:
        raise UsageError(f"siglip_attention cannot run {config} on {gpu.name}: {refused}")
    if config.constants["LOADS"] and any(stride % 8 for stride in q_IPAD.stride()[:3]):
        raise UsageError(
            f"tensor descriptors need strides of multiples of 8, but q has the strides {q_IPAD.stride()}",
            hint="give a configuration with LOADS=0",
        )
    out_IPAD = torch.empty(q_IPAD.shape, dtype=q_IPAD.dtype, device=q_IPAD.device)
    _launch(config, q_IPAD, k_IPAD, v_IPAD, out_IPAD).run()
    return out_IPAD


def _split(head_dim: int, split: bool) -> tuple[int, int]:
    """Lanes of the first product and of the rest; 0 for no rest."""
    whole = max(16, triton.next_power_of_2(head_dim))
    if not split or whole == head_dim or head_dim < 16:
        return whole, 0
    return whole // 2, max(16, triton.next_power_of_2(head_dim - whole // 2))


def _launch(config: Config, q_IPAD: Tensor, k_IPAD: Tensor, v_IPAD: Tensor, out_IPAD: Tensor) -> Launch:
    images, patches, heads, head_dim = q_IPAD.shape
    c = config.constants
    qk, qk_rest = _split(head_dim, c["SPLIT"] > 0)
    pv, pv_rest = _split(head_dim, c["SPLIT"] > 1)
    arguments: dict[str, Any] = {"q_ptr": q_IPAD, "k_ptr": k_IPAD, "v_ptr": v_IPAD, "out_ptr": out_IPAD}
    arguments |= {"patches": patches, "heads": heads, "scale": LOG2_E / math.sqrt(head_dim)}
    names = ("image_stride", "patch_stride", "head_stride")
    arguments |= dict(zip(names, q_IPAD.stride()[:3], strict=True))
    return Launch(
        function=_siglip_attention_kernel,
        grid=(triton.cdiv(patches, c["BLOCK_M"]), heads, images),
        arguments=arguments,
        constants={
            "D": head_dim,
            "QK": qk,
            "QK_REST": qk_rest,
            "PV": pv,
            "PV_REST": pv_rest,
            "EVEN_K": patches % c["BLOCK_N"] == 0,
            "ALIGNED": not any(stride % 8 for stride in q_IPAD.stride()[:3]),
            "DESCRIPTORS": c["LOADS"] > 0,
            "BLOCK_M": c["BLOCK_M"],
            "BLOCK_N": c["BLOCK_N"],
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


class SiglipAttention(Kernel):
    """Dims ``images``, ``patches``, ``heads``, ``head_dim``.

    Constants: LOADS 0 by pointers, 1 by tensor descriptors; SPLIT 0 fills head_dim up to a power of two, 1 splits it
    for the first product, 2 for both.
    """

    name: ClassVar[str] = "siglip_attention"
    dtypes: ClassVar[tuple[str, ...]] = ("bfloat16",)
    stages: ClassVar[tuple[Stage, ...]] = ("vision",)
    source: ClassVar[tuple[str, ...]] = ("autotune.kernels.siglip_attention",)

    def uses(self, model: ModelShapes, stage: Stage, *, batch: int, context: int, dtype: str) -> tuple[Use, ...]:
        vision = model.vision
        if stage != "vision" or vision is None:
            return ()
        dims = {"images": batch, "patches": vision.patches, "heads": vision.heads, "head_dim": vision.head_dim}
        return (Use(name="vision attention", case=Case(dtype="bfloat16", dims=dims), count=vision.layers),)

    def bucket(self, case: Case) -> str:
        images = min(triton.next_power_of_2(case.dims["images"]), 4)
        patches = triton.next_power_of_2(case.dims["patches"])
        return f"{case.dtype} images<={images} patches<={patches} head_dim={case.dims['head_dim']}"

    def space(self, case: Case) -> Space:
        constants = {"LOADS": (POINTERS, DESCRIPTORS), "SPLIT": (0, 1, 2)}
        constants |= {"BLOCK_M": (64, 128, 256), "BLOCK_N": (32, 64, 128)}
        return Space(constants=constants, num_warps=(4, 8), num_stages=(2, 3, 4))

    def refusal(self, case: Case, config: Config, gpu: Gpu) -> str | None:
        c, head_dim = config.constants, case.dims["head_dim"]
        if c["LOADS"] and (gpu.architecture < 90 or head_dim % 8):
            return f"tensor descriptors need compute capability 9.0 and heads of a multiple of 8, but {gpu.name} has {gpu.compute_capability} and a head {head_dim}"
        if c["BLOCK_M"] > 128 and gpu.architecture == 100:
            return "the tensor memory of compute capability 10.0 has 128 rows"
        if c["SPLIT"] and not _split(head_dim, True)[1]:
            return f"a head_dim of {head_dim} has nothing to split"
        qk, pv = sum(_split(head_dim, c["SPLIT"] > 0)), sum(_split(head_dim, c["SPLIT"] > 1))
        values = c["BLOCK_M"] * (c["BLOCK_N"] + pv) // (32 * config.num_warps)
        if values > 192:
            return f"{values} scores and sums a thread take more registers than there are"
        needed = 2 * (c["BLOCK_M"] * qk + config.num_stages * c["BLOCK_N"] * (qk + pv)) + 1024
        if needed > gpu.shared_bytes:
            return f"{needed} bytes of shared memory, but {gpu.name} has {gpu.shared_bytes} for a block"
        return None

    def default(self, case: Case, gpu: Gpu) -> Config:
        described = gpu.architecture in (90, 100) and case.dims["head_dim"] % 8 == 0
        split = 2 if _split(case.dims["head_dim"], True)[1] else 0
        constants = {"LOADS": DESCRIPTORS if described else POINTERS, "SPLIT": split, "BLOCK_M": 128, "BLOCK_N": 64}
        return Config(constants=constants, num_warps=4 if gpu.architecture == 90 else 8, num_stages=2)

    def inputs(self, case: Case, *, device: torch.device | str, seed: int = 0) -> Tensors:
        shape = (case.dims["images"], case.dims["patches"], 3, case.dims["heads"], case.dims["head_dim"])
        return {"qkv": Draw(device, seed).normal(*shape, dtype=torch.bfloat16)}

    def outputs(self, case: Case, config: Config, *, device: torch.device | str) -> Tensors:
        shape = [case.dims[name] for name in ("images", "patches", "heads", "head_dim")]
        return {"out": torch.empty(shape, dtype=torch.bfloat16, device=device)}

    def launches(self, case: Case, config: Config, tensors: Tensors) -> tuple[Launch, ...]:
        q_IPAD, k_IPAD, v_IPAD = tensors["qkv"].unbind(2)
        return (_launch(config, q_IPAD, k_IPAD, v_IPAD, tensors["out"]),)

    def oracle(self, case: Case, inputs: Tensors) -> Tensors:
        return {"out": siglip_attention_oracle(*inputs["qkv"].unbind(2))}

    def cost(self, case: Case) -> Cost:
        images, patches, heads, head_dim = (case.dims[name] for name in ("images", "patches", "heads", "head_dim"))
        rows = images * heads * patches
        return Cost(bytes=4 * rows * head_dim * 2, flops=4 * rows * patches * head_dim)
