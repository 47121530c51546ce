"""A plan of a bundle: opened, and compared with what the manifest says of it before anything is uploaded.

``trt``, ``runtime`` and ``engine`` are TensorRT's, whose bindings have no types.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from runtimes.bundle import Bundle
from runtimes.errors import BundleError, Gemma3CompileError, HostError
from runtimes.manifest import StageFacts, TensorFacts
from runtimes.trt.log import failure
from runtimes.trt.weights import WeightInput

_REBUILD = "build the bundle again"
_COPY = "copy or build the bundle again"
_UPDATE = "update the NVIDIA driver: https://www.nvidia.com/drivers"
_TYPES: Mapping[str, str] = MappingProxyType(
    {"int64": "INT64", "int32": "INT32", "float32": "FLOAT", "bfloat16": "BF16", "bool": "BOOL"}
)
"""TensorRT's names for the manifest's types of elements."""
PREFILL, DECODE = 0, 1
"""Profiles of a decoder: chunks of a prompt, and single tokens."""
PROFILES: Mapping[str, int] = MappingProxyType({"decoder": 2, "vision": 1})


@dataclass(frozen=True, kw_only=True)
class PlanTensor:
    """An input or output of a plan. A dimension of -1 varies."""

    name: str
    is_input: bool
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A plan that fits its stage.

    Args:
        weights: inputs that are no inputs of the stage.
        logger: tells why a later call failed.
    """

    stage: str
    file: str
    facts: StageFacts
    engine: Any
    logger: Any
    weights: tuple[WeightInput, ...]

    def most(self, name: str, profile: int) -> tuple[int, ...]:
        """The largest shape that an input may have."""
        return tuple(self.engine.get_tensor_profile_shape(name, profile)[2])

    def least(self, name: str, profile: int) -> tuple[int, ...]:
        """The smallest one."""
        return tuple(self.engine.get_tensor_profile_shape(name, profile)[0])

    def has_input(self, name: str) -> bool:
        """Whether the stage takes an input of this name."""
        return any(tensor.name == name for tensor in self.facts.inputs)


def open_plan(bundle: Bundle, stage: str, trt: ModuleType | Any, runtime: Any, logger: Any) -> Plan:
    """Deserialises the plan of a stage and compares it with the manifest.

    The plugins must be registered with the bundle's kernels.

    Raises:
        HostError: the installed TensorRT, the driver or the GPU does not take the plan.
        BundleError: the plan is damaged, or has other inputs, outputs or profiles than the manifest says.
    """
    facts = bundle.manifest.stages[stage]
    if facts.plan is None:
        raise BundleError(f"{bundle.root}: the stage {stage!r} has no plan", hint=_REBUILD)
    path = bundle.path(facts.plan)
    with _mapped(path) as data:
        _check_header(bundle, path, trt, runtime, data)
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise _refusal(bundle, path, trt, logger)
    tensors = tensors_of(trt, engine)
    _check_tensors(path, facts, tensors)
    _check_aliases(path, facts, engine)
    _check_profiles(bundle, path, stage, engine)
    given = {tensor.name for tensor in facts.inputs}
    weights = tuple(
        WeightInput(name=each.name, dtype=each.dtype, shape=each.shape)
        for each in tensors.values()
        if each.is_input and each.name not in given
    )
    return Plan(stage=stage, file=facts.plan, facts=facts, engine=engine, logger=logger, weights=weights)


def tensors_of(trt: ModuleType | Any, engine: Any) -> dict[str, PlanTensor]:
    """Inputs and outputs of an engine, by name, in its order."""
    found = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        found[name] = PlanTensor(
            name=name,
            is_input=engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
            dtype=engine.get_tensor_dtype(name).name,
            shape=tuple(engine.get_tensor_shape(name)),
        )
        if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            raise BundleError(
                f"the plan wants {name} in the host's memory, which no plan of gemma3c does", hint=_REBUILD
            )
    return found


def _mapped(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot read {path}: {error}", hint=_COPY) from error


def _check_header(bundle: Bundle, path: Path, trt: ModuleType | Any, runtime: Any, data: mmap.mmap) -> None:
    """Asks TensorRT for RTX what it thinks of a plan's first bytes. Full TensorRT has no such call."""
    if not hasattr(runtime, "get_engine_validity"):
        _check_version(bundle, path, trt)
        return
    validity, diagnostics = runtime.get_engine_validity(memoryview(data)[: runtime.engine_header_size])
    if validity != trt.EngineValidity.INVALID:
        return
    flags = trt.EngineInvalidityDiagnostics
    architectures = ", ".join(bundle.manifest.gpu_architectures)
    reasons: tuple[tuple[Any, Gemma3CompileError], ...] = (
        (flags.VERSION_MISMATCH, _other_version(bundle, path, trt)),
        (
            flags.UNSUPPORTED_CC,
            HostError(
                f"{path} was built for {architectures}, and TensorRT finds another GPU here",
                hint="build the bundle with --arch for this GPU",
            ),
        ),
        (flags.OLD_CUDA_DRIVER, HostError(f"the NVIDIA driver is too old for {path}", hint=_UPDATE)),
        (flags.OLD_CUDA_RUNTIME, HostError(f"the CUDA runtime is too old for {path}", hint=_UPDATE)),
        (
            flags.INSUFFICIENT_GPU_MEMORY,
            HostError(
                f"the GPU has too little memory for {path}",
                hint="free the GPU, or build with a smaller --context or --batch",
            ),
        ),
        (
            flags.MALFORMED_ENGINE,
            BundleError(f"{path} is not a plan of TensorRT for RTX, or is damaged", hint=_COPY),
        ),
    )
    for flag, error in reasons:
        if int(diagnostics) & int(flag):
            raise error
    # No reason given, as where CUDA fails: deserialising fails too, and says more.


def _check_version(bundle: Bundle, path: Path, trt: ModuleType | Any) -> None:
    """A plan of full TensorRT runs with the version that built it."""
    built = bundle.manifest.settings.get("tensorrt_version")
    if built != trt.__version__:
        raise _other_version(bundle, path, trt)


def _other_version(bundle: Bundle, path: Path, trt: ModuleType | Any) -> HostError:
    built = bundle.manifest.settings.get("tensorrt_version")
    package = trt.__name__.replace("_", "-")
    return HostError(
        f"{path} was built by {package} {built}, but {trt.__version__} is installed, which does not read it",
        hint=f"pip install '{package}=={built}', or build the bundle again",
    )


def _refusal(bundle: Bundle, path: Path, trt: ModuleType | Any, logger: Any) -> Gemma3CompileError:
    built = bundle.manifest.settings.get("tensorrt_version")
    hint = _REBUILD
    if built != trt.__version__:
        hint = f"the plan is of version {built}, and {trt.__version__} is installed: install that, or {_REBUILD}"
    return failure(logger, f"TensorRT does not load {path}", hint=hint)


def _check_tensors(path: Path, facts: StageFacts, tensors: Mapping[str, PlanTensor]) -> None:
    problems = [
        problem
        for is_input, wanted in ((True, facts.inputs), (False, facts.outputs))
        for each in wanted
        if (problem := _problem(each, tensors.get(each.name), is_input))
    ]
    expected = {tensor.name for tensor in facts.outputs}
    surplus = [t.name for t in tensors.values() if not t.is_input and t.name not in expected]
    if surplus:
        problems.append(f"it also gives {', '.join(surplus[:3])}")
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise BundleError(
            f"{path} is not the plan that the manifest tells of: {'; '.join(problems[:3])}{more}", hint=_REBUILD
        )


def _problem(wanted: TensorFacts, found: PlanTensor | None, is_input: bool) -> str | None:
    role = "input" if is_input else "output"
    if found is None or found.is_input != is_input:
        return f"it has no {role} {wanted.name}"
    shape = tuple(-1 if isinstance(dim, str) else dim for dim in wanted.shape)
    if found.dtype != _TYPES.get(wanted.dtype) or found.shape != shape:
        return f"its {role} {wanted.name} is {found.dtype} {list(found.shape)}, not {wanted.dtype} {list(wanted.shape)}"
    return None


def _check_aliases(path: Path, facts: StageFacts, engine: Any) -> None:
    """An output that TensorRT writes in place must be the cache that it is named after."""
    for output in facts.outputs:
        source = engine.get_aliased_input_tensor(output.name)
        if source and source != cache_input(output.name):
            raise BundleError(f"{path} writes {output.name} over {source}", hint=_REBUILD)


def cache_input(output: str) -> str | None:
    """The cache that an output is the new state of; None for an output that is none."""
    return output.removesuffix(".out") if output.startswith("cache.") and output.endswith(".out") else None


def _check_profiles(bundle: Bundle, path: Path, stage: str, engine: Any) -> None:
    settings = bundle.manifest.settings
    found, wanted = engine.num_optimization_profiles, PROFILES[stage]
    if found != wanted:
        raise BundleError(f"{path} has {found} profiles of sizes, not {wanted}", hint=_REBUILD)
    if stage != "decoder":
        return
    chunk, batch = settings.get("prefill_chunk"), settings.get("max_batch")
    expected: Sequence[tuple[object, ...]] = ((batch, chunk), (batch, 1))
    for profile, most in enumerate(expected):
        shape = tuple(engine.get_tensor_profile_shape("token_ids", profile)[2])
        if shape != most:
            raise BundleError(
                f"profile {profile} of {path} goes up to {shape} tokens (sequences, tokens of each), but the manifest "
                f"says {most}",
                hint=_REBUILD,
            )
