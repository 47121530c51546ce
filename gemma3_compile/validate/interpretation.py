"""A bundle for TensorRT whose networks are interpreted: the session that is compared, and the probes between its layers.

Legend: S tokens of a piece, H hidden, V vocabulary, N pictures, P patches, T tokens a picture.

Both are of the networks that TensorRT's parser makes of the bundle's graphs, after the same changes that the build makes.
That they are the very networks of the plans is checked against what the build wrote down of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import numpy as np

from gemma3_compile.targets.trt import PLANS
from gemma3_compile.validate.cases import Passage
from gemma3_compile.validate.probes import Array, ProbedPiece, probed_rows
from graphs.trt.interpreter import InterpretedBundle, InterpretedSession
from graphs.trt.report import PlanReport
from runtimes import records
from runtimes.bundle import Bundle
from runtimes.errors import BundleError
from runtimes.trt.binding import MODULES, Flavour, installed, load

SAID = (
    "the plans were not run: torch interpreted the networks that they were built from, as TensorRT's parser reads them, "
    "the plugins by what their kernels are to compute. What the builder and the kernels make of it, this does not tell"
)


class InterpretedProbes:
    """See :class:`gemma3_compile.validate.probes.Probed`: the same networks, computed in fp32 throughout."""

    in_fp32 = True

    def __init__(self, bundle: Bundle, interpreted: InterpretedBundle) -> None:
        self._probes = bundle.manifest.probes
        self._session: InterpretedSession = interpreted.session(wide=True)

    def probes(self, stage: str) -> tuple[str, ...]:
        return tuple(self._probes.get(stage, ()))

    def run_passage(self, passage: Passage, stage: str, features_MH: Array | None) -> Iterator[ProbedPiece]:
        caches = self._session.open_caches(1, len(passage))
        for begin, end in passage.pieces():
            chunk, rows = passage.chunk(begin, end, features_MH), probed_rows(end - begin)
            # Of all tokens: the last layer's probe has the rows that are asked for.
            logits_SV, *after = self._session.probe(caches, 0, chunk, np.arange(end - begin), self.probes(stage))
            yield ProbedPiece(bounds=(begin, end), after=tuple(after), rows=rows, logits_RV=logits_SV[rows])

    def run_vision(self, pixels_N3YX: Array) -> tuple[list[Array], Array]:
        features_NTX, *after = self._session.probe_images(pixels_N3YX, self.probes("vision"))
        return after, features_NTX


def interpret(bundle: Bundle) -> tuple[InterpretedBundle, tuple[str, ...]]:
    """The networks of a bundle, and what is to be said of them.

    Raises:
        HostError: no TensorRT is installed.
        BundleError: the plans were built from other networks.
        ParseError, InterpreterError: as the message says.
    """
    built_by: Flavour = "full" if bundle.manifest.settings.get("flavour") == "full" else "rtx"
    flavour = built_by if installed(built_by) else next((each for each in MODULES if installed(each)), built_by)
    trt = load(flavour)
    interpreted = InterpretedBundle.open(trt, bundle)
    version = bundle.manifest.settings.get("tensorrt_version")
    same = flavour == built_by and trt.__version__ == version
    differing = sorted(name for name, plan in _plans(bundle).items() if plan.network != interpreted.reports[name])
    if differing and same:
        raise BundleError(
            f"{bundle.root}: the plan of the stage {differing[0]!r} was built from another network than its graph is",
            hint="build the bundle again",
        )
    if not differing:
        return interpreted, (SAID,)
    other = (
        f"{MODULES[flavour]} {trt.__version__} reads {', '.join(differing)} into other layers than {MODULES[built_by]} "
    )
    return interpreted, (SAID, f"{other}{version} did, which built the plans")


def _plans(bundle: Bundle) -> Mapping[str, PlanReport]:
    """What the build wrote down of each plan."""
    path = bundle.path(PLANS)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {error}", hint="build the bundle again") from error
    plans = {stage: records.from_json(PlanReport, plan, where=f"{PLANS}: {stage}") for stage, plan in found.items()}
    if missing := sorted(bundle.manifest.stages.keys() - plans.keys()):
        raise BundleError(f"{path} says nothing of the stage {missing[0]!r}", hint="build the bundle again")
    return plans
