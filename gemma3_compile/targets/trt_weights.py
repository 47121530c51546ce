"""Whether plans get their weights at run time or hold a copy, and what a copy takes to build."""

from __future__ import annotations

import os

from gemma3_compile.build_request import Decision
from gemma3_compile.checkpoints import Checkpoint
from gemma3_compile.formats import TrtDtype
from gemma3_compile.targets.target import Formats
from graphs.onnx_lowering.context import WeightSource
from graphs.weights import Weight
from runtimes.errors import HostError
from runtimes.units import in_words

BUILDER_BYTES = 1_500_000_000
"""The most that TensorRT's builder takes for a graph without weights: the 27B's decoder for four architectures."""
_COPIES, _COPIES_INT4 = 2.1, 3.3
"""How many times the weights lie in the builder's memory where they are constants: measured with the 1B."""


def choose_weights(
    asked: WeightSource | None, *, dtype: TrtDtype, weights_bytes: int, memory_bytes: int | None
) -> tuple[WeightSource, Decision]:
    """What was asked for; else constants for int4 where they fit, and inputs for all others.

    TensorRT multiplies by weights of bfloat16, int8 and fp8 as they come in. int4 it multiplies by only as constants:
    such inputs it writes out in bfloat16 for every token, which costs more than bfloat16 itself.

    Args:
        weights_bytes: all weights as constants.
        memory_bytes: this host's; None where that is not known.

    Raises:
        HostError: constants were asked for, and this host has not the memory to build with them.
    """
    size, need = in_words(weights_bytes), in_words(builder_bytes("constant", dtype, weights_bytes))
    fits = memory_bytes is None or builder_bytes("constant", dtype, weights_bytes) <= memory_bytes
    host = "" if memory_bytes is None else f"; this host has {in_words(memory_bytes)}"
    if asked == "constant" and not fits:
        raise HostError(
            f"{size} of weights as constants take about {need} of memory to build{host}",
            hint="leave out --weights constant: as inputs they take none",
        )
    chosen: WeightSource = asked or ("constant" if dtype == "int4" and fits else "input")
    why = "asked for: " if asked is not None else ""
    copy = f"a second copy of the {size} in the plans, for which the build takes about {need} of memory{host}"
    if chosen == "constant":
        why += "" if asked is not None else "TensorRT multiplies by int4 as it is only where it is constant. "
        why += f"That is {copy}"
    else:
        why += f"the plans hold none of the weights, which a session uploads once. As constants they would be {copy}"
        if dtype == "int4":
            why += (
                ". TensorRT writes int4 inputs out in bfloat16 for every token, so --dtype int8 or bfloat16 is faster"
            )
    return chosen, Decision(name="weights", choice=chosen, reason=why)


def builder_bytes(source: WeightSource, dtype: TrtDtype, weights_bytes: int) -> int:
    """About the most memory of the process that builds."""
    if source == "input":
        return BUILDER_BYTES
    return BUILDER_BYTES + round(weights_bytes * (_COPIES_INT4 if dtype == "int4" else _COPIES))


def stored_bytes(checkpoint: Checkpoint, formats: Formats) -> int:
    """All weights of a checkpoint as a bundle of plans stores them, without the header of their file."""
    total = 0
    for name in checkpoint.names():
        shape = checkpoint.info(name).shape
        weight = Weight(sources=(name,), shape=shape, dtype="bfloat16", format=formats.get(name))
        total += sum(entry.size_bytes for entry in weight.stored())
    return total


def host_memory_bytes() -> int | None:
    """This host's memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
