"""What an inference host needs, and nothing else: load a bundle, write text, look at pictures.

    import runtimes

    engine = runtimes.load("bundles/270m")
    print(engine.generate("Why is the sky blue?", max_tokens=64).text)

Importing this package imports none of its needs; each comes with the first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from runtimes.version import __version__

if TYPE_CHECKING:
    import os

    from runtimes.bundle import Bundle
    from runtimes.chat import Message, Prompt
    from runtimes.conversation import Conversation
    from runtimes.engine import Engine
    from runtimes.errors import Gemma3CompileError
    from runtimes.progress import Progress
    from runtimes.results import Generation, GenerationOptions, GenerationStats, Stream
    from runtimes.sampling import SamplingOptions
    from runtimes.session import Provider, Session, open_session

__all__ = [
    "load",
    "open_session",
    "Bundle",
    "Conversation",
    "Engine",
    "Gemma3CompileError",
    "Generation",
    "GenerationOptions",
    "GenerationStats",
    "Message",
    "Prompt",
    "SamplingOptions",
    "Session",
    "Stream",
    "__version__",
]

_HOMES = {
    "Bundle": "bundle",
    "Conversation": "conversation",
    "Engine": "engine",
    "Gemma3CompileError": "errors",
    "Generation": "results",
    "GenerationOptions": "results",
    "GenerationStats": "results",
    "Message": "chat",
    "Prompt": "chat",
    "SamplingOptions": "sampling",
    "Session": "session",
    "Stream": "results",
    "open_session": "session",
}


def load(
    path: str | os.PathLike[str],
    *,
    provider: Provider = "auto",
    threads: int | None = None,
    context: int | None = None,
    chunk: int | None = None,
    progress: Progress | None = None,
) -> Engine:
    """Loads a bundle.

    Args:
        path: the folder that ``gemma3c build`` wrote.
        provider: ``cpu``, ``cuda``, or ``auto``: CUDA where it is there and suits the bundle.
        threads: of the CPU; None takes the physical cores that this process may use.
        context: the most tokens of prompt and answer together; None takes the bundle's own limit.
        chunk: tokens of a prompt that go through the decoder at once; None takes the bundle's setting.
        progress: is told of what takes long, such as the upload of weights to a GPU.

    Raises:
        BundleError: the bundle is missing, damaged, or too new.
        HostError: a package, provider or device is missing; the hint names the extra to install.
    """
    from runtimes.engine import Engine
    from runtimes.progress import SILENT

    return Engine.open(
        path, provider=provider, threads=threads, context=context, chunk=chunk, progress=progress or SILENT
    )


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'runtimes' has no attribute {name!r}")
    return getattr(import_module(f"runtimes.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
