"""Attention of a global layer at decode: one token a sequence over the linear cache that holds it already.

Legend: B batch, N query heads, G key-value heads, D head_dim, C slots of the cache.

    out = softmax_j(scale * q . k_j) v_j    over the slots j <= position

The number of splits does not depend on the position: each sequence's keys are dealt out evenly, so that one captured
launch serves a context from its first token to its last. See :mod:`autotune.kernels.decode_attention`.

Source: Gemma 3 report (arXiv 2503.19786), section 2.
"""

from __future__ import annotations

from typing import ClassVar

import triton
from torch import Tensor

from autotune.kernel import Config, Stage, Use
from autotune.kernels.decode_attention import DecodeAttention, decode
from autotune.model_shapes import ModelShapes

SLOTS_MULTIPLE = 256
"""A case's cache is the keys it sees, rounded up to this."""


def global_decode(
    q_B1ND: Tensor,
    k_cache_BGCD: Tensor,
    v_cache_BGCD: Tensor,
    position_B: Tensor,
    *,
    scale: float,
    config: Config | None = None,
) -> Tensor:
    """bf16 [B, 1, N, D]: the attention of one token of each sequence.

    Args:
        q_B1ND: bf16, normed and rotated.
        k_cache_BGCD, v_cache_BGCD: bf16; position p lies in slot p, the token's own included. Slots past the
            position may hold anything.
        position_B: int32, the token's position in its sequence; -1: an idle sequence, whose output is zeros.
        scale: what the scores are multiplied by.
        config: None takes what was tuned for this GPU, or the heuristic.

    Raises:
        UsageError: a shape, dtype or device that does not fit.
    """
    return decode(GlobalDecode(), q_B1ND, k_cache_BGCD, v_cache_BGCD, position_B, scale=scale, config=config)


class GlobalDecode(DecodeAttention):
    """``slots`` is C; dims as :class:`autotune.kernels.decode_attention.DecodeAttention` has them."""

    name: ClassVar[str] = "global_decode"
    source: ClassVar[tuple[str, ...]] = (
        "autotune.kernels.global_decode",
        "autotune.kernels.decode_attention",
        "autotune.kernels.dependent",
    )
    PROGRAMS: ClassVar[int] = 1
    WIDE: ClassVar[bool] = True
    SPLITS: ClassVar[tuple[int, ...]] = (1, 2, 4, 8, 13, 16, 27, 33, 37, 48, 66, 132, 264)
    """Besides powers of two, what 108, 132 and 148 multiprocessors divided by 1, 4 or 8 heads give, once or twice."""

    def uses(self, model: ModelShapes, stage: Stage, *, batch: int, context: int, dtype: str) -> tuple[Use, ...]:
        if stage != "decode":
            return ()
        slots = triton.cdiv(context + 1, SLOTS_MULTIPLE) * SLOTS_MULTIPLE
        return self.use("global attention", model, model.global_layers, batch=batch, slots=slots, keys=context + 1)
