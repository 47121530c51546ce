"""Token embeddings: a row of the tied table for each token, times sqrt(H), or a row of image features in its place.

Legend: T tokens, H hidden, V vocabulary, M image feature rows, n = H / 32 blocks in a row of a quantised table.

    y = table[id] * multiplier      where feature_row < 0
    y = features[feature_row]       elsewhere

The multiplier is sqrt(H) rounded to the dtype of ``y``, as transformers holds it. A quantised table is the very one
that the head multiplies by: value = (code - zero) * scale, with codes of 8 bits, or of 4 bits, two in a byte and the
even column in its low half; zero is the middle code, or an integer of the block. Its value is not rounded before the
product. The caller vouches for its ids; one outside [0, V) gives a row of zeros rather than a fault.

Source: transformers' ``Gemma3TextScaledWordEmbedding``; ONNX Runtime's MatMulNBits for the quantised layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from autotune.gpu import Gpu
from autotune.kernel import Case, Config, Cost, Kernel, Space, Stage, Tensors, Use
from autotune.kernels.dependent import best_dependent, dependent_refusal, release, wait
from autotune.launch import Launch
from autotune.model_shapes import ModelShapes
from autotune.tensor_checks import check_tensor
from runtimes.errors import UsageError

QUANT_BLOCK = 32
_FLOATS = (torch.float32, torch.bfloat16)
_SIGNIFICANT_BITS = {torch.bfloat16: 8, torch.float32: 24}


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """The table as it is stored.

    Args:
        values: [V, H] bf16 or fp32, or codes uint8: [V, H] of 8 bits, [V, H / 2] of 4.
        scales: [V, n] fp32 or bf16; None for a table of floats.
        zeros: uint8 [V, n] for 8 bits, [V, ceil(n / 2)] for 4; None means the middle code, 128 or 8.
    """

    values: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None

    @property
    def bits(self) -> int:
        """Bits of a code; 0 for floats."""
        if self.scales is None:
            return 0
        return 8 * self.values.shape[1] // (self.scales.shape[1] * QUANT_BLOCK)

    @property
    def hidden(self) -> int:
        """H."""
        return self.values.shape[1] if self.scales is None else self.scales.shape[1] * QUANT_BLOCK


def multiplier(hidden: int, dtype: torch.dtype) -> float:
    """sqrt(hidden), rounded to nearest even in ``dtype``."""
    mantissa, exponent = math.frexp(math.sqrt(hidden))
    bits = _SIGNIFICANT_BITS[dtype]
    return math.ldexp(round(math.ldexp(mantissa, bits)), exponent - bits)


def embed_oracle(
    ids_T: Tensor,
    table: Table,
    factor: float,
    features_MH: Tensor | None,
    feature_rows_T: Tensor | None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """The torch oracle: [T, H] in ``dtype``."""
    rows_TH = table.values[ids_T.long()]
    if table.scales is not None:
        scales_Tn = table.scales[ids_T.long()]
        zeros_Tn = torch.full_like(scales_Tn, 2 ** (table.bits - 1))
        if table.zeros is not None:
            zeros_Tn = _codes(table.zeros[ids_T.long()], table.bits)[:, : scales_Tn.shape[1]].to(scales_Tn.dtype)
        codes_Tnb = _codes(rows_TH, table.bits).unflatten(1, (-1, QUANT_BLOCK)).to(scales_Tn.dtype)
        rows_TH = ((codes_Tnb - zeros_Tn[:, :, None]) * scales_Tn[:, :, None]).flatten(1)
    y_TH = rows_TH.to(dtype) * factor
    if features_MH is not None and feature_rows_T is not None:
        image_TH = features_MH[feature_rows_T.long().clamp(min=0)].to(dtype)
        y_TH = torch.where((feature_rows_T >= 0)[:, None], image_TH, y_TH)
    return y_TH


def _codes(packed: Tensor, bits: int) -> Tensor:
    return packed if bits == 8 else torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)


@triton.jit
def _embed_kernel(
    ids_ptr, table_ptr, scales_ptr, zeros_ptr, features_ptr, feature_rows_ptr, y_ptr, vocab, factor,
    HIDDEN: tl.constexpr, BITS: tl.constexpr, BLOCK_H: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    release(DEPENDENT)
    wait(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    column_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside_H = column_H < HIDDEN
    row = tl.load(ids_ptr + token).to(tl.int64)
    feature_row = tl.full((), -1, tl.int64)
    if feature_rows_ptr is not None:
        feature_row = tl.load(feature_rows_ptr + token).to(tl.int64)
    read_H = inside_H & (row >= 0) & (row < vocab) & (feature_row < 0)
    if BITS == 0:
        value_H = tl.load(table_ptr + row * HIDDEN + column_H, read_H, other=0.0).to(tl.float32)
    else:
        if BITS == 4:
            pair_H = tl.program_id(1) * (BLOCK_H // 2) + tl.arange(0, BLOCK_H // 2)
            read_pair_H = (pair_H * 2 < HIDDEN) & (row >= 0) & (row < vocab) & (feature_row < 0)
            pairs_H = tl.load(table_ptr + row * (HIDDEN // 2) + pair_H, read_pair_H, other=0)
            code_H = tl.interleave(pairs_H & 15, pairs_H >> 4)
        else:
            code_H = tl.load(table_ptr + row * HIDDEN + column_H, read_H, other=0)
        block_H = column_H // 32
        scale_H = tl.load(scales_ptr + row * (HIDDEN // 32) + block_H, read_H, other=0.0).to(tl.float32)
        if zeros_ptr is None:
            zero_H = tl.full([BLOCK_H], 1 << (BITS - 1), tl.int32)
        elif BITS == 4:
            zeros_H = tl.load(zeros_ptr + row * ((HIDDEN // 32 + 1) // 2) + block_H // 2, read_H, other=0)
            zero_H = (zeros_H.to(tl.int32) >> (block_H % 2 * 4)) & 15
        else:
            zero_H = tl.load(zeros_ptr + row * (HIDDEN // 32) + block_H, read_H, other=0).to(tl.int32)
        value_H = (code_H.to(tl.int32) - zero_H).to(tl.float32) * scale_H
    y_H = (value_H * factor).to(y_ptr.dtype.element_ty)
    if feature_rows_ptr is not None:
        from_image_H = inside_H & (feature_row >= 0)
        image_H = tl.load(features_ptr + feature_row * HIDDEN + column_H, from_image_H, other=0.0)
        y_H = tl.where(feature_row >= 0, image_H.to(y_ptr.dtype.element_ty), y_H)
    tl.store(y_ptr + token * HIDDEN + column_H, y_H, inside_H)


def embed(
    ids_T: Tensor,
    table: Table,
    *,
    features_MH: Tensor | None = None,
    feature_rows_T: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    config: Config | None = None,
) -> Tensor:
    """Looks tokens up.

    Args:
        ids_T: int32 or int64.
        table: see :class:`Table`.
        features_MH: image features in ``dtype``, together with:
        feature_rows_T: int32 or int64, the feature row of a token, -1 for text.
        dtype: of the result, bf16 or fp32; a table of floats has it too.
        config: None takes the heuristic.

    Returns:
        [T, H].

    Raises:
        UsageError: a shape, dtype or device that does not fit.
    """
    y_TH = torch.empty(len(ids_T), table.hidden, dtype=dtype, device=ids_T.device)
    _check(ids_T, table, features_MH, feature_rows_T, y_TH)
    _launch(config or _default(table.hidden), ids_T, table, features_MH, feature_rows_T, y_TH).run()
    return y_TH


def _check(
    ids_T: Tensor, table: Table, features_MH: Tensor | None, feature_rows_T: Tensor | None, y_TH: Tensor
) -> None:
    integers, bytes_, device = (torch.int32, torch.int64), (torch.uint8,), ids_T.device
    (tokens, hidden), vocab = y_TH.shape, table.values.shape[0]
    check_tensor("ids", ids_T, shape=(tokens,), dtypes=integers, device=device)
    if table.scales is None:
        check_tensor("table", table.values, shape=(vocab, hidden), dtypes=(y_TH.dtype,), device=device)
    else:
        if table.bits not in (4, 8) or table.values.shape[1] * 8 != hidden * table.bits:
            raise UsageError(
                f"a quantised table must hold codes of 4 or 8 bits in blocks of {QUANT_BLOCK}, "
                f"but {tuple(table.values.shape)} bytes came with scales of {tuple(table.scales.shape)}"
            )
        blocks = hidden // QUANT_BLOCK
        check_tensor("table", table.values, shape=table.values.shape, dtypes=bytes_, device=device)
        check_tensor("scales", table.scales, shape=(vocab, blocks), dtypes=_FLOATS, device=device)
        if table.zeros is not None:
            shape = (vocab, math.ceil(blocks * table.bits / 8))
            check_tensor("zeros", table.zeros, shape=shape, dtypes=bytes_, device=device)
    if (features_MH is None) != (feature_rows_T is None):
        raise UsageError("image features and the feature row of each token come together, but only one of them came")
    if features_MH is not None and feature_rows_T is not None:
        check_tensor("features", features_MH, shape=(len(features_MH), hidden), dtypes=(y_TH.dtype,), device=device)
        check_tensor("feature_rows", feature_rows_T, shape=(tokens,), dtypes=integers, device=device)


def _launch(
    config: Config,
    ids_T: Tensor,
    table: Table,
    features_MH: Tensor | None,
    feature_rows_T: Tensor | None,
    y_TH: Tensor,
) -> Launch:
    tokens, hidden = y_TH.shape
    constants: dict[str, Any] = dict(config.constants) | {"HIDDEN": hidden, "BITS": table.bits}
    arguments: dict[str, Any] = {"ids_ptr": ids_T, "table_ptr": table.values, "y_ptr": y_TH}
    optional = {
        "scales_ptr": table.scales,
        "zeros_ptr": table.zeros,
        "features_ptr": features_MH,
        "feature_rows_ptr": feature_rows_T,
    }
    for name, tensor in optional.items():
        (constants if tensor is None else arguments)[name] = tensor
    return Launch(
        function=_embed_kernel,
        grid=(tokens, triton.cdiv(hidden, config.constants["BLOCK_H"]), 1),
        arguments=arguments | {"vocab": table.values.shape[0], "factor": multiplier(hidden, y_TH.dtype)},
        constants=constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        dependent=bool(config.constants["DEPENDENT"]),
    )


def _default(hidden: int, dependent: int = 0) -> Config:
    constants = {"BLOCK_H": 1024 if hidden > 512 else 256, "DEPENDENT": dependent}
    return Config(constants=constants, num_warps=4, num_stages=1)


class Embed(Kernel):
    """``features`` rows of image features (0: a step of text alone); ``zeros`` 1 where blocks have zero points."""

    name: ClassVar[str] = "embed"
    dtypes: ClassVar[tuple[str, ...]] = ("bfloat16", "float32", "int8", "int4")
    stages: ClassVar[tuple[Stage, ...]] = ("prefill", "decode")
    source: ClassVar[tuple[str, ...]] = ("autotune.kernels.embed",)

    def uses(self, model: ModelShapes, stage: Stage, *, batch: int, context: int, dtype: str) -> tuple[Use, ...]:
        if stage == "vision":
            return ()
        features = 0 if stage == "decode" or model.vision is None else min(model.vision.tokens, context) * batch
        dims = {
            "tokens": batch if stage == "decode" else batch * context,
            "hidden": model.hidden,
            "vocab": model.vocab,
            "features": features,
            "zeros": int(dtype == "int4"),
        }
        return (Use(name="embeddings", case=Case(dtype=dtype, dims=dims), count=1),)

    def bucket(self, case: Case) -> str:
        d = case.dims
        tokens = min(triton.next_power_of_2(d["tokens"]), 1024)
        return f"{case.dtype} tokens<={tokens} hidden={d['hidden']} images={int(d['features'] > 0)} zeros={d['zeros']}"

    def space(self, case: Case) -> Space:
        constants = {"BLOCK_H": (256, 512, 1024, 2048, 4096), "DEPENDENT": (0, 1)}
        return Space(constants=constants, num_warps=(1, 2, 4, 8), num_stages=(1,))

    def refusal(self, case: Case, config: Config, gpu: Gpu) -> str | None:
        if config.constants["BLOCK_H"] // (32 * config.num_warps) > 64:
            return f"{config.constants['BLOCK_H']} columns in {config.num_warps} warps take too many registers a thread"
        return dependent_refusal(config.constants["DEPENDENT"], gpu)

    def default(self, case: Case, gpu: Gpu) -> Config:
        return _default(case.dims["hidden"], best_dependent(gpu))

    def inputs(self, case: Case, *, device: torch.device | str, seed: int = 0) -> Tensors:
        tokens, hidden, vocab, features, zeros = (
            case.dims[name] for name in ("tokens", "hidden", "vocab", "features", "zeros")
        )
        floats = _result_dtype(case)
        blocks, width = hidden // QUANT_BLOCK, hidden // 2 if case.dtype == "int4" else hidden
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"ids": (torch.int32, (tokens,))}
        if case.dtype in ("int8", "int4"):
            shapes |= {"table": (torch.uint8, (vocab, width)), "scales": (torch.float32, (vocab, blocks))}
            if zeros:
                shapes["zeros"] = (torch.uint8, (vocab, blocks if case.dtype == "int8" else (blocks + 1) // 2))
        else:
            shapes["table"] = (floats, (vocab, hidden))
        shapes["features"] = (floats, (max(features, 1), hidden))  # without images it only tells the oracle its dtype
        if features:
            shapes["feature_rows"] = (torch.int32, (tokens,))
        tensors = {name: torch.empty(shape, dtype=dtype, device=device) for name, (dtype, shape) in shapes.items()}
        if str(device) != "meta":
            _fill(tensors, vocab, features, torch.Generator(device=device).manual_seed(seed))
        return tensors

    def outputs(self, case: Case, config: Config, *, device: torch.device | str) -> Tensors:
        shape = (case.dims["tokens"], case.dims["hidden"])
        return {"y": torch.empty(shape, dtype=_result_dtype(case), device=device)}

    def launches(self, case: Case, config: Config, tensors: Tensors) -> tuple[Launch, ...]:
        t = tensors
        features = t["features"] if case.dims["features"] else None
        return (_launch(config, t["ids"], _table(t), features, t.get("feature_rows"), t["y"]),)

    def oracle(self, case: Case, inputs: Tensors) -> Tensors:
        factor = multiplier(case.dims["hidden"], _result_dtype(case))
        args = (inputs["ids"], _table(inputs), factor, inputs["features"], inputs.get("feature_rows"))
        return {"y": embed_oracle(*args, dtype=inputs["features"].dtype)}

    def cost(self, case: Case) -> Cost:
        tokens, hidden = case.dims["tokens"], case.dims["hidden"]
        width = _result_dtype(case).itemsize
        row = {"int8": hidden * (1 + 4 / QUANT_BLOCK), "int4": hidden * (0.5 + 4 / QUANT_BLOCK)}
        return Cost(bytes=tokens * (row.get(case.dtype, hidden * width) + hidden * width + 4), flops=tokens * hidden)


def _result_dtype(case: Case) -> torch.dtype:
    return torch.float32 if case.dtype == "float32" else torch.bfloat16


def _table(tensors: Tensors) -> Table:
    return Table(values=tensors["table"], scales=tensors.get("scales"), zeros=tensors.get("zeros"))


def _fill(tensors: Tensors, vocab: int, features: int, generator: torch.Generator) -> None:
    """Random values in place, so that a table of gigabytes is held once; about half the tokens are an image's."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensor.uniform_(-1, 1, generator=generator)
        elif name == "ids":
            tensor.random_(0, vocab, generator=generator)
        elif name == "feature_rows":
            tensor.random_(-features, features, generator=generator).clamp_(min=-1)
        else:
            tensor.random_(0, 256, generator=generator)
