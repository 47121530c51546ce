"""TensorRT's runtime, standing in for the real one where there is no GPU: its calls, its rules, and right results.

The module is the real one but for ``Runtime``. An engine is made of the bundle's own graph, as TensorRT's parser reads it,
and a run is an interpretation of that network over what lies at the addresses that the session set. The rules that are
held: a context has memory, a profile, and shapes within it; every tensor has an aligned address; what is written in place
has one address; a context is run over its shapes before it is captured, and is not changed afterwards.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graphs.trt.interpreter import FileWeights, InitializerWeights, InterpretedBundle, Interpreter
from graphs.trt.interpreter.rule import DTYPES
from graphs.trt.profiles import dims_of
from graphs.trt.report import PlanReport
from runtimes import records
from runtimes.bundle import Bundle
from runtimes.trt import load
from tests.runtimes.trt.cuda_standin import CudaStandIn

SCRATCH_BYTES = 4096
RTX_ONLY = ("DynamicShapesKernelSpecializationStrategy", "CudaGraphStrategy", "EngineInvalidityDiagnostics")


@dataclass(eq=False)
class Recorded:
    """What was asked of TensorRT, in order: ``run`` and ``captured run`` with profile and token shape, and more."""

    events: list[tuple[Any, ...]] = field(default_factory=list)

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [event[1:] for event in self.events if event[0] == kind]


class TrtStandIn:
    """The module. Attributes say what goes wrong.

    Args:
        networks: of the bundle.
        rtx: as TensorRT for RTX; else as the full one.

    Attributes:
        validity: what is thought of a plan's header; None where it is valid.
        changes: replaces facts of tensors, by name.
        refused: says why a call (``context``, ``profile``, ``run``) fails.
    """

    def __init__(self, bundle: Bundle, networks: InterpretedBundle, cuda: CudaStandIn, *, rtx: bool = True) -> None:
        self._real = load("rtx")
        self.__name__ = "tensorrt_rtx" if rtx else "tensorrt"
        self.__version__ = self._real.__version__
        self.bundle, self.networks, self.cuda, self.rtx = bundle, networks, cuda, rtx
        self.recorded = Recorded()
        self.validity: Any = None
        self.changes: dict[str, dict[str, Any]] = {}
        self.refused: dict[str, str] = {}
        self.can_capture = True
        self.kernels = 0
        self.Runtime = lambda logger: Runtime(self, logger)

    def __getattr__(self, name: str) -> Any:
        if not self.rtx and name in RTX_ONLY:
            raise AttributeError(name)
        return getattr(self._real, name)


class Runtime:
    def __init__(self, trt: TrtStandIn, logger: Any) -> None:
        self._trt, self._logger = trt, logger
        if trt.rtx:
            self.engine_header_size = 64
            self.get_engine_validity = self._validity

    def _validity(self, header: memoryview) -> tuple[Any, int]:
        trt = self._trt
        assert len(header) == 64
        if trt.validity is None:
            return trt.EngineValidity.VALID, 0
        return trt.EngineValidity.INVALID, int(trt.validity)

    def deserialize_cuda_engine(self, data: Any) -> Engine | None:
        trt = self._trt
        for stage, facts in trt.bundle.manifest.stages.items():
            if facts.plan is not None and bytes(data) == (trt.bundle.root / facts.plan).read_bytes():
                trt.recorded.events.append(("engine", stage))
                return Engine(trt, stage, self._logger)
        self._logger.log(trt.ILogger.Severity.ERROR, "Serialization (magic tag does not match)")
        return None


class Engine:
    device_memory_size_v2 = SCRATCH_BYTES

    def __init__(self, trt: TrtStandIn, stage: str, logger: Any) -> None:
        self.trt, self.stage, self.logger = trt, stage, logger
        self.program = trt.networks.programs[stage]
        self.tensors = {t.name: t for t in (*self.program.inputs, *self.program.outputs)}
        self.inputs = {t.name for t in self.program.inputs}
        # Weights are not looked up: what is computed with lies where the session put it.
        constants: InitializerWeights = trt.networks.constants[stage]
        weights: FileWeights | None = None
        self.interpreter = Interpreter(self.program, weights=weights, constants=constants)
        plans = json.loads(trt.bundle.path("plans.json").read_bytes())
        self.report = records.from_json(PlanReport, plans[stage], where="plans.json")
        self.num_optimization_profiles = len(self.report.profiles)
        if "profiles" in trt.changes:
            self.num_optimization_profiles = trt.changes["profiles"]["count"]
        self.num_io_tensors = len(self.tensors)
        self.ranges = [
            {t.name: dims_of(t.shape, profile) for t in self.report.network.inputs} for profile in self.report.profiles
        ]

    def _changed(self, name: str, what: str, value: Any) -> Any:
        return self.trt.changes.get(name, {}).get(what, value)

    def get_tensor_name(self, index: int) -> str:
        name = list(self.tensors)[index]
        return str(self._changed(name, "name", name))

    def _tensor(self, name: str) -> Any:
        renamed = {self._changed(real, "name", real): real for real in self.tensors}
        return self.tensors[renamed[name]]

    def get_tensor_mode(self, name: str) -> Any:
        mode = self.trt.TensorIOMode
        return mode.INPUT if self._tensor(name).name in self.inputs else mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self.trt.DataType, self._changed(name, "dtype", self._tensor(name).dtype))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._changed(name, "shape", self._tensor(name).shape))

    def get_tensor_location(self, name: str) -> Any:
        return getattr(self.trt.TensorLocation, self._changed(name, "location", "DEVICE"))

    def get_aliased_input_tensor(self, name: str) -> str | None:
        source: str | None = self._changed(name, "alias", None)
        return source

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return list(self._changed(name, "profile", self.ranges[profile][name]))

    def create_runtime_config(self) -> Any:
        assert self.trt.rtx
        return Config(self.trt)

    def create_execution_context(self, given: Any) -> Context | None:
        trt = self.trt
        managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        assert (given.allocation if trt.rtx else given) == managed
        assert not trt.cuda.capturing, "no context is made while a graph is captured"
        if "context" in trt.refused:
            self.logger.log(trt.ILogger.Severity.ERROR, trt.refused["context"])
            return None
        if trt.rtx:
            assert given.runtime_cache is not None and given.cuda_graph_strategy == trt.CudaGraphStrategy.DISABLED
            strategy = given.dynamic_shapes_kernel_specialization_strategy.name
            given.runtime_cache.entries += 1
        else:
            strategy = ""
        trt.recorded.events.append(("context", self.stage, strategy))
        return Context(self)


class Config:
    """IRuntimeConfig."""

    def __init__(self, trt: TrtStandIn) -> None:
        self._trt = trt
        self.allocation: Any = None
        self.runtime_cache: RuntimeCache | None = None
        self.dynamic_shapes_kernel_specialization_strategy: Any = None
        self.cuda_graph_strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.allocation = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self._trt)

    def set_runtime_cache(self, runtime_cache: RuntimeCache) -> bool:
        self.runtime_cache, runtime_cache.in_use = runtime_cache, True
        return True


class RuntimeCache:
    """IRuntimeCache: counts what was compiled."""

    def __init__(self, trt: TrtStandIn) -> None:
        self._trt, self.entries, self.in_use = trt, 0, False

    def deserialize(self, blob: bytes) -> bool:
        assert not self.in_use, "the sample reads a cache before it is given to a configuration"
        accepted = blob.startswith(b"compiled ")
        self._trt.recorded.events.append(("cache read", accepted))
        return accepted

    def serialize(self) -> bytes:
        return b"compiled %d" % self.entries


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.trt = engine, engine.trt
        self.profile = -1
        self.memory = (0, 0)
        self.addresses: dict[str, int] = {}
        self.shapes = {t.name: t.shape for t in engine.program.inputs if -1 not in t.shape}
        self.ran_over: Any = None
        self.frozen = False
        if self.trt.rtx:
            self.is_stream_capturable = lambda stream: self.trt.can_capture

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = (address, size)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream in self.trt.cuda.streams
        if "profile" in self.trt.refused:
            return False
        self.profile = profile
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert not self.frozen, "the context of a graph was changed"
        assert address % 256 == 0, f"{name} lies at {address:#x}"
        self.addresses[name] = address
        return name in self.engine.tensors

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert not self.frozen, "the context of a graph was changed"
        least, _, most = self.engine.ranges[self.profile][name]
        inside = len(shape) == len(least) and all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))
        if not inside:
            self._log(f"{name} of {shape} is not within {least} and {most}")
            return False
        self.shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        return sorted(self.engine.inputs - self.shapes.keys())

    def execute_async_v3(self, stream_handle: int) -> bool:
        stream = self.trt.cuda.streams[stream_handle]
        if "run" in self.trt.refused:
            self._log(self.trt.refused["run"])
            return False
        self._check()
        captured = stream.captured is not None
        if captured:
            assert self.ran_over == (self.shapes, self.profile), "captured before a first run over these shapes"
            self.frozen = True
        else:
            assert not self.frozen, "the context of a graph was run"
        self.ran_over = (dict(self.shapes), self.profile)
        shown = self.shapes["token_ids" if self.engine.stage == "decoder" else "pixels"]
        self.trt.recorded.events.append(("captured run" if captured else "run", self.profile, shown))
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        stream.put(lambda: self._run(shapes, addresses))
        return True

    def _check(self) -> None:
        assert self.profile >= 0 and self.memory[1] >= SCRATCH_BYTES
        self.trt.cuda.device_memory.at(*self.memory)
        assert self.addresses.keys() >= self.engine.tensors.keys(), self.engine.tensors.keys() - self.addresses.keys()
        assert not self.infer_shapes()
        for output in self.engine.program.outputs:
            if output.name.endswith(".out"):
                assert self.addresses[output.name] == self.addresses[output.name.removesuffix(".out")], output.name

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        feeds = {t.name: self._at(t.dtype, shapes[t.name], addresses[t.name]) for t in self.engine.program.inputs}
        self.trt.cuda.device_memory.at(*self.memory)[:] = 0xFF  # whoever shares it finds nothing of its own
        for name, value in self.engine.interpreter.run(feeds).items():
            facts = self.engine.tensors[name]
            if not name.endswith(".out"):
                self._at(facts.dtype, tuple(value.shape), addresses[name]).copy_(value)

    def _at(self, dtype: str, shape: tuple[int, ...], address: int) -> Tensor:
        kind = DTYPES[dtype]
        size = math.prod(shape) * kind.itemsize
        data: Tensor = torch.from_numpy(self.trt.cuda.device_memory.at(address, size))
        return data.view(kind).view(shape)

    def _log(self, message: str) -> None:
        self.engine.logger.log(self.trt.ILogger.Severity.ERROR, message)
