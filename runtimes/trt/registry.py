"""Making the plugins known to TensorRT."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from runtimes.errors import HostError
from runtimes.gpu.kernel_store import KernelStore
from runtimes.trt.plugin_base import NAMESPACE, VERSION, KernelPlugin, bound, bound_creator, take_failure
from runtimes.trt.plugin_pool import SigLIPPoolPlugin
from runtimes.trt.plugin_window import SlidingWindowAttentionPlugin

__all__ = ["PLUGINS", "register_plugins", "take_failure"]

PLUGINS: tuple[type[KernelPlugin], ...] = (SlidingWindowAttentionPlugin, SigLIPPoolPlugin)

_creators: dict[tuple[str, str], Any] = {}
"""By module and plugin. TensorRT's registry does not keep them alive."""


def register_plugins(trt: ModuleType, kernels: KernelStore | None) -> None:
    """Registers both creators. A second call changes the kernels of the plugins that are made from then on.

    Args:
        kernels: those of the bundle; None where graphs are parsed, but neither built nor run.

    Raises:
        HostError: something else has registered plugins of these names.
    """
    registry = trt.get_plugin_registry()
    for plugin in PLUGINS:
        known = _creators.get((trt.__name__, plugin.NAME))
        if known is not None:
            known.store = kernels
            continue
        creator = bound_creator(trt)(trt, bound(trt, plugin), kernels)  # type: ignore[arg-type]  # mypy takes a class for unhashable
        if not registry.register_creator(creator, NAMESPACE):
            raise HostError(
                f"{trt.__name__} knows another plugin {NAMESPACE}::{plugin.NAME}, version {VERSION}",
                hint="load only one library of gemma3c's plugins",
            )
        _creators[trt.__name__, plugin.NAME] = creator
