"""What both plugins share: TensorRT's three interfaces around kernels that were compiled ahead of time.

The classes here know TensorRT only by the module that they are given, so that they can be imported, and driven with
anything that looks like a descriptor, where it is not installed. :func:`bound` makes them plugins of one flavour.

At build time nothing of CUDA is called: kernels are looked up in ``kernels.json`` for the memory that they want, and
``enqueue``, which full TensorRT may call with meaningless inputs to take its time, does nothing. A plan stores the
hash of ``kernels.json``, not the kernels: whoever loads it registers the plugins with the same file beforehand.

TensorRT aligns every tensor to 256 bytes, the kernels ask for 16.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from types import ModuleType
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from runtimes.errors import BundleError, Gemma3CompileError
from runtimes.gpu.device import DeviceMemory
from runtimes.gpu.kernel_store import BoundKernel, KernelStore

NAMESPACE, VERSION = "gemma3c", "1"
FieldKind = Literal["int", "float", "text"]
F = TypeVar("F", bound=Callable[..., Any])

_failures: deque[Gemma3CompileError] = deque(maxlen=8)


def take_failure() -> Gemma3CompileError | None:
    """The first error that a plugin raised since the last call, and forgets all.

    TensorRT prints an error of a Python plugin and then says only that it failed itself.
    """
    first = _failures[0] if _failures else None
    _failures.clear()
    return first


def noted(method: F) -> F:
    """Keeps what the method raises for :func:`take_failure`, and raises it."""

    @wraps(method)
    def noting(*arguments: Any, **named: Any) -> Any:
        try:
            return method(*arguments, **named)
        except Gemma3CompileError as error:
            _failures.append(error)
            raise

    return noting  # type: ignore[return-value]


class KernelPlugin:
    """A plugin that launches kernels of a :class:`KernelStore`.

    Args:
        trt: TensorRT's module.
        store: the kernels; None where a graph is only parsed.
        building: made by a parser, for a builder.
        kernels: the hash of ``kernels.json`` that the node or the plan carries; empty where it has none.
        fields: the node's other attributes, which become attributes of this object.
    """

    NAME: ClassVar[str]
    FIELDS: ClassVar[Mapping[str, FieldKind]]
    """Attributes of the node, ``kernels`` left out."""
    INPUTS: ClassVar[tuple[tuple[str, str], ...]]
    OUTPUTS: ClassVar[tuple[tuple[str, str], ...]]
    """Pairs of name and element type: ``bf16``, ``i32``, ``fp32``."""
    ALIASES: ClassVar[Mapping[int, int]] = {}
    """Outputs that are inputs, written in place."""
    KERNELS: ClassVar[tuple[str, ...]]
    """All that may be launched."""

    def __init__(
        self, *, trt: ModuleType | Any, store: KernelStore | None, building: bool, kernels: str, **fields: Any
    ) -> None:
        self.plugin_name = self.NAME
        self.plugin_version = VERSION
        self.plugin_namespace = NAMESPACE
        self.num_outputs = len(self.OUTPUTS)
        self.kernels = kernels
        for name in self.FIELDS:
            setattr(self, name, fields[name])
        self._trt = trt
        self._store = store
        self._building = building
        self._kept: list[Any] = []
        self._bound: dict[tuple[tuple[int, ...], ...], tuple[tuple[BoundKernel, int], ...]] = {}
        self._calls: tuple[tuple[BoundKernel, int], ...] = ()
        self._counters: DeviceMemory | None = None

    # --- what a plugin says (no abstract methods: pybind11's classes and ABCMeta do not go together) ---

    def values(self, shapes: Sequence[Sequence[int]]) -> dict[str, int | float]:
        """Dimensions and parameters of a call, from the shapes of its inputs."""
        raise NotImplementedError

    def paths(self, values: Mapping[str, int | float]) -> tuple[str, ...]:
        """Which kernels run, in order, for a call of these sizes."""
        raise NotImplementedError

    def addresses(self, inputs: Sequence[int], outputs: Sequence[int]) -> dict[str, int]:
        """The kernels' tensors by name."""
        raise NotImplementedError

    # --- all interfaces ---

    def get_capability_interface(self, kind: Any) -> KernelPlugin:
        return self

    @noted
    def clone(self) -> KernelPlugin:
        fields = {name: getattr(self, name) for name in self.FIELDS}
        return type(self)(trt=self._trt, store=self._store, building=self._building, kernels=self.kernels, **fields)

    # --- build ---

    def get_output_data_types(self, types: Sequence[Any]) -> list[Any]:
        return [self._data_type(kind) for _, kind in self.OUTPUTS]

    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
        raise NotImplementedError

    def supports_format_combination(self, position: int, tensors: Sequence[Any], inputs: int) -> bool:
        _, kind = (*self.INPUTS, *self.OUTPUTS)[position]
        found = tensors[position].desc
        return bool(found.format == self._trt.TensorFormat.LINEAR and found.type == self._data_type(kind))

    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        pass

    def get_valid_tactics(self) -> list[int]:
        return []

    def get_aliased_input(self, output: int) -> int:
        return self.ALIASES.get(output, -1)

    @noted
    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        """Enough for every kernel and architecture at the largest sizes of the profile."""
        if not self.kernels:
            return 0
        values = self.values([tuple(tensor.max) for tensor in inputs])
        return sum(self._kernels().workspace_bytes(name, values) for name in self.KERNELS)

    # --- run ---

    def get_fields_to_serialize(self) -> Any:
        """TensorRT reads the arrays after this returns: they live as long as the plugin."""
        fields = [_field(self._trt, name, kind, getattr(self, name)) for name, kind in self.FIELDS.items()]
        fields.append(_field(self._trt, "kernels", "text", self.kernels))
        collection = self._trt.PluginFieldCollection([field for field, _ in fields])
        self._kept.append((fields, collection))
        return collection

    @noted
    def attach_to_context(self, context: Any) -> KernelPlugin:
        """Loads all that can be: nothing is loaded or allocated while a graph is captured."""
        attached = self.clone()
        if not attached._building:
            store = attached._kernels()
            store.load()
            size = store.counter_bytes(self.KERNELS)
            attached._counters = store.zeros(size) if size else None
        return attached

    def set_tactic(self, tactic: int) -> None:
        pass

    @noted
    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Chooses the kernels for the sizes to come; those that were met before are at hand."""
        if self._building:
            return
        shapes = tuple(tuple(tensor.dims) for tensor in inputs)
        if shapes not in self._bound:
            self._bound[shapes] = self._bind(shapes)
        self._calls = self._bound[shapes]

    @noted
    def enqueue(
        self,
        input_desc: Sequence[Any],
        output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Launches on ``stream``. The host waits for nothing; a CUDA graph can capture it."""
        if self._building:
            return
        assert self._calls, "TensorRT tells the shapes before the first call"
        for output, source in self.ALIASES.items():
            if outputs[output] != inputs[source]:
                names = self.OUTPUTS[output][0], self.INPUTS[source][0]
                raise BundleError(f"{self.NAME} writes in place: {names[0]} and {names[1]} must have one address")
        tensors = self.addresses(inputs, outputs)
        counters = self._counters.address if self._counters is not None else 0
        for call, begin in self._calls:
            call.launch(stream, tensors, workspace + begin, counters)

    def _bind(self, shapes: tuple[tuple[int, ...], ...]) -> tuple[tuple[BoundKernel, int], ...]:
        """Kernels, and where in the workspace each begins."""
        values = self.values(shapes)
        calls, end = [], 0
        for name in self.paths(values):
            call = self._kernels().bind(name, values)
            for (tensor, _), shape in zip(self.INPUTS, shapes, strict=True):
                wanted = call.shapes.get(tensor, shape)
                if wanted != shape:
                    raise BundleError(f"{self.NAME}: {tensor} is {shape}, but {name} was compiled for {wanted}")
            calls.append((call, end))
            end += call.workspace_bytes
        return tuple(calls)

    def _kernels(self) -> KernelStore:
        if self._store is None or not self.kernels:
            raise BundleError(
                f"{self.NAME} has no kernels: the plan was built, or the plugins were registered, without them",
                hint="build the bundle again",
            )
        return self._store

    def _data_type(self, kind: str) -> Any:
        return {"bf16": self._trt.bfloat16, "i32": self._trt.int32, "fp32": self._trt.float32}[kind]


class KernelPluginCreator:
    """Makes plugins of one class from the fields of a node or of a plan.

    ``store``: the kernels of the plugins made from now on.
    """

    def __init__(self, trt: ModuleType | Any, plugin: type[KernelPlugin], store: KernelStore | None) -> None:
        self.name = plugin.NAME
        self.plugin_version = VERSION
        self.plugin_namespace = NAMESPACE
        self.store = store
        self._trt = trt
        self._plugin = plugin
        kinds: dict[str, FieldKind] = {**plugin.FIELDS, "kernels": "text"}
        self._kept = [_field(trt, name, kind, None) for name, kind in kinds.items()]
        self.field_names = trt.PluginFieldCollection([field for field, _ in self._kept])

    @noted
    def create_plugin(self, name: str, fields: Any, phase: Any) -> KernelPlugin:
        found = {field.name: field for field in fields}
        missing = sorted({*self._plugin.FIELDS, "kernels"} - found.keys())
        if missing:
            raise BundleError(f"the node {name} of {self.name} lacks the attribute {missing[0]}")
        kernels = _text(found["kernels"].data)
        building = phase == self._trt.TensorRTPhase.BUILD
        if self.store is not None and (kernels or not building):
            self.store.check_hash(kernels, who=f"the node {name} of {self.name}" if building else "the plan")
        numbers = {"int": int, "float": float}
        values = {name: numbers[kind](found[name].data[0]) for name, kind in self._plugin.FIELDS.items()}
        return self._plugin(trt=self._trt, store=self.store, building=building, kernels=kernels, **values)


@cache
def bound(trt: ModuleType, plugin: type[KernelPlugin]) -> type[KernelPlugin]:
    """The plugin class for one flavour of TensorRT."""
    interfaces = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime)
    return _derived(plugin, interfaces)  # type: ignore[no-any-return]


@cache
def bound_creator(trt: ModuleType) -> type[KernelPluginCreator]:
    """The creator's class for one flavour of TensorRT."""
    return _derived(KernelPluginCreator, (trt.IPluginCreatorV3One,))  # type: ignore[no-any-return]


def _derived(base: Any, interfaces: tuple[Any, ...]) -> Any:
    def initialise(self: Any, *arguments: Any, **named: Any) -> None:
        for interface in interfaces:
            interface.__init__(self)
        base.__init__(self, *arguments, **named)

    return type(base.__name__, (base, *interfaces), {"__init__": initialise, "__module__": base.__module__})


def _field(trt: Any, name: str, kind: FieldKind, value: Any) -> tuple[Any, Any]:
    """A field, and the array that its memory is."""
    types = {
        "int": (np.int32, trt.PluginFieldType.INT32),
        "float": (np.float32, trt.PluginFieldType.FLOAT32),
        "text": (np.int8, trt.PluginFieldType.CHAR),
    }
    dtype, field_type = types[kind]
    if value is None:
        data = np.empty(0, dtype)
    elif kind == "text":
        # An empty array has no address to write from: an empty text is one zero, as the parser has it.
        data = np.frombuffer(value.encode() or b"\0", np.int8)
    else:
        data = np.array([value], dtype)
    return trt.PluginField(name, data, field_type), data


def _text(data: Any) -> str:
    return np.asarray(data, np.int8).tobytes().rstrip(b"\0").decode("ascii")
