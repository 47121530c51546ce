"""Whole passages through the bundle, as its runtime runs them, beside the eager model.

Legend: S tokens of a passage, H hidden, R rows of logits, V vocabulary, M image feature rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemma3_compile.numerics import Divergence, DivergenceMeter
from gemma3_compile.validate.calls import Embedding, Piece, layer_call, layer_weights
from gemma3_compile.validate.cases import Case, Ids, Passage, all_rows
from gemma3_compile.validate.report import Row
from gemma3_compile.validate.tolerances import Limits, in_bfloat16
from gemma3_compile.validate.weights import Weights
from runtimes.manifest import Manifest
from runtimes.progress import SILENT, Advance, Progress
from runtimes.session import Session

Hidden = Mapping[tuple[str, int], Tensor]
"""The residual stream [S, H] after the last layer, by case and passage."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LogitRows:
    """What the bundle said at some positions of a passage."""

    stage: str
    passage: int
    positions: Ids
    logits_RV: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class RunLimits:
    """How much a session takes at once.

    Args:
        sequences: None: any number.
        last_row: it gives logits of a chunk's last token only.
    """

    sequences: int | None = None
    last_row: bool = False


def stage_of(manifest: Manifest, passage: Passage, begin: int, end: int) -> str:
    """The stage that a piece goes through; some targets have one decoder for all."""
    with_image = "decoder_image" in manifest.stages and passage.has_image(begin, end)
    return "decoder_image" if with_image else "decoder"


def run_case(
    session: Session, case: Case, features_MH: NDArray[np.float32] | None, limits: RunLimits
) -> Iterator[LogitRows]:
    """Feeds the case's chunks and then its single steps; gives the logits as they come."""
    size = limits.sequences or len(case.passages)
    for first in range(0, len(case.passages), size):
        yield from _run_batch(session, case.passages[first : first + size], first, features_MH, limits)


def _run_batch(
    session: Session,
    passages: Sequence[Passage],
    first: int,
    features_MH: NDArray[np.float32] | None,
    limits: RunLimits,
) -> Iterator[LogitRows]:
    """Some passages of a case, of which these are those from ``first`` on."""
    facts = session.manifest.model
    caches = session.open_caches(len(passages), max(len(passage) for passage in passages))
    for index, passage in enumerate(passages):
        for begin, end in passage.bounds:
            every = all_rows(facts, end - begin) and not limits.last_row
            logits = session.extend(caches, index, passage.chunk(begin, end, features_MH), "all" if every else "last")
            assert logits is not None
            positions = np.arange(begin if every else end - 1, end)
            stage = stage_of(session.manifest, passage, begin, end)
            yield LogitRows(stage=stage, passage=first + index, positions=positions, logits_RV=logits)
    for step in range(passages[0].steps):
        at = [passage.bounds[-1][1] + step for passage in passages]
        token_ids = np.array([passage.token_ids[position] for passage, position in zip(passages, at, strict=True)])
        logits_BV = session.step(caches, token_ids)
        for index, position in enumerate(at):
            yield LogitRows(
                stage="decoder",
                passage=first + index,
                positions=np.array([position]),
                logits_RV=logits_BV[index : index + 1].copy(),
            )


def pieces_of(passage: Passage, x_SH: Tensor) -> tuple[Piece, ...]:
    """The passage's pieces with their share of the residual stream."""
    return tuple(
        Piece(
            x_SH=x_SH[begin:end],
            start=begin,
            image_ids_S=torch.from_numpy(passage.image_ids[begin:end]) if passage.has_image(begin, end) else None,
        )
        for begin, end in passage.pieces()
    )


def embedded(embedding: Embedding, passage: Passage, features_MH: Tensor | None) -> Tensor:
    """The residual stream [S, H] before the first layer."""
    rows_S = torch.from_numpy(passage.feature_rows())
    has_image = bool((rows_S >= 0).any())
    call = embedding.lookup(torch.from_numpy(passage.token_ids), features_MH if has_image else None, rows_S)
    return call.run()


def hidden_states(
    weights: Weights,
    embedding: Embedding,
    cases: Sequence[Case],
    features_MH: Tensor | None,
    progress: Progress = SILENT,
) -> Hidden:
    """The eager model over every passage, layer by layer: one layer's weights are in memory at a time."""
    text = weights.config.text
    passages = {(case.name, i): passage for case in cases for i, passage in enumerate(case.passages)}
    states = {key: embedded(embedding, passage, features_MH) for key, passage in passages.items()}
    with progress.task(f"eager model, {weights.label}", total=text.num_layers) as advance:
        for index in range(text.num_layers):
            layer = layer_weights(weights, index)
            for key, passage in passages.items():
                call = layer_call(text, index, layer, pieces_of(passage, states[key]))
                states[key] = torch.cat(call.run())
            advance(1)
    return states


@dataclass(frozen=True, kw_only=True, eq=False)
class EagerRun:
    """What the eager model made of every case: ``embedding`` holds the head that makes logits of it."""

    embedding: Embedding
    hidden: Hidden

    @classmethod
    def of(
        cls,
        weights: Weights,
        cases: Sequence[Case],
        features_MH: Tensor | None,
        progress: Progress = SILENT,
        *,
        scale_dtype: torch.dtype = torch.float32,
    ) -> EagerRun:
        """Runs them, in the type of the weights."""
        embedding = Embedding(weights, scale_dtype)
        return cls(embedding=embedding, hidden=hidden_states(weights, embedding, cases, features_MH, progress))

    def logits(self, case: str, passage: int, positions: Ids) -> NDArray[np.float32]:
        """fp32 [R, V]."""
        x_RH = self.hidden[case, passage][torch.from_numpy(positions)]
        return np.asarray(self.embedding.head(x_RH).run().numpy())


def compare_cases(
    session: Session,
    eager: EagerRun,
    cases: Sequence[Case],
    features_MH: NDArray[np.float32] | None,
    *,
    against: str,
    limits: Limits,
    short: EagerRun | None = None,
    run: RunLimits | None = None,
    progress: Progress = SILENT,
) -> list[Row]:
    """One row for each stage of each case.

    Args:
        short: the eager model in bf16, by whose own error a bundle in bf16 is judged; None for one in fp32.
        run: how much the session takes at once.
    """
    rows = []
    total = sum(len(passage) for case in cases for passage in case.passages)
    with progress.task(f"bundle against {against}", total=total, unit="tokens") as advance:
        for case in cases:
            parts = run_case(session, case, features_MH, run or RunLimits())
            gauges, own = _gauge(parts, case.name, eager, short, advance)
            for stage, gauge in gauges.items():
                allowed = limits
                if stage in own:
                    allowed = in_bfloat16(limits, own[stage].relative, own[stage].found().kl_mean)
                rows.append(gauge.row(stage, case.name, against, allowed))
    return rows


def _gauge(
    parts: Iterable[LogitRows], case: str, eager: EagerRun, short: EagerRun | None, advance: Advance
) -> tuple[dict[str, LogitGauge], dict[str, LogitGauge]]:
    """By stage, the bundle's errors; and those of the eager model in bf16."""
    gauges: dict[str, LogitGauge] = {}
    own: dict[str, LogitGauge] = {}
    for part in parts:
        expected_RV = eager.logits(case, part.passage, part.positions)
        gauges.setdefault(part.stage, LogitGauge()).add(expected_RV, part.logits_RV)
        if short is not None:
            shorter_RV = short.logits(case, part.passage, part.positions)
            own.setdefault(part.stage, LogitGauge()).add(expected_RV, shorter_RV)
        advance(len(part.positions))
    return gauges, own


class LogitGauge:
    """Errors and divergence of logits, gathered chunk by chunk."""

    def __init__(self) -> None:
        self._meter, self._error, self._largest = DivergenceMeter(), 0.0, 0.0

    def add(self, expected_RV: NDArray[np.float32], actual_RV: NDArray[np.float32]) -> None:
        """Takes in rows of both sides."""
        self._meter.add(expected_RV, actual_RV)
        self._error = max(self._error, max_error(expected_RV, actual_RV))
        self._largest = max(self._largest, float(np.abs(expected_RV).max()))

    @property
    def relative(self) -> float:
        """The largest error, on the scale of the largest logit expected."""
        return self._error / self._largest if self._largest else self._error

    def found(self) -> Divergence:
        """How far the distributions lie apart."""
        return self._meter.result()

    def row(self, stage: str, case: str, against: str, limits: Limits) -> Row:
        """What was found, judged."""
        found, relative = self.found(), self.relative
        return Row(
            stage=stage,
            case=case,
            against=against,
            rows=found.rows,
            max_error=self._error,
            relative_error=relative,
            divergence=found,
            limits=limits,
            beyond=limits.beyond(relative, found),
        )


def max_error(expected: NDArray[np.float32], actual: NDArray[np.float32]) -> float:
    """The largest absolute difference; infinite where a value is not finite."""
    error = float(np.abs(expected - actual).max(initial=0.0))
    return error if np.isfinite(error) else float("inf")
