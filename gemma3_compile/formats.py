"""Which weights are stored how: from ``--dtype`` to a block format for each tensor.

``float32`` keeps everything; ``int8`` and ``int4`` quantise the linear layers in blocks of 32 (the
tied embedding once, for lookup and head); ``auto`` keeps the checkpoint's own grid where it has one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from gemma3_compile.checkpoints import Checkpoint
from graphs.onnx_lowering.context import Activations, WeightSource
from graphs.weights import WHOLE_ROW, BlockFormat
from runtimes.errors import UsageError

Dtype = Literal["auto", "float32", "int8", "int4"]
DTYPES: tuple[Dtype, ...] = ("auto", "float32", "int8", "int4")

INT8 = BlockFormat(bits=8, block_size=32, zero_points="none")
INT4 = BlockFormat(bits=4, block_size=32, zero_points="integer")

TrtDtype = Literal["auto", "bfloat16", "int8", "int4", "fp8"]
TRT_DTYPES: tuple[TrtDtype, ...] = ("auto", "bfloat16", "int8", "int4", "fp8")
TRT_INT8 = BlockFormat(bits=8, block_size=WHOLE_ROW, zero_points="none", codes="signed", scales="bfloat16")
TRT_INT4 = BlockFormat(bits=4, block_size=32, zero_points="none", codes="signed", scales="bfloat16")
TRT_FP8 = BlockFormat(bits=8, block_size=WHOLE_ROW, zero_points="none", codes="e4m3", scales="bfloat16")

EMBEDDING = "decoder.embed_tokens.weight"


def is_linear(name: str) -> bool:
    """Whether a canonical name is the weight of a linear layer that may be quantised."""
    return name.endswith(("_proj.weight", ".fc1.weight", ".fc2.weight"))


def choose_formats(checkpoint: Checkpoint, dtype: Dtype) -> dict[str, BlockFormat]:
    """The block format of every tensor that is quantised, by canonical name.

    Raises:
        UsageError: ``dtype`` is none of :data:`DTYPES`.
    """
    if dtype == "auto":
        return _kept(checkpoint)
    if dtype == "float32":
        return {}
    if dtype not in ("int8", "int4"):
        raise UsageError(f"unknown dtype `{dtype}`", hint=f"the dtypes are {', '.join(DTYPES)}")
    linear = INT8 if dtype == "int8" else INT4
    formats = {name: linear if name.startswith("decoder.") else INT8 for name in checkpoint.names() if is_linear(name)}
    return formats | {EMBEDDING: linear}


def _kept(checkpoint: Checkpoint) -> dict[str, BlockFormat]:
    """The checkpoint's own grids: four-bit ones in four bits, the others in eight."""
    formats: dict[str, BlockFormat] = {}
    for name in checkpoint.names():
        grid = checkpoint.grid_info(name) if is_linear(name) or name == EMBEDDING else None
        if grid is None:
            continue
        if name == EMBEDDING and not grid.integer_zero:
            formats[name] = INT8  # a table with minimums cannot be looked up; eight bits hold it nearly exactly
            continue
        formats[name] = BlockFormat(
            bits=4 if grid.bits == 4 else 8,
            block_size=grid.block_size,
            zero_points="none" if grid.integer_zero else "minimum",
        )
    return formats


def default_activations(dtype: Dtype) -> Activations:
    """int4 is for speed; the others are for keeping what the weights still say."""
    return "int8" if dtype == "int4" else "int16"


def stored_dtype(formats: dict[str, BlockFormat], dtype: Dtype) -> Literal["float32", "int8", "int4", "kept"]:
    """What the manifest calls the weights: what was asked for, and for ``auto`` what that came to."""
    if dtype == "auto":
        return "kept" if formats else "float32"
    return dtype


def trt_formats(names: Iterable[str], dtype: TrtDtype, weights: WeightSource = "input") -> dict[str, BlockFormat]:
    """The format of every tensor that a TensorRT bundle quantises, by canonical name.

    The decoder's linear layers. The tied embedding joins them as int4 in a plan that holds its weights: TensorRT
    multiplies by int4 constants as they are, but writes int4 inputs out in bfloat16 first, a table of 2 GB for 12b.
    The vision tower, which runs once a picture, stays in bfloat16.

    Raises:
        UsageError: ``dtype`` is none of :data:`TRT_DTYPES`.
    """
    if dtype not in TRT_DTYPES:
        raise UsageError(f"unknown dtype `{dtype}`", hint=f"the dtypes are {', '.join(TRT_DTYPES)}")
    if dtype in ("auto", "bfloat16"):
        return {}
    form = {"int8": TRT_INT8, "int4": TRT_INT4, "fp8": TRT_FP8}[dtype]
    formats = {name: form for name in names if is_linear(name) and name.startswith("decoder.")}
    return formats | ({EMBEDDING: form} if dtype == "int4" and weights == "constant" else {})
