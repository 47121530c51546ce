"""``gemma3c::SlidingWindowAttention`` as a plugin: a local layer's attention over its ring, which is written in place.

Legend: B batch, S tokens in the chunk, N query heads, G key-value heads, D head_dim, W window.

Chunks (S > 1) attend to the ring as it was and to themselves, and are then written into it. One token (S = 1) is
written first, and attends to the ring that holds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from runtimes.trt.plugin_base import FieldKind, KernelPlugin


class SlidingWindowAttentionPlugin(KernelPlugin):
    """Attributes: ``window``, W; ``scale`` of the scores; ``kernels``, the hash of their file."""

    window: int
    scale: float

    NAME: ClassVar[str] = "SlidingWindowAttention"
    FIELDS: ClassVar[Mapping[str, FieldKind]] = {"window": "int", "scale": "float"}
    INPUTS: ClassVar[tuple[tuple[str, str], ...]] = (
        ("q", "bf16"),  # [B, S, N, D]
        ("k", "bf16"),  # [B, S, G, D]
        ("v", "bf16"),
        ("k_cache", "bf16"),  # [B, G, W, D]
        ("v_cache", "bf16"),
        ("start", "i32"),  # [B]
        ("length", "i32"),
        ("newest", "i32"),
        ("visible_end", "i32"),  # [B, S]
    )
    OUTPUTS: ClassVar[tuple[tuple[str, str], ...]] = (("out", "bf16"), ("k_cache_out", "bf16"), ("v_cache_out", "bf16"))
    ALIASES: ClassVar[Mapping[int, int]] = {1: 3, 2: 4}
    KERNELS: ClassVar[tuple[str, ...]] = ("cache_write", "window_prefill", "window_decode")

    def values(self, shapes: Sequence[Sequence[int]]) -> dict[str, int | float]:
        batch, chunk = shapes[0][:2]
        return {"B": batch, "S": chunk, "scale": self.scale}

    def paths(self, values: Mapping[str, int | float]) -> tuple[str, ...]:
        return ("cache_write", "window_decode") if values["S"] == 1 else ("window_prefill", "cache_write")

    def addresses(self, inputs: Sequence[int], outputs: Sequence[int]) -> dict[str, int]:
        q, k, v, k_cache, v_cache, start, length, newest, visible_end = inputs
        return {
            "q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "start": start, "length": length,
            "position": newest, "visible_end": visible_end, "out": outputs[0],
        }  # fmt: skip

    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
        return [self._trt.DimsExprs(inputs[source]) for source in (0, 3, 4)]
