"""Which flavour of TensorRT builds, and for which GPU architectures.

TensorRT for RTX builds without a GPU, for several architectures in one plan; its plans refuse sm_90 and sm_100. Full
TensorRT builds for one GPU, on a host that has it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from gemma3_compile.build_request import Decision
from gemma3_compile.formats import TrtDtype
from runtimes.errors import HostError
from runtimes.trt.binding import ARCHITECTURES, EXTRAS, Flavour

NAMES: dict[Flavour, str] = {"rtx": "TensorRT for RTX", "full": "full TensorRT"}
OLDEST_FP8 = 89
_OLDEST_BFLOAT16 = 80


@dataclass(frozen=True, kw_only=True)
class PresentGpu:
    """A GPU of this host: its name, and 90 for sm_90."""

    name: str
    architecture: int


@dataclass(frozen=True, kw_only=True)
class Host:
    """What of TensorRT and of GPUs this host has."""

    installed: Collection[Flavour]
    gpus: Sequence[PresentGpu]

    @property
    def present(self) -> tuple[int, ...]:
        """The architectures of its GPUs, ascending."""
        return tuple(sorted({gpu.architecture for gpu in self.gpus}))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What builds, and for what."""

    flavour: Flavour
    architectures: tuple[int, ...]
    decisions: tuple[Decision, ...]


def choose(host: Host, *, flavour: Flavour | None, architectures: Sequence[int], dtype: TrtDtype) -> Choice:
    """What a build takes, where the request leaves it open.

    Raises:
        HostError: no flavour is installed, the one that is (or is asked for) cannot serve the architectures, or an
            architecture lacks what ``dtype`` needs.
    """
    asked = tuple(sorted(set(architectures)))
    wanted = asked or host.present
    for number in asked:
        _check_dtype(number, dtype)
    flavour, why_flavour = _flavour(host, flavour, wanted)
    if wanted:
        why = "asked for" if asked else f"that of this host's GPU: {', '.join(gpu.name for gpu in host.gpus)}"
    else:
        wanted = tuple(a for a in ARCHITECTURES["rtx"] if dtype != "fp8" or a >= OLDEST_FP8)
        why = f"this host has no NVIDIA GPU, so all that {NAMES[flavour]} serves{' in fp8' if dtype == 'fp8' else ''}"
    for number in wanted:
        _check_dtype(number, dtype)
    decisions = (
        Decision(name="flavour", choice=flavour, reason=why_flavour),
        Decision(name="architectures", choice=_listed(wanted), reason=why),
    )
    return Choice(flavour=flavour, architectures=wanted, decisions=decisions)


def _flavour(host: Host, asked: Flavour | None, wanted: tuple[int, ...]) -> tuple[Flavour, str]:
    """The flavour and why. ``wanted`` is empty on a host without a GPU, where none was named."""
    if asked is not None and asked not in host.installed:
        raise HostError(f"{NAMES[asked]} is not installed", hint=_install(asked))
    if not host.installed:
        raise HostError(
            "neither flavour of TensorRT is installed",
            hint=f"{_install('rtx')} for {_listed(ARCHITECTURES['rtx'])}, or {_install('full')} on a host with the GPU, "
            "for sm_90 and sm_100",
        )
    candidates = (asked,) if asked is not None else tuple(f for f in NAMES if f in host.installed)
    obstacles = {flavour: _obstacle(flavour, host, wanted) for flavour in candidates}
    for flavour, obstacle in obstacles.items():
        if obstacle is None:
            reason = "asked for" if asked is not None else _reason(flavour, host, wanted)
            return flavour, reason
    raise HostError("; ".join(str(obstacle) for obstacle in obstacles.values()), hint=_way_out(host, asked, wanted))


def _obstacle(flavour: Flavour, host: Host, wanted: tuple[int, ...]) -> str | None:
    """Why a flavour cannot build for the architectures; None where it can."""
    served = ARCHITECTURES[flavour]
    unserved = [number for number in wanted if number not in served]
    if flavour == "rtx":
        if unserved:
            return f"{NAMES['rtx']} serves {_listed(served)}; it makes no plans for {_listed(unserved)}, and refuses to run there"
        return None
    if unserved:
        return f"{NAMES['full']} makes no plans for {_listed(unserved)}: it serves {_listed(served)}"
    absent = [number for number in wanted if number not in host.present]
    if not host.present or absent:
        of = _listed(absent) if absent else "a plan"
        have = f"has {_listed(host.present)}" if host.present else "has no NVIDIA GPU"
        return f"{NAMES['full']} builds {of} on the GPU that it is for, and this host {have}"
    if len(wanted) > 1:
        return f"{NAMES['full']} builds for one GPU at a time, not for {_listed(wanted)} together"
    return None


def _reason(flavour: Flavour, host: Host, wanted: tuple[int, ...]) -> str:
    if len(host.installed) == 1:
        return f"of both flavours, only {NAMES[flavour]} is installed"
    if not wanted:
        return f"{NAMES[flavour]} builds without a GPU"
    return f"{NAMES[flavour]} serves {_listed(wanted)}" + ("" if flavour == "rtx" else f", {NAMES['rtx']} does not")


def _way_out(host: Host, asked: Flavour | None, wanted: tuple[int, ...]) -> str:
    for_rtx = [number for number in wanted if number in ARCHITECTURES["rtx"]]
    if wanted and len(for_rtx) == len(wanted):
        return (
            _install("rtx") if "rtx" not in host.installed else "leave out --flavour: TensorRT for RTX can build this"
        )
    if for_rtx:
        return f"build twice: {NAMES['rtx']} for {_listed(for_rtx)}, full TensorRT on the other GPU"
    if not wanted:
        return f"{_install('rtx')}, which builds without a GPU"
    if all(number in ARCHITECTURES["full"] for number in wanted):
        where = "" if set(wanted) <= set(host.present) else f" on a host with {_listed(wanted)}"
        return f"{_install('full')}{where}; or name an --arch of {_listed(ARCHITECTURES['rtx'])}, for another GPU"
    return f"name an --arch of {_listed(ARCHITECTURES['rtx'])}"


def _check_dtype(number: int, dtype: TrtDtype) -> None:
    if number < _OLDEST_BFLOAT16:
        raise HostError(
            f"sm_{number} has no bfloat16, in which every plan computes; sm_{_OLDEST_BFLOAT16} is the oldest that has it",
            hint="leave that --arch out; the target `ort` runs on such a host",
        )
    if dtype == "fp8" and number < OLDEST_FP8:
        raise HostError(
            f"sm_{number} has no fp8 products; sm_{OLDEST_FP8} is the oldest that has them",
            hint="leave that --arch out, or pass --dtype int4 or bfloat16",
        )


def _install(flavour: Flavour) -> str:
    return f"pip install 'gemma3-compile[{EXTRAS[flavour]}]'"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(f"sm_{number}" for number in numbers)
