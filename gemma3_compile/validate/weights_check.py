"""The bundle's weights, read back, beside the checkpoint's, tensor by tensor.

    error = rms(stored - checkpoint) / rms(checkpoint)    for rounded tensors
    error = max |stored - checkpoint| / max |checkpoint|  for those that are kept

A writer's fault that graph and eager model would share (both take the bundle's weights) shows here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from gemma3_compile.validate.report import Finding, Row
from gemma3_compile.validate.tolerances import KEPT, ROUNDED, ROUNDED_ROWS, SHORTENED, Limits
from gemma3_compile.validate.weights import BundleWeights, Weights
from runtimes.progress import SILENT, Progress

STAGE = "weights"
_LISTED = 5
_ROWS_ELEMENTS = 1 << 22
_TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """One tensor: its errors, and for one that is off what it looks like."""

    name: str
    relative: float
    absolute: float
    look: tuple[str, str] | None


def check_weights(
    stored: BundleWeights, checkpoint: Weights, progress: Progress = SILENT
) -> tuple[list[Row], list[Finding]]:
    """One row for each way of storing; a finding for the tensors that are not the checkpoint's."""
    groups: dict[str, list[_Compared]] = {}
    names = [name for name in stored.shapes if stored.holds(name)]
    with progress.task("weights against checkpoint", total=len(names), unit="tensors") as advance:
        for name in names:
            group = _group(stored, name)
            groups.setdefault(group, []).append(_compare(name, stored.read(name), checkpoint.read(name), group))
            advance(1)
    rows = [_row(group, tensors) for group, tensors in groups.items()]
    findings = [_finding(group, tensors) for group, tensors in groups.items()]
    return rows, [finding for finding in findings if finding is not None]


def identical(rows: list[Row]) -> bool:
    """Whether every tensor is the checkpoint's, so that both references are one."""
    return all(row.passed and (row.case == _KEPT_GROUP or row.max_error == 0) for row in rows)


_KEPT_GROUP, _SHORT_GROUP = "kept", "bfloat16"
_LIMITS: Mapping[str, Limits] = MappingProxyType(
    {
        _KEPT_GROUP: KEPT,
        _SHORT_GROUP: SHORTENED,
        **{f"{bits} bits": ROUNDED[bits] for bits in ROUNDED},
        **ROUNDED_ROWS,
    }
)


def _group(stored: BundleWeights, name: str) -> str:
    form = stored.form(name)
    if form is None or stored.keeps(name):
        return _SHORT_GROUP if stored.shortened(name) else _KEPT_GROUP
    kind = "e4m3" if form.codes == "e4m3" else f"{form.bits} bits"
    return f"{kind}, one scale a row" if form.whole_rows else kind


def _compare(name: str, stored: Tensor, original: Tensor, group: str) -> _Compared:
    """Both tensors are in memory, what is computed of them only a few rows at a time."""
    absolute = largest = off = size = 0.0
    step = max(1, _ROWS_ELEMENTS // max(1, original[0].numel()))
    for ours, theirs in zip(torch.split(stored, step), torch.split(original, step), strict=True):
        difference = ours - theirs
        absolute = float(difference.abs().max().clamp(min=absolute))
        largest = max(largest, float(theirs.abs().max()))
        off += float(difference.square().sum(dtype=torch.float64))
        size += float(theirs.square().sum(dtype=torch.float64))
    if group in (_KEPT_GROUP, _SHORT_GROUP):
        relative = absolute / max(largest, 1.0 if original.dim() == 1 else _TINY)
    else:
        relative = math.sqrt(off / max(size, _TINY))
    if not math.isfinite(off):
        relative = absolute = float("inf")
    is_off = bool(_LIMITS[group].beyond(relative, None))
    return _Compared(name=name, relative=relative, absolute=absolute, look=_look(stored, original) if is_off else None)


def _look(stored: Tensor, original: Tensor) -> tuple[str, str]:
    """The cause in short, and what relates a tensor to the one that it should be."""
    if not bool(stored.isfinite().all()):
        return "overflow", "holds NaN or infinite values"
    if not bool(stored.any()):
        return "weights", "is all zeros, as in a bundle that was laid out without weights"
    difference, size = stored - original, original.square().mean().sqrt()
    shift = float(difference.mean())
    if float((difference - shift).square().mean().sqrt()) < 1e-3 * float(size):
        if original.dim() == 1 and abs(abs(shift) - 1) < 1e-3:
            return "norm (1 + w)", "holds w where 1 + w belongs" if shift < 0 else "has its 1 added twice"
        return "weights", f"is the checkpoint's with {shift:.4g} added"
    ratio = (stored * original).sum() / original.square().sum()
    if float((stored - ratio * original).square().mean().sqrt()) < 0.1 * float(ratio.abs() * size):
        return "weights", f"is the checkpoint's times {float(ratio):.4g}"
    square = stored.dim() == 2 and stored.shape[0] == stored.shape[1]
    if square and float((stored.T - original).square().mean().sqrt()) < 0.3 * float(size):
        return "weights", "is the checkpoint's, transposed"
    return "weights", "holds other values than the checkpoint: of another model, or damaged"


def _row(group: str, tensors: list[_Compared]) -> Row:
    worst = max(tensors, key=lambda tensor: tensor.relative)
    limits = _LIMITS[group]
    return Row(
        stage=STAGE,
        case=group,
        against="checkpoint",
        rows=len(tensors),
        max_error=max(tensor.absolute for tensor in tensors),
        relative_error=worst.relative,
        limits=limits,
        beyond=limits.beyond(worst.relative, None),
    )


def _finding(group: str, tensors: list[_Compared]) -> Finding | None:
    off = sorted(((tensor, tensor.look) for tensor in tensors if tensor.look is not None), key=lambda o: -o[0].relative)
    if not off:
        return None
    return Finding(
        stage=STAGE,
        place=f"{len(off)} of {len(tensors)} tensors ({group})",
        cause=off[0][1][0],
        sentence="what the bundle stores is not what the checkpoint holds",
        evidence=tuple(f"`{t.name}`, error {t.relative:.2g}: {look[1]}" for t, look in off[:_LISTED]),
    )
