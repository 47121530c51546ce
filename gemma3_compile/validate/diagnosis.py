"""From places that drift to causes in words: what fits, in which layers, and what the drift looks like."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gemma3_compile.validate.drift import Look, look
from gemma3_compile.validate.layers_alone import Place
from gemma3_compile.validate.report import Finding, Row
from gemma3_compile.validate.tolerances import GRAPH

ALONE = "each layer alone"


def place_rows(places: Sequence[Place], against: str) -> list[Row]:
    """One row a stage: the worst of its layers, head or pooling included."""
    rows = []
    for stage in dict.fromkeys(place.stage for place in places):
        group = [place for place in places if place.stage == stage]
        worst = max(place.error for place in group)
        rows.append(
            Row(
                stage=stage,
                case=ALONE,
                against=against,
                rows=len(group),
                max_error=None,
                relative_error=worst,
                limits=GRAPH,
                beyond=GRAPH.beyond(worst, None),
            )
        )
    return rows


def findings_of(places: Sequence[Place], window: int) -> list[Finding]:
    """What is wrong, each fault once, however many layers and stages have it."""
    drifting = [place for place in places if not place.sound]
    groups: dict[tuple[str, str], list[Place]] = {}
    for place in drifting:
        groups.setdefault(_key(place, places, window), []).append(place)
    return [_finding(key, group, places, window) for key, group in groups.items()]


def _key(place: Place, places: Sequence[Place], window: int) -> tuple[str, str]:
    """Cause and sentence; those of the look where no hypothesis fits."""
    if place.explanation is not None:
        return place.explanation.cause, place.explanation.sentence
    seen = _look(place, places, window)
    if seen is None:
        return "unknown", "no hypothesis fits what the bundle computes here"
    return seen.cause, f"no hypothesis fits; by its look: {seen.suggestion}"


def _look(place: Place, places: Sequence[Place], window: int) -> Look | None:
    if place.found is None:
        return None
    before = [p for p in places if p.stage == place.stage and p.index is not None and p.index < (place.index or 0)]
    others = [p for p in before if p.kind != place.kind]
    return look(place.found, kind=place.kind, first_of_kind=all(p.sound for p in others), window=window)


def _finding(key: tuple[str, str], group: Sequence[Place], places: Sequence[Place], window: int) -> Finding:
    first = group[0]
    evidence = [f"alone, its error is {first.error:.2g}, where {GRAPH.relative:g} is allowed"]
    seen = _look(first, places, window)
    if seen is not None:
        evidence.append(seen.where)
    if first.explanation is not None:
        fit = first.explanation
        evidence.append(
            f"with this fault the eager model says the same: the error falls from {fit.before:.2g} to {fit.after:.1g}"
        )
    for stage in dict.fromkeys(place.stage for place in group):
        same = [place for place in group if place.stage == stage]
        if len(group) > 1:
            evidence.append(f"in {stage}: {_names(same)}")
    sound = [p for p in places if p.stage == first.stage and p.index is not None and p.sound]
    if sound:
        evidence.append(f"sound in {first.stage}: {_names(sound)}")
    return Finding(
        stage=", ".join(dict.fromkeys(place.stage for place in group)),
        place=_name(first),
        cause=key[0],
        sentence=key[1],
        evidence=tuple(evidence),
    )


def _name(place: Place) -> str:
    return place.kind if place.index is None else f"layer {place.index} ({place.kind})"


def _names(places: Iterable[Place]) -> str:
    """``local layers 0-4, global layer 5, head``."""
    kinds: dict[str, list[int]] = {}
    for place in places:
        kinds.setdefault(place.kind, []).extend([] if place.index is None else [place.index])
    return ", ".join(_layers(kind, numbers) for kind, numbers in kinds.items())


def _layers(kind: str, numbers: list[int]) -> str:
    if not numbers:
        return kind
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    named = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{kind} layer{'s' if len(numbers) > 1 else ''} {named}"


def beyond_the_layers(
    rows: Sequence[Row], own: str, activations: str | None, *, short: bool = False, alone: bool = True
) -> list[Finding]:
    """For whole passages that part although each layer alone agrees.

    Args:
        rows: all of them, in order.
        own: the label of the bundle's own weights.
        activations: how the bundle rounds them, None where it does not.
        short: whether it computes in bf16.
        alone: whether each layer was looked at alone, in fp32.
    """
    bad = [row for row in rows if not row.passed]
    if not bad:
        return []
    with_own = [row for row in bad if row.against == own]
    worst = max(with_own or bad, key=lambda row: row.relative_error)
    evidence = (f"{worst.stage}, {worst.case}, against {worst.against}: {'; '.join(worst.beyond)}",)
    if not with_own:
        cause, sentence = "quantisation", "rounding the weights costs more than its tolerance; the graph is sound"
    elif activations is not None:
        cause = "activations"
        sentence = f"rounding activations to {activations} costs more than its tolerance; in fp32 each layer is sound"
    elif not alone:
        cause = "unknown"
        sentence = "the numbers part by more than rounding explains; no layer was looked at alone"
    elif short:
        cause = "bfloat16 or runtime"
        sentence = (
            "in fp32 each layer alone is sound, so the numbers part in how bfloat16 is rounded, or between the layers: "
            "caches, positions"
        )
    else:
        cause = "runtime"
        sentence = (
            "each layer alone is sound, so the numbers part between them: caches, positions, or an optimisation of "
            "ONNX Runtime that the probes prevent"
        )
    return [Finding(stage=worst.stage, place=worst.case, cause=cause, sentence=sentence, evidence=evidence)]
