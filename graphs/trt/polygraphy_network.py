"""A bundle's networks for Polygraphy, NVIDIA's tool for looking at networks, building and comparing runs.

    export GEMMA3C_BUNDLE=bundles/270m-trt-auto POLYGRAPHY_USE_TENSORRT_RTX=1
    python -m graphs.trt.polygraphy_network convert graphs/trt/polygraphy_network.py:decoder --model-type trt-network-script …

Run as a module it is Polygraphy with our plugins registered, so that plans load too. :func:`decoder` and :func:`vision` take
no argument and return a builder, a network and a parser, as ``trt-network-script`` asks. docs/trt.md says more.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

from graphs.trt.network import parse
from runtimes.bundle import Bundle
from runtimes.errors import Gemma3CompileError, HostError, UsageError
from runtimes.gpu.kernel_store import KernelStore
from runtimes.trt import load, register_plugins

VARIABLE = "GEMMA3C_BUNDLE"


def decoder() -> tuple[Any, Any, Any]:
    """The decoder's network."""
    return _network("decoder")


def vision() -> tuple[Any, Any, Any]:
    """The vision tower's network."""
    return _network("vision")


def main() -> int:
    """Polygraphy, with the arguments of this process.

    Raises:
        HostError: it is not installed.
    """
    _prepared()  # before Polygraphy imports TensorRT: its parser of plugins needs libraries that are loaded first
    try:
        from polygraphy.tools import main as polygraphy
    except ImportError as error:
        raise HostError(f"Polygraphy is not installed: {error}", hint="pip install polygraphy") from error
    return int(polygraphy() or 0)


def _network(stage: str) -> tuple[Any, Any, Any]:
    trt, bundle = _prepared()
    if stage not in bundle.manifest.stages:
        raise UsageError(f"{bundle.root} has no {stage}; it has {', '.join(bundle.manifest.stages)}")
    parsed = parse(trt, bundle.path(bundle.manifest.stages[stage].graph))
    return parsed.builder, parsed.network, parsed.parser


def _prepared() -> tuple[ModuleType, Bundle]:
    """TensorRT with the plugins of the bundle that the variable names.

    Raises:
        UsageError: it names none, or one for another target.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        raise UsageError(f"the variable {VARIABLE} does not name a bundle", hint=f"{VARIABLE}=bundles/NAME, and again")
    bundle = Bundle.open(path)
    if bundle.manifest.target != "trt":
        raise UsageError(f"{path} is a bundle for {bundle.manifest.target}, not for TensorRT")
    trt = load("full" if bundle.manifest.settings.get("flavour") == "full" else "rtx")
    register_plugins(trt, KernelStore.open(bundle.root))
    return trt, bundle


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Gemma3CompileError as error:
        sys.exit(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
