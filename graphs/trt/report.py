"""What is known of a network and of the plan made from it, as frozen dataclasses that JSON holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from graphs.trt.profiles import Range
from runtimes.trt.binding import Flavour


@dataclass(frozen=True, kw_only=True)
class TensorReport:
    """An input or output of a network; a string in ``shape`` names a dimension that varies."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class PluginReport:
    """A plugin layer.

    Args:
        layer: its name, that of the ONNX node.
        plugin: ``gemma3c::SlidingWindowAttention``.
        fields: what the plan stores of it.
        aliases: output tensors that are input tensors, written in place.
    """

    layer: str
    plugin: str
    fields: Mapping[str, int | float | str]
    aliases: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class NetworkReport:
    """A network as TensorRT's parser left it. ``layers`` counts each kind."""

    layers: Mapping[str, int]
    plugins: tuple[PluginReport, ...]
    inputs: tuple[TensorReport, ...]
    outputs: tuple[TensorReport, ...]


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """A plan, and the network that it was made from. Equal builds have equal reports."""

    flavour: Flavour
    tensorrt_version: str
    architectures: tuple[str, ...]
    network: NetworkReport
    profiles: tuple[Mapping[str, Range], ...]
    plan_bytes: int


@dataclass(frozen=True, kw_only=True)
class BuiltPlan:
    """A report, and what the making of it took: the process that built, from its start to its end.

    ``fixed_addresses`` tells whether the system gave that process the same addresses as always, without which equal
    builds may differ in the order of some tensors.
    """

    report: PlanReport
    seconds: float
    peak_rss_bytes: int
    fixed_addresses: bool
