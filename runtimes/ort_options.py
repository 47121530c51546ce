"""ONNX Runtime itself: importing it, choosing a provider, and the options of a session.

A bundle's ``settings`` may hold, for this target:

- ``graph_optimization``: ``disable``, ``basic``, ``extended`` or ``all`` (the default).
- ``config.KEY``: the session config entry KEY, as ONNX Runtime's documentation lists them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from runtimes.cores import usable_cores
from runtimes.errors import BundleError, Gemma3CompileError, HostError

if TYPE_CHECKING:
    from runtimes.manifest import Manifest, Scalar
    from runtimes.session import Provider

OrtProvider = Literal["cpu", "cuda"]

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_OPTIMIZATION = {
    "disable": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_ERRORS_ONLY = 3
_SHOWN = 220
_OLDEST = (1, 32)


@cache
def onnxruntime() -> Any:
    """The package, with its own warnings off.

    Raises:
        HostError: it is not installed, or does not load.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise HostError(
            f"this bundle runs on ONNX Runtime, which cannot be imported: {error}",
            hint="pip install 'gemma3-compile[ort]', or [ort-gpu] for CUDA",
        ) from error
    ort.set_default_logger_severity(_ERRORS_ONLY)
    return ort


@cache
def _failures() -> tuple[type[Exception], ...]:
    """Every class of error that ONNX Runtime raises; they share no base of their own."""
    onnxruntime()
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return tuple(kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))


@contextmanager
def translated(kind: type[Gemma3CompileError], what: str, hint: str | None = None) -> Iterator[None]:
    """Raises ``kind`` in place of ONNX Runtime's errors, with the first line of what it said, cut short."""
    try:
        yield
    except _failures() as error:
        reason = str(error).strip().partition("\n")[0]
        if len(reason) > 2 * _SHOWN:  # a node's whole signature may stand between the place and the reason
            reason = f"{reason[:_SHOWN]} … {reason[-_SHOWN:]}"
        raise kind(f"{what}: {type(error).__name__}: {reason}", hint=hint) from error


def choose_provider(asked: Provider, manifest: Manifest) -> OrtProvider:
    """Where a bundle is to run.

    ``auto`` takes CUDA only for caches in bfloat16: GroupQueryAttention has no fp32 kernel there, and
    a graph that goes back and forth between host and device is slower than the CPU alone.

    Raises:
        HostError: CUDA was asked for and is absent, or the bundle cannot run on what there is.
    """
    ort = onnxruntime()
    has_cuda = _CUDA in ort.get_available_providers()
    bfloat16 = manifest.caches.dtype == "bfloat16"
    if asked == "cuda" and not has_cuda:
        raise HostError(
            f"the provider 'cuda' was asked for, but onnxruntime {ort.__version__} here has only "
            f"{', '.join(ort.get_available_providers())}",
            hint="pip uninstall onnxruntime, then pip install 'gemma3-compile[ort-gpu]'",
        )
    provider: OrtProvider = "cuda" if asked == "cuda" or (asked == "auto" and has_cuda and bfloat16) else "cpu"
    if provider == "cpu" and bfloat16:
        raise HostError(
            "this bundle computes in bfloat16, which ONNX Runtime's CPU provider has no kernels for",
            hint="pip install 'gemma3-compile[ort-gpu]' on a host with a GPU, or build the bundle for a CPU",
        )
    return provider


def session_options(settings: Mapping[str, Scalar], threads: int | None) -> Any:
    """``onnxruntime.SessionOptions`` for one graph.

    Raises:
        BundleError: ``settings`` holds a value that means nothing.
    """
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = usable_cores() if threads is None else threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _ERRORS_ONLY
    level = settings.get("graph_optimization", "all")
    if level not in _OPTIMIZATION:
        raise BundleError(f"`settings.graph_optimization` must be one of {', '.join(_OPTIMIZATION)}, but got {level!r}")
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _OPTIMIZATION[str(level)])
    for name, value in settings.items():
        if name.startswith("config."):
            options.add_session_config_entry(name.removeprefix("config."), str(value))
    return options


def open_graph(path: Path, options: Any, provider: OrtProvider) -> Any:
    """``onnxruntime.InferenceSession`` of one graph file, whose weights are mapped from beside it.

    Raises:
        BundleError: the graph or its weights cannot be loaded.
        HostError: CUDA did not start.
    """
    ort = onnxruntime()
    providers: list[Any] = [_CPU]
    if provider == "cuda":
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        providers.insert(0, _CUDA)
    hint = "`gemma3c verify` finds a damaged file, `gemma3c doctor` a package that is too old"
    if _release(ort.__version__) < _OLDEST:
        hint = f"bundles need ONNX Runtime {_OLDEST[0]}.{_OLDEST[1]} or newer, for the window caches of GroupQueryAttention"
    with translated(BundleError, f"{path.name} cannot be loaded by ONNX Runtime {ort.__version__}", hint):
        graph = ort.InferenceSession(str(path), options, providers=providers)
    if provider == "cuda" and _CUDA not in graph.get_providers():
        raise HostError(
            "ONNX Runtime has a CUDA provider, but it did not start on this host",
            hint="check that `nvidia-smi` lists a GPU, and that the driver suits the CUDA of onnxruntime-gpu",
        )
    return graph


def _release(version: str) -> tuple[int, ...]:
    """(1, 32) of ``1.32.0`` or ``1.32.0.dev20260101``."""
    return tuple(int(part) for part in version.split(".")[:2])
