"""Whole passages through the bundle, as its runtime runs them, beside the eager model.

Legend: S tokens of a passage, H hidden, R rows of logits, V vocabulary, M image feature rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemma3_compile.numerics import DivergenceMeter
from gemma3_compile.validate.calls import Embedding, Piece, layer_call, layer_weights
from gemma3_compile.validate.cases import Case, Ids, Passage, all_rows
from gemma3_compile.validate.report import Row
from gemma3_compile.validate.tolerances import Limits
from gemma3_compile.validate.weights import Weights
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


def stage_of(passage: Passage, begin: int, end: int) -> str:
    """The stage that a piece goes through."""
    return "decoder_image" if passage.has_image(begin, end) else "decoder"


def run_case(session: Session, case: Case, features_MH: NDArray[np.float32] | None) -> Iterator[LogitRows]:
    """Feeds the case's chunks and then its single steps; gives the logits as they come."""
    facts = session.manifest.model
    caches = session.open_caches(len(case.passages), max(len(passage) for passage in case.passages))
    for index, passage in enumerate(case.passages):
        for begin, end in passage.bounds:
            every = all_rows(facts, end - begin)
            logits = session.extend(caches, index, passage.chunk(begin, end, features_MH), "all" if every else "last")
            assert logits is not None
            positions = np.arange(begin if every else end - 1, end)
            yield LogitRows(stage=stage_of(passage, begin, end), passage=index, positions=positions, logits_RV=logits)
    for step in range(case.passages[0].steps):
        at = [passage.bounds[-1][1] + step for passage in case.passages]
        token_ids = np.array([passage.token_ids[position] for passage, position in zip(case.passages, at, strict=True)])
        logits_BV = session.step(caches, token_ids)
        for index, position in enumerate(at):
            yield LogitRows(
                stage="decoder",
                passage=index,
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


def compare_cases(
    session: Session,
    embedding: Embedding,
    cases: Sequence[Case],
    features_MH: NDArray[np.float32] | None,
    hidden: Hidden,
    *,
    against: str,
    limits: Limits,
    progress: Progress = SILENT,
) -> list[Row]:
    """One row for each stage of each case."""
    rows = []
    total = sum(len(passage) for case in cases for passage in case.passages)
    with progress.task(f"bundle against {against}", total=total, unit="tokens") as advance:
        for case in cases:
            gauges = _gauge(session, embedding, case, features_MH, hidden, advance)
            rows += [gauge.row(stage, case.name, against, limits) for stage, gauge in gauges.items()]
    return rows


def _gauge(
    session: Session,
    embedding: Embedding,
    case: Case,
    features_MH: NDArray[np.float32] | None,
    hidden: Hidden,
    advance: Advance,
) -> dict[str, LogitGauge]:
    gauges: dict[str, LogitGauge] = {}
    for part in run_case(session, case, features_MH):
        x_RH = hidden[case.name, part.passage][torch.from_numpy(part.positions)]
        gauges.setdefault(part.stage, LogitGauge()).add(embedding.head(x_RH).run().numpy(), part.logits_RV)
        advance(len(part.positions))
    return gauges


class LogitGauge:
    """Errors and divergence of logits, gathered chunk by chunk."""

    def __init__(self) -> None:
        self._meter, self._error, self._largest = DivergenceMeter(), 0.0, 0.0

    def add(self, expected_RV: NDArray[np.float32], actual_RV: NDArray[np.float32]) -> None:
        """Takes in rows of both sides."""
        self._meter.add(expected_RV, actual_RV)
        self._error = max(self._error, max_error(expected_RV, actual_RV))
        self._largest = max(self._largest, float(np.abs(expected_RV).max()))

    def row(self, stage: str, case: str, against: str, limits: Limits) -> Row:
        """What was found, judged."""
        found = self._meter.result()
        relative = self._error / self._largest if self._largest else self._error
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
