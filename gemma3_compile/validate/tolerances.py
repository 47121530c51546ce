"""How far a bundle may lie from the eager model, and why that far. docs/numerics.md shows the same table.

Errors of logits and features are relative to the largest magnitude of the reference, ``max |a - e| / max |e|``.
KL is in nats, the mean over all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from gemma3_compile.numerics import Divergence
from runtimes.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Limits:
    """One row of the table; None asks nothing. ``reason``: why no smaller."""

    relative: float | None = None
    kl_mean: float | None = None
    top1: float | None = None
    reason: str

    def beyond(self, relative: float, found: Divergence | None) -> tuple[str, ...]:
        """What is beyond the limit, in words; empty where nothing is."""
        said = []
        if self.relative is not None and not relative <= self.relative:
            said.append(f"relative error {relative:.2g} > {self.relative:g}")
        if found is not None and self.kl_mean is not None and not found.kl_mean <= self.kl_mean:
            said.append(f"mean KL {found.kl_mean:.2g} > {self.kl_mean:g}")
        if found is not None and self.top1 is not None and found.top1 < self.top1:
            said.append(f"top-1 {found.top1:.1%} < {self.top1:.0%}")
        return tuple(said)


GRAPH = Limits(
    relative=1e-4,
    reason="fp32 on both sides with the same weights; sums in another order through all layers come to 1e-6, "
    "the smallest fault that is known (the exact form of GELU) to 3e-4",
)
"""Whole passages, and each layer alone, where nothing is rounded but fp32 sums."""

KEPT = Limits(
    relative=1e-6,
    reason="floats and kept grids are copied; a norm's 1 + w is rounded to fp32 once, which is 6e-8 of it",
)
"""Tensors that the bundle keeps, against the checkpoint's."""

ROUNDED: Mapping[int, Limits] = MappingProxyType(
    {
        8: Limits(relative=0.02, reason="blocks of 32 in 8 bits round normal weights to 0.5%; outliers make it 1%"),
        4: Limits(relative=0.25, reason="blocks of 32 in 4 bits round normal weights to 9%; calibration trades some of it"),
    }
)
"""Tensors that the bundle rounds to so many bits, against the checkpoint's; rms."""
