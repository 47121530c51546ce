"""Each decoder layer alone: the eager layer over the bundle's own residual stream, held against what the bundle made of it.

Legend: S tokens of a piece, H hidden, R rows of logits, V vocabulary, M image feature rows.

A layer's error does not reach the next one, so the first layer that drifts is a fault's place, and every later one
is judged for itself. Where a layer drifts, the hypotheses are tried on it at once, while its weights are at hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from gemma3_compile.validate import hypotheses
from gemma3_compile.validate.calls import Embedding, EmbeddingCall, LayerCall, Piece, layer_call, layer_weights
from gemma3_compile.validate.cases import Passage
from gemma3_compile.validate.drift import Drift, drift, gathered
from gemma3_compile.validate.explain import Explanation, Trial, best
from gemma3_compile.validate.probes import Array, Probed, ProbedPiece
from gemma3_compile.validate.tolerances import GRAPH
from gemma3_compile.validate.weights import Weights
from runtimes.progress import SILENT, Progress

_UNEXPLAINED = 3
"""All hypotheses are tried on so many layers that none explains; on those after them only what explained others."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Strip:
    """A passage with what the bundle's ``stage`` computed for it, piece by piece."""

    stage: str
    passage: Passage
    embedding: EmbeddingCall
    pieces: tuple[ProbedPiece, ...]

    def before(self, layer: int) -> tuple[Piece, ...]:
        """The pieces as ``layer`` gets them: from the eager embedding, or from the bundle's own layer below."""
        x_SH = self.embedding.run() if layer == 0 else None
        return tuple(
            Piece(
                x_SH=torch.from_numpy(piece.after[layer - 1]) if x_SH is None else x_SH[slice(*piece.bounds)],
                start=piece.bounds[0],
                image_ids_S=self._image_ids(piece),
            )
            for piece in self.pieces
        )

    def _image_ids(self, piece: ProbedPiece) -> Tensor | None:
        ids = self.passage.image_ids[slice(*piece.bounds)]
        return torch.from_numpy(ids) if (ids >= 0).any() else None


@dataclass(frozen=True, kw_only=True)
class Place:
    """A layer, or the head, of one stage: its error, and for one that drifts what explains it.

    ``index`` is None for the head.
    """

    stage: str
    index: int | None
    kind: str
    error: float
    tokens: int
    found: Drift | None = None
    explanation: Explanation | None = None

    @property
    def sound(self) -> bool:
        """Whether the error is within the tolerance of graphs."""
        return not GRAPH.beyond(self.error, None)


@dataclass(kw_only=True)
class _Memory:
    """What the layers before have taught: hypotheses that fitted, and how many layers none did."""

    fitted: list[hypotheses.Hypothesis] = field(default_factory=list)
    unexplained: int = 0


def probed_strip(
    probed: Probed, embedding: Embedding, passage: Passage, stage: str, features_MH: Array | None
) -> Strip:
    """Runs ``passage`` through ``stage`` of the bundle, all of it, and keeps what the probes say."""
    rows_S = torch.from_numpy(passage.feature_rows())
    features = None if features_MH is None or not (rows_S >= 0).any() else torch.from_numpy(features_MH)
    return Strip(
        stage=stage,
        passage=passage,
        embedding=embedding.lookup(torch.from_numpy(passage.token_ids), features, rows_S),
        pieces=tuple(probed.run_passage(passage, stage, features_MH)),
    )


def check_layers(
    weights: Weights, embedding: Embedding, strips: Sequence[Strip], progress: Progress = SILENT
) -> list[Place]:
    """Every layer and the head of every stage in ``strips``, in order of the layers."""
    text = weights.config.text
    by_stage: dict[str, list[Strip]] = {}
    for strip in strips:
        by_stage.setdefault(strip.stage, []).append(strip)
    memories = {stage: _Memory() for stage in by_stage}
    places = []
    with progress.task("each layer alone", total=text.num_layers) as advance:
        for index in range(text.num_layers):
            layer = layer_weights(weights, index)
            for stage, group in by_stage.items():
                places.append(_check_layer(weights, index, layer, group, memories[stage]))
            advance(1)
    for group in by_stage.values():
        places.append(_check_head(embedding, group))
    return places


def _check_layer(
    weights: Weights, index: int, layer: Mapping[str, Tensor], strips: Sequence[Strip], memory: _Memory
) -> Place:
    text = weights.config.text
    sites = [
        hypotheses.Site(
            call=layer_call(text, index, layer, strip.before(index)), embedding=strip.embedding if index == 0 else None
        )
        for strip in strips
    ]
    expected = [site.call.run() for site in sites]
    found = gathered(
        [
            part
            for site, strip, after in zip(sites, strips, expected, strict=True)
            for part in _drifts(site.call.pieces, strip, after, index)
        ]
    )
    place = Place(
        stage=strips[0].stage,
        index=index,
        kind=text.layer_kinds[index],
        error=found.worst,
        tokens=len(found.errors),
        found=found,
    )
    if place.sound:
        return place
    return _explained(place, sites, strips, expected, memory)


def _drifts(pieces: Sequence[Piece], strip: Strip, expected: Sequence[Tensor], index: int) -> Iterator[Drift]:
    for piece, probed, after_SH in zip(pieces, strip.pieces, expected, strict=True):
        begin, end = probed.bounds
        actual_SH = probed.after[index]
        yield Drift(
            errors=drift(piece.x_SH, after_SH, torch.from_numpy(actual_SH)),
            positions=np.arange(begin, end),
            is_image=strip.passage.image_ids[begin:end] >= 0,
            first_chunk=np.full(end - begin, begin == 0),
            finite=bool(np.isfinite(actual_SH).all()),
        )


def _explained(
    place: Place,
    sites: Sequence[hypotheses.Site],
    strips: Sequence[Strip],
    expected: Sequence[Sequence[Tensor]],
    memory: _Memory,
) -> Place:
    """``place`` with the hypothesis that makes the eager layer say what the bundle says."""
    assert place.index is not None and place.found is not None
    index = place.index

    def error_of(hypothesis: hypotheses.Hypothesis) -> float | None:
        calls = [hypothesis.vary(site) for site in sites]
        if all(call is None for call in calls):
            return None
        worst = 0.0
        for site, call, strip, right in zip(sites, calls, strips, expected, strict=True):
            worst = max(worst, _residual(site.call, call or site.call, strip, right, index))
        return worst

    known = [Trial(h.cause, h.sentence, error, h) for h in memory.fitted if (error := error_of(h)) is not None]
    explanation = best(known, place.error)
    if explanation is None and np.isfinite(place.error) and memory.unexplained < _UNEXPLAINED:
        trials = [Trial(h.cause, h.sentence, e, h) for h in hypotheses.LAYER if (e := error_of(h)) is not None]
        explanation = best(trials, place.error)
        if explanation is None:
            memory.unexplained += 1
        elif isinstance(explanation.hypothesis, hypotheses.Hypothesis):
            memory.fitted.append(explanation.hypothesis)
    return replace(place, explanation=explanation)


def _residual(right: LayerCall, varied: LayerCall, strip: Strip, expected: Sequence[Tensor], index: int) -> float:
    """What is left of the error when the eager layer is called as ``varied``, on the scale of the right call."""
    worst = 0.0
    for piece, after_SH, varied_SH, probed in zip(right.pieces, expected, varied.run(), strip.pieces, strict=True):
        actual_SH = torch.from_numpy(probed.after[index])
        shifted_SH = after_SH + (actual_SH - varied_SH)  # the residual error, as an error of the right call
        worst = max(worst, float(drift(piece.x_SH, after_SH, shifted_SH).max()))
    return worst


def _check_head(embedding: Embedding, strips: Sequence[Strip]) -> Place:
    """The final norm and the head, over the bundle's own last residual stream."""
    calls = [
        (embedding.head(torch.from_numpy(piece.after[-1][piece.rows])), torch.from_numpy(piece.logits_RV))
        for strip in strips
        for piece in strip.pieces
    ]
    largest = max(float(call.run().abs().max()) for call, _ in calls)

    def error_of(vary: hypotheses.HeadHypothesis | None) -> float:
        pairs = ((call if vary is None else vary.vary(call), actual) for call, actual in calls)
        errors = [float((actual_RV - call.run()).abs().max()) / largest for call, actual_RV in pairs]
        return max(errors) if np.isfinite(errors).all() else float("inf")

    place = Place(
        stage=strips[0].stage, index=None, kind="head", error=error_of(None), tokens=sum(len(a) for _, a in calls)
    )
    if place.sound:
        return place
    trials = [Trial(h.cause, h.sentence, error_of(h), h) for h in hypotheses.HEAD]
    return replace(place, explanation=best(trials, place.error))
