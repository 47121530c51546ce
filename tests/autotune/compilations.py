"""Which launches stand for all that a kernel compiles to: the largest of each variant.

The largest takes the most shared memory and registers. ``python -m tests.autotune.compilations [KERNEL ...]`` compiles
them all and prints what each takes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from autotune.ahead_of_time import Compiled, CompilerPool
from autotune.gpu import GPUS, Gpu
from autotune.kernel import Case, Config, Kernel
from autotune.launch import Launch
from autotune.model_shapes import ModelShapes
from autotune.record_file import Records

DTYPES = ("bfloat16", "int8", "int4")
SIZES = ("270m", "1b", "4b", "12b", "27b")
SHAPES = ((1, 1024), (4, 1000), (1, 131072))
"""Batch and context."""
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
FAMILIES = ((80, 86, 89), (90,), (100,), (120,))
"""The first of each makes cubins that the others run too, and that need as much shared memory there."""


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """One launch of a configuration, compiled for ``architecture`` to run on ``gpus``."""

    kernel: Kernel
    case: Case
    config: Config
    launch: Launch
    architecture: int
    gpus: tuple[Gpu, ...]

    @property
    def shared_bytes(self) -> int:
        """Shared memory that each of the GPUs has."""
        return min(gpu.shared_bytes for gpu in self.gpus)

    @property
    def variant(self) -> tuple[object, ...]:
        """The function, the dtype of the case, the head's size, and each constant that is true or false."""
        choices = tuple((name, value) for name, value in self.launch.constants.items() if isinstance(value, bool))
        head_dim = self.case.dims.get("head_dim", 0)
        return (self.launch.function.__name__, self.case.dtype, head_dim, choices, self.architecture)

    @property
    def size(self) -> tuple[int, float]:
        """The number of tensors, since each that may be left out adds work; then the product of all sizes, as a logarithm."""
        tensors = sum(isinstance(value, torch.Tensor) for value in self.launch.arguments.values())
        sizes = [value for value in self.launch.constants.values() if type(value) is int]
        return tensors, sum(math.log2(max(value, 1)) for value in sizes)

    def __str__(self) -> str:
        function = self.launch.function.__name__
        return f"{self.kernel.name}, {self.case}, {self.config}, {function} for sm_{self.architecture}"


def a_gpu_of(architecture: int) -> Gpu:
    """A known GPU of the architecture."""
    return next(gpu for gpu in GPUS.values() if gpu.architecture == architecture)


def cases_of(kernel: Kernel, models: Iterable[ModelShapes]) -> list[Case]:
    """Every case that a model runs, once."""
    found: dict[str, Case] = {}
    for model in models:
        for stage in kernel.stages:
            for dtype in DTYPES:
                for batch, context in SHAPES:
                    for use in kernel.uses(model, stage, batch=batch, context=context, dtype=dtype):
                        found.setdefault(str(use.case), use.case)
    return list(found.values())


def default_compilations(kernel: Kernel, models: Sequence[ModelShapes]) -> list[Compilation]:
    """The heuristics of each architecture on the cases of all models, the largest of each variant."""
    gpus = [a_gpu_of(architecture) for architecture in ARCHITECTURES]
    return _largest(
        (made.variant, made)
        for case in cases_of(kernel, models)
        for gpu in gpus
        for made in _launches(kernel, case, kernel.default(case, gpu), [gpu])
    )


def recorded_compilations(kernel: Kernel, records: Records, *, everywhere: bool = False) -> list[Compilation]:
    """Every recorded configuration, for each family of architectures on the GPUs where the kernel does not refuse it.

    Args:
        everywhere: False takes only the largest of each variant on architectures that the store never hands a record to:
            those of another major compute capability.
    """
    pairs: list[tuple[object, Compilation]] = []
    for model, record in ((model, record) for model, found in records.items() for record in found.values()):
        for family in FAMILIES if record.kernel == kernel.name else ():
            gpus = [a_gpu_of(architecture) for architecture in family]
            fits = [gpu for gpu in gpus if kernel.refusal(record.case, record.config, gpu) is None]
            own = everywhere or family[0] // 10 == model.compute_capability[0]
            for made in _launches(kernel, record.case, record.config, fits, family[0]):
                pairs.append(((made.variant, str(record.config) if own else ""), made))
    return _largest(pairs)


def _largest(pairs: Iterable[tuple[object, Compilation]]) -> list[Compilation]:
    """Of those with one key the largest."""
    found: dict[object, Compilation] = {}
    for key, made in pairs:
        if key not in found or found[key].size < made.size:
            found[key] = made
    return list(found.values())


def _launches(
    kernel: Kernel, case: Case, config: Config, gpus: Sequence[Gpu], architecture: int | None = None
) -> list[Compilation]:
    if not gpus:
        return []
    tensors = kernel.inputs(case, device="meta") | kernel.outputs(case, config, device="meta")
    return [
        Compilation(
            kernel=kernel,
            case=case,
            config=config,
            launch=launch,
            architecture=architecture or gpus[0].architecture,
            gpus=tuple(gpus),
        )
        for launch in kernel.launches(case, config, tensors)
    ]


def main(names: Sequence[str]) -> None:
    """Compiles the named kernels, or all: heuristics and every recorded configuration everywhere, a line a launch."""
    from autotune.record_store import RecordStore
    from autotune.registry import KERNELS
    from gemma3_compile.model_shapes import model_shapes
    from gemma3_compile.presets import PRESETS

    models = [model_shapes(PRESETS[size]) for size in SIZES]
    records = RecordStore().records("shipped")
    with CompilerPool() as pool:
        for kernel in (KERNELS[name] for name in names or KERNELS):
            made = default_compilations(kernel, models) + recorded_compilations(kernel, records, everywhere=True)
            results = pool.compile_all([(each.launch, each.architecture) for each in made])
            for each, result in zip(made, results, strict=True):
                facts = (
                    f"{result.shared_bytes} of {each.shared_bytes} B shared, {result.registers} registers, "
                    f"{result.spill_bytes} B spilt"
                    if isinstance(result, Compiled)
                    else result.message
                )
                sys.stdout.write(f"{each}: {facts}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
