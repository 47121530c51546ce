"""What is measured: a kernel on a case, the other programs for the same work, and the figures to reach.

Rows are made from times alone, so that they can be made anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from autotune.gpu import Gpu
from autotune.kernel import Case, Kernel, Stage, Tensors
from autotune.model_shapes import ModelShapes
from autotune.registry import kernel
from bench.record import BAR, Row, less_is_better, more_is_better

Prepare = Callable[[Case, Tensors], Callable[[], Tensor]]
"""Lays a case's inputs out as a program wants them, and gives the program: what it returns is timed, this is not."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another program for the work.

    Args:
        returns: the kernel's output that it returns, which is checked; None where it does only a part of the work, or draws
            its own random numbers.
        remark: what to know of it, if anything.
    """

    label: str
    prepare: Prepare
    returns: str | None = None
    remark: str | None = None


@dataclass(frozen=True, kw_only=True)
class Side:
    """What came of one side. ``time_us`` None: there is none, and ``note`` says why."""

    time_us: float | None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What else a subject's rows say, beside its time against each peer's.

    Args:
        most_us: the time to stay under.
        read_share: the share of the measured read rate to reach, by the least bytes that the case must move; 0 shows
            the share without a figure to reach.
        speed: by how much to be faster than the fastest of these peers: 0.85 allows 1 / 0.85 of its time.
        rate: shows TFLOP/s.
    """

    most_us: float | None = None
    read_share: float | None = None
    speed: tuple[float, tuple[str, ...]] | None = None
    rate: bool = False


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A kernel on one case."""

    name: str
    kernel: Kernel
    case: Case
    peers: tuple[Peer, ...] = ()
    figures: Figures = Figures()


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The models whose shapes are measured, tokens of a prefill chunk, and keys that a token of a global layer sees."""

    small: ModelShapes
    large: ModelShapes
    chunk: int
    keys: tuple[int, ...]


def use_of(
    name: str, model: ModelShapes, stage: Stage, where: str, *, context: int, dtype: str = "bfloat16"
) -> tuple[Kernel, Case]:
    """A kernel and the case that it runs at a place of a model's step, one sequence or image at a time."""
    chosen = kernel(name)
    cases = {use.name: use.case for use in chosen.uses(model, stage, batch=1, context=context, dtype=dtype)}
    return chosen, cases[where]


def rows_of(subject: Subject, ours: Side, peers: Mapping[str, Side], gpu: Gpu) -> list[Row]:
    """The subject's rows: times first, then its figures.

    Args:
        peers: by label; a peer without a time has a row that says why.
        gpu: its rates are those measured in the same run.
    """
    name, time_us = subject.name, ours.time_us
    rows = [
        less_is_better(
            name,
            "time",
            "µs",
            time_us,
            peer.label,
            peers[peer.label].time_us,
            _joined(ours.note, peers[peer.label].note),
        )
        for peer in subject.peers
    ] or [Row(case=name, metric="time", unit="µs", value=time_us, note=ours.note)]
    figures, cost = subject.figures, subject.kernel.cost(subject.case)
    if figures.most_us is not None:
        rows.append(less_is_better(name, "time", "µs", time_us, BAR, figures.most_us, ours.note))
    if figures.read_share is not None:
        percent = 100 * cost.bytes / gpu.read_bytes_per_s * 1e6 / time_us if time_us else None
        bar = 100 * figures.read_share or None
        peer = BAR if bar else None
        ratio = percent / bar if percent and bar else None
        row = Row(case=name, metric="share of the read rate", unit="%", value=percent, peer=peer, peer_value=bar)
        rows.append(replace(row, ratio=ratio, note=ours.note))
    if figures.speed is not None:
        least, labels = figures.speed
        rows.append(_speed(name, ours, {label: peers[label] for label in labels}, least))
    if figures.rate:
        rate = cost.flops / time_us / 1e6 if time_us else None
        share_note = f"{rate * 1e12 / gpu.bf16_flops:.0%} of the measured product's rate" if rate else ours.note
        rows.append(Row(case=name, metric="rate", unit="TFLOP/s", value=rate, note=share_note))
    return rows


def _speed(name: str, ours: Side, peers: Mapping[str, Side], least: float) -> Row:
    """How many times as fast as the fastest peer; without a value where either side has no time."""
    times = {label: side.time_us for label, side in peers.items() if side.time_us}
    if not times:
        missing = "; ".join(_joined(label, side.note) or label for label, side in peers.items())
        return more_is_better(name, f"speed over {' or '.join(peers)}", "x", None, BAR, least, missing)
    fastest = min(times, key=lambda label: times[label] or 0.0)
    value = (times[fastest] or 0.0) / ours.time_us if ours.time_us else None
    return more_is_better(name, f"speed over {fastest}", "x", value, BAR, least, ours.note)


def _joined(*notes: str | None) -> str | None:
    return "; ".join(note for note in notes if note) or None
