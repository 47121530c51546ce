"""Attention of a local layer at decode: one token a sequence over the ring of W slots that holds it already.

Legend: B batch, N query heads, G key-value heads, D head_dim, W window.

    out = softmax_j(scale * q . k_j) v_j    over the keys at positions position - W < p_j <= position

Those are the slots below min(position + 1, W), whatever stands in which: see :mod:`autotune.kernels.decode_attention`.

Source: Gemma 3 report (arXiv 2503.19786), section 2.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from autotune.kernel import Config, Stage, Use
from autotune.kernels.decode_attention import DecodeAttention, decode
from autotune.model_shapes import ModelShapes


def window_decode(
    q_B1ND: Tensor,
    k_cache_BGWD: Tensor,
    v_cache_BGWD: Tensor,
    position_B: Tensor,
    *,
    scale: float,
    config: Config | None = None,
) -> Tensor:
    """bf16 [B, 1, N, D]: the attention of one token of each sequence.

    Args:
        q_B1ND: bf16, normed and rotated.
        k_cache_BGWD, v_cache_BGWD: bf16 rings; position p lies in slot p mod W, the token's own included. Slots
            that no position was written to may hold anything.
        position_B: int32, the token's position in its sequence; -1: an idle sequence, whose output is zeros.
        scale: what the scores are multiplied by.
        config: None takes what was tuned for this GPU, or the heuristic.

    Raises:
        UsageError: a shape, dtype or device that does not fit.
    """
    return decode(WindowDecode(), q_B1ND, k_cache_BGWD, v_cache_BGWD, position_B, scale=scale, config=config)


class WindowDecode(DecodeAttention):
    """``slots`` is W; dims as :class:`autotune.kernels.decode_attention.DecodeAttention` has them."""

    name: ClassVar[str] = "window_decode"
    source: ClassVar[tuple[str, ...]] = (
        "autotune.kernels.window_decode",
        "autotune.kernels.decode_attention",
        "autotune.kernels.dependent",
    )
    PROGRAMS: ClassVar[int] = 2
    WIDE: ClassVar[bool] = False
    SPLITS: ClassVar[tuple[int, ...]] = (1, 2, 4, 8, 16, 32, 64)

    def uses(self, model: ModelShapes, stage: Stage, *, batch: int, context: int, dtype: str) -> tuple[Use, ...]:
        if stage != "decode":
            return ()
        slots = model.window
        return self.use(
            "local attention", model, model.local_layers, batch=batch, slots=slots, keys=min(context + 1, model.window)
        )
