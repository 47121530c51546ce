"""What each target adds to a build."""

from __future__ import annotations

from gemma3_compile.build_request import BuildRequest
from gemma3_compile.targets.ort import OrtTarget
from gemma3_compile.targets.target import Target, TargetFacts
from gemma3_compile.targets.trt import TrtTarget
from runtimes.errors import UsageError

__all__ = ["Target", "TargetFacts", "target_of"]


def target_of(request: BuildRequest) -> Target:
    """The target of a request.

    Raises:
        UsageError: there is no such target, or an option is another's.
        HostError: this host cannot build for it.
    """
    if request.target == "ort":
        return OrtTarget(request)
    if request.target == "trt":
        return TrtTarget(request)
    raise UsageError(
        f"this version builds the targets `ort` and `trt`; `{request.target}` is not there yet",
        hint="leave out --target",
    )
