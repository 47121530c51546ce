"""What TensorRT says: kept, for the message of an error. It prints to nobody's terminal."""

from __future__ import annotations

from collections import deque
from types import ModuleType
from typing import Any

from runtimes.errors import Gemma3CompileError, HostError
from runtimes.trt.registry import take_failure

_KEPT = 4


def logger_of(trt: ModuleType | Any) -> Any:
    """A logger whose ``errors`` are the last ones that TensorRT told of."""

    class KeptLogger(trt.ILogger):  # type: ignore[name-defined, misc]  # a module's attribute is no type to mypy
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=_KEPT)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return KeptLogger()


def failure(logger: Any, what: str, *, hint: str | None = None) -> Gemma3CompileError:
    """The error to raise where TensorRT gives back nothing or False: a plugin's own, where one failed.

    Args:
        what: did not work; a sentence.
    """
    cause = take_failure()
    said = "; ".join(dict.fromkeys(logger.errors))
    logger.errors.clear()
    if cause is not None:
        return cause
    return HostError(f"{what}: {said or 'TensorRT does not say why'}", hint=hint)
