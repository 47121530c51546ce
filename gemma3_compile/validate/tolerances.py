"""How far a bundle may lie from the eager model, and why that far. docs/numerics.md shows the same table.

Errors of logits and features are relative to the largest magnitude of the reference, ``max |a - e| / max |e|``; a
layer's to what it adds (``drift.py``). KL is in nats, the mean over all rows. Top-1 agreement and margins are
reported but not judged: in a model with flat logits a hair's breadth turns the likeliest token.
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
    reason: str

    def beyond(self, relative: float, found: Divergence | None) -> tuple[str, ...]:
        """What is beyond the limit, in words; empty where nothing is."""
        said = []
        if self.relative is not None and not relative <= self.relative:
            said.append(f"relative error {relative:.2g} > {self.relative:g}")
        if found is not None and self.kl_mean is not None and not found.kl_mean <= self.kl_mean:
            said.append(f"mean KL {found.kl_mean:.2g} > {self.kl_mean:g}")
        return tuple(said)


GRAPH = Limits(
    relative=1e-4,
    kl_mean=1e-6,
    reason="fp32 on both sides with the same weights: sums in another order come to 5e-6 (270M, layers alone) and 3e-6 "
    "(nano, logits); the smallest fault that is known, the exact form of GELU, to 3e-4",
)
"""Whole passages of an fp32 bundle, and each layer alone of any bundle."""

KEPT = Limits(
    relative=1e-6,
    reason="floats and kept grids are copied; a norm's 1 + w is rounded to fp32 once, which is 6e-8 of it",
)
"""Tensors that the bundle keeps, against the checkpoint's."""

SHORTENED = Limits(
    relative=4e-3, reason="bf16 rounds by half of its last place, 2**-8 of a number; exact for a checkpoint in bf16"
)
"""Tensors that the bundle keeps in bf16."""

ROUNDED_ROWS: Mapping[str, Limits] = MappingProxyType(
    {
        "8 bits, one scale a row": Limits(
            relative=0.05, reason="a row's largest weight sets its step: 1% of normal weights, outliers make it more"
        ),
        "e4m3, one scale a row": Limits(
            relative=0.05, reason="three bits behind the leading one: 2.6% of a weight, whatever its size"
        ),
    }
)
"""Tensors that the bundle rounds with one scale a row, against the checkpoint's; rms."""

ROUNDED: Mapping[int, Limits] = MappingProxyType(
    {
        8: Limits(relative=0.02, reason="blocks of 32 in 8 bits round normal weights to 0.5%; outliers make it 1%"),
        4: Limits(
            relative=0.25, reason="blocks of 32 in 4 bits round normal weights to 8%, outliers and calibration to more"
        ),
    }
)
"""Tensors that the bundle rounds to so many bits, against the checkpoint's; rms."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one kind of rounding may cost: KL of logits, relative error of logits (None: unasked) and of features."""

    kl_mean: float
    logits: float | None
    features: float
    reason: str


ACTIVATIONS: Mapping[str, Cost] = MappingProxyType(
    {
        "int16": Cost(
            kl_mean=1e-5,
            logits=2e-3,
            features=2e-3,
            reason="14 bits of every activation: 3e-4 and KL 2e-8 on nano and on the 270M, ten times that for deeper models",
        ),
        "int8": Cost(
            kl_mean=0.02,
            logits=None,
            features=0.1,
            reason="7 bits in blocks of 32: KL 3e-3 on the 270M, 1e-3 on nano; features 1e-2 on nano's two layers",
        ),
    }
)
"""By ``settings.activations`` of the manifest."""

WEIGHTS: Mapping[str, Cost] = MappingProxyType(
    {
        "int8": Cost(kl_mean=0.01, logits=None, features=0.05, reason="KL 1e-3 on nano, below 5e-3 on the 270M"),
        "fp8": Cost(
            kl_mean=0.1,
            logits=None,
            features=0.05,
            reason="KL 0.02 on nano: three bits behind the leading one round by 2.6% of a weight; the tower stays in bf16",
        ),
        "kept": Cost(
            kl_mean=0.01,
            logits=None,
            features=0.05,
            reason="nothing is rounded but an embedding whose grid has minimums: that goes to 8 bits",
        ),
        "int4": Cost(
            kl_mean=0.5,
            logits=None,
            features=0.05,
            reason="plain rounding costs nano 0.2 and the 270M 0.26; calibration halves it; the tower stays in 8 bits",
        ),
    }
)
"""By ``weights.dtype`` of the manifest."""


BFLOAT16 = Limits(
    relative=2e-3,
    kl_mean=1e-5,
    reason="sums in another order turn the last place of a bf16 number now here and now there: two sound programs in "
    "bf16 lie as far from each other as from fp32. So twice the eager model's own error there, and this beside it. A "
    "mask off by one is ten times as far (nano)",
)
"""Where a bundle computes in bf16: what :func:`in_bfloat16` adds to twice the eager model's own error."""


def in_bfloat16(limits: Limits, relative: float, kl_mean: float | None = None) -> Limits:
    """``limits`` for a bundle that computes in bf16, against fp32.

    Args:
        relative, kl_mean: how far the eager model in bf16 lies from fp32 on the same inputs.
    """
    assert BFLOAT16.relative is not None and BFLOAT16.kl_mean is not None
    more, reason = (BFLOAT16, BFLOAT16.reason) if limits is GRAPH else (limits, f"{BFLOAT16.reason}; {limits.reason}")
    base = 0.0 if limits is GRAPH else BFLOAT16.relative, 0.0 if limits is GRAPH else BFLOAT16.kl_mean
    return Limits(
        relative=None if more.relative is None else 2 * relative + base[0] + more.relative,
        kl_mean=None if kl_mean is None else 2 * kl_mean + base[1] + (more.kl_mean or 0.0),
        reason=reason,
    )


def logit_limits(manifest: Manifest, *, exact: bool) -> Limits:
    """For logits of whole passages. ``exact``: against the very weights that the bundle computes with."""
    costs = _costs(manifest, exact=exact)
    if not costs:
        return GRAPH
    relative = [cost.logits for cost in costs]
    return Limits(
        relative=None if None in relative else max(r for r in relative if r is not None),
        kl_mean=sum(cost.kl_mean for cost in costs),
        reason="; ".join(cost.reason for cost in costs),
    )


def feature_limits(manifest: Manifest, *, exact: bool) -> Limits:
    """For image features; as :func:`logit_limits`."""
    costs = _costs(manifest, exact=exact)
    if not costs:
        return GRAPH
    return Limits(relative=sum(cost.features for cost in costs), reason="; ".join(cost.reason for cost in costs))


def _costs(manifest: Manifest, *, exact: bool) -> list[Cost]:
    """Every kind of rounding that lies between the bundle and its reference."""
    costs = []
    if (activations := manifest.settings.get("activations")) is not None:
        costs.append(ACTIVATIONS.get(str(activations), ACTIVATIONS["int8"]))
    if not exact and manifest.weights.dtype in WEIGHTS:
        costs.append(WEIGHTS[manifest.weights.dtype])
    return costs
