"""Contexts of one plan, which share one piece of memory for what is computed between inputs and outputs.

They may share it, since all run on one stream, one after the other. TensorRT would give each its own, of the size that the
longest chunk takes; and a context whose work was captured as a CUDA graph may never be changed again, so there are several.

With TensorRT for RTX a plan is compiled on the host. Two of its choices are made here (docs/trt-runtime.md has the reasons):
what sizes kernels are made for, and that a step is captured by us, not by TensorRT.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from runtimes.bundle import Bundle
from runtimes.errors import BundleError
from runtimes.trt.engine_file import Plan
from runtimes.trt.gpu import Gpu
from runtimes.trt.log import failure
from runtimes.trt.runtime_cache import RuntimeCacheFile

Sizes = Literal["many", "few"]
"""Whether a context meets ever new sizes, as with the ends of prompts, or a few again and again."""


class Contexts:
    """Makes a plan's contexts, with ``fixed`` addresses set in each.

    Args:
        fixed: addresses of inputs that never change: the weights.
    """

    def __init__(self, plan: Plan, fixed: Mapping[str, int], gpu: Gpu, bundle: Bundle, trt: ModuleType | Any) -> None:
        self._plan, self._fixed, self._gpu, self._trt = plan, fixed, gpu, trt
        engine = plan.engine
        self._scratch_bytes = int(engine.device_memory_size_v2)
        self._scratch = gpu.allocate(self._scratch_bytes, f"what {plan.file} computes with")
        self._configs: dict[Sizes, Any] = {}
        self._cache_file: RuntimeCacheFile | None = None
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):  # TensorRT for RTX
            self._cache_file = self._configure(bundle)

    @property
    def warm(self) -> bool:
        """Whether kernels that were compiled before are at hand."""
        return self._cache_file is None or self._cache_file.loaded

    def make(self, profile: int, sizes: Sizes) -> Context:
        """A context for one profile, not to be made while a graph is captured.

        Raises:
            HostError: TensorRT makes none; where a plugin failed, its error.
        """
        engine, trt = self._plan.engine, self._trt
        if self._configs:
            context = engine.create_execution_context(self._configs[sizes])
        else:
            context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        what = f"TensorRT makes no context of {self._plan.file}"
        if context is None:
            raise failure(self._plan.logger, what)
        context.set_device_memory(self._scratch.address, self._scratch_bytes)
        stream = int(self._gpu.stream.handle)
        if not context.set_optimization_profile_async(profile, stream):
            raise failure(self._plan.logger, f"{what} for profile {profile}")
        made = Context(context, self._plan, self._gpu)
        for name, address in self._fixed.items():
            made.set_address(name, address)
        return made

    def save(self) -> Path | None:
        """Keeps what RTX has compiled; says where, if anything is new."""
        return None if self._cache_file is None else self._cache_file.save()

    def close(self) -> None:
        """Gives the memory back; the contexts must be gone."""
        self._configs.clear()
        self._cache_file = None
        self._scratch.close()

    def _configure(self, bundle: Bundle) -> RuntimeCacheFile:
        trt = self._trt
        specialisation = trt.DynamicShapesKernelSpecializationStrategy
        file: RuntimeCacheFile | None = None
        strategies: dict[Sizes, Any] = {"many": specialisation.LAZY, "few": specialisation.EAGER}
        for sizes, strategy in strategies.items():
            config = self._plan.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            config.dynamic_shapes_kernel_specialization_strategy = strategy
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
            if file is None:
                file = RuntimeCacheFile(config.create_runtime_cache(), bundle, self._plan.file, trt)
            config.set_runtime_cache(file.runtime_cache)
            self._configs[sizes] = config
        assert file is not None
        return file


class Context:
    """A context that is given addresses and shapes, and run."""

    def __init__(self, context: Any, plan: Plan, gpu: Gpu) -> None:
        self._context, self._plan, self._gpu = context, plan, gpu
        self._stream = int(gpu.stream.handle)

    def set_address(self, name: str, address: int) -> None:
        """Where an input or output lies."""
        context = self._context
        if not context.set_tensor_address(name, address):
            raise BundleError(f"{self._plan.file} has no input or output {name}", hint="build the bundle again")

    def set_input(self, name: str, address: int, shape: tuple[int, ...]) -> None:
        """Where an input lies, and its shape.

        Raises:
            HostError: the plan is not made for that shape.
        """
        context = self._context
        if not context.set_input_shape(name, shape):
            raise failure(self._plan.logger, f"{self._plan.file} takes no {name} of {list(shape)}")
        self.set_address(name, address)

    def check_complete(self) -> None:
        """Raises HostError where an input has no address or shape yet."""
        context = self._context
        missing = context.infer_shapes()
        if missing:
            raise failure(self._plan.logger, f"{self._plan.file} is not told all of its inputs: {', '.join(missing)}")

    @property
    def can_be_captured(self) -> bool:
        """Whether a CUDA graph can hold a run. Full TensorRT does not say: it is tried."""
        context = self._context
        return not hasattr(context, "is_stream_capturable") or bool(context.is_stream_capturable(self._stream))

    def run(self) -> None:
        """Puts one run onto the stream.

        Raises:
            HostError: TensorRT refuses; where a plugin failed, its error.
        """
        context = self._context
        if not context.execute_async_v3(self._stream):
            raise failure(self._plan.logger, f"{self._plan.file} was not run")
