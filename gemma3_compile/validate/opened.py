"""A bundle opened for comparison: run by its runtime, or interpreted where that is all this host can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from gemma3_compile.validate.end_to_end import RunLimits
from gemma3_compile.validate.probes import Probed, ProbedBundle
from gemma3_compile.validate.request import ValidateRequest
from runtimes.bundle import Bundle
from runtimes.errors import HostError
from runtimes.progress import Progress
from runtimes.session import Session, open_session


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """A session, and what gives out the residual stream between layers.

    Args:
        probed: opens it, once the session is closed.
        interpreted: whether the session runs no plan.
        run: how much the session takes at once.
        notes: what is to be said of how the bundle was computed.
    """

    session: Session
    probed: Callable[[], Probed]
    interpreted: bool = False
    run: RunLimits = field(default_factory=RunLimits)
    notes: tuple[str, ...] = ()


def open_for(request: ValidateRequest, bundle: Bundle, progress: Progress) -> Opened:
    """Opens a bundle as ``request`` has it: the provider ``cpu`` interprets a bundle for TensorRT.

    Raises:
        HostError, UsageError, BundleError: as the message says.
    """
    if bundle.manifest.target == "trt":
        return _trt(request, bundle, progress)
    return Opened(
        session=open_session(bundle, provider=request.provider, threads=request.threads),
        probed=lambda: ProbedBundle(bundle, provider=request.provider, threads=request.threads),
    )


def _trt(request: ValidateRequest, bundle: Bundle, progress: Progress) -> Opened:
    """The plan is run where this host can; layers are looked at alone by interpretation, in any case."""
    from gemma3_compile.validate.interpretation import InterpretedProbes, interpret

    # Before the session: reading a network makes plugins known without kernels, a session makes them known with its own.
    interpreted, notes = interpret(bundle)
    session = _plans(request, bundle, progress)

    def probed() -> Probed:
        return InterpretedProbes(bundle, interpreted)

    if session is None:
        return Opened(session=interpreted.session(), probed=probed, interpreted=True, notes=notes)
    batch = int(bundle.manifest.settings.get("max_batch", 1))
    return Opened(
        session=session,
        probed=probed,
        run=RunLimits(sequences=batch, last_row=True),
        notes=(f"the plans ran, {batch} sequences at a time; each layer alone is of their networks, interpreted",),
    )


def _plans(request: ValidateRequest, bundle: Bundle, progress: Progress) -> Session | None:
    """A session that runs the plans; None where they are to be interpreted."""
    if request.provider == "cpu":
        return None
    try:
        return open_session(bundle, provider=request.provider, threads=request.threads, progress=progress)
    except HostError as error:
        if request.provider == "cuda":
            raise
        progress.note(f"the plans cannot be run here, so their networks are interpreted: {error.message}")
        return None
