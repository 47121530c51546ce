"""Which targets work on this host, and what is missing for the others.

Nothing heavy is imported to find out: versions come from the packages' metadata, GPUs from the driver.
Only onnxruntime is imported, since only that shows whether it loads and which providers it has.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

State = Literal["works", "missing", "planned"]

_BUILD_PACKAGES = ("torch", "onnx", "onnx-ir", "safetensors", "gguf", "huggingface-hub")
_TORCH_RANGE = ((2, 11), (2, 15))
_ORT_FROM = (1, 32)
_ORT_GPU_FROM = (1, 31, 1)
_RTX_CAPABILITIES = ((8, 0), (8, 6), (8, 9), (12, 0))
"""What TensorRT for RTX 1.7 runs on, and everything above 12.0; notably not Hopper's 9.0."""
_CU_ATTRIBUTE_MAJOR, _CU_ATTRIBUTE_MINOR = 75, 76


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """An NVIDIA GPU as its driver describes it."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that gemma3c can do here, or not.

    ``planned`` means that this version of gemma3c cannot do it on any host. ``missing`` says what to do about it.
    """

    name: str
    purpose: str
    state: State
    found: str
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Examination:
    """The whole of what was found."""

    host: Mapping[str, str]
    gpus: tuple[Gpu, ...]
    findings: tuple[Finding, ...]

    def state(self, name: str) -> State:
        """The state of one finding."""
        return next(finding.state for finding in self.findings if finding.name == name)


def examine() -> Examination:
    """Looks at this host."""
    gpus = nvidia_gpus()
    host = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(_cores()),
        "memory": f"{_memory_bytes() / 1e9:.1f} GB",
        "gpu": "; ".join(
            f"{g.name}, sm_{g.capability[0]}{g.capability[1]}, {g.memory_bytes / 1e9:.0f} GB" for g in gpus
        )
        or "none that a driver shows",
    }
    findings = (examine_build(), examine_ort(), examine_ort_cuda(gpus), *examine_planned(gpus))
    return Examination(host=host, gpus=gpus, findings=findings)


def examine_build() -> Finding:
    """Whether bundles can be built: torch and the packages that read and write checkpoints and graphs."""
    versions = {name: version_of(name) for name in _BUILD_PACKAGES}
    lacks = [name for name, version in versions.items() if version is None]
    missing = [f"not installed: {', '.join(lacks)}: pip install 'gemma3-compile[build]'"] if lacks else []
    torch = versions["torch"]
    if torch is not None and not _TORCH_RANGE[0] <= _numbers(torch) < _TORCH_RANGE[1]:
        missing.append(f"torch {torch} is outside of 2.11 to 2.14: pip install 'torch>=2.11,<2.15'")
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return _finding("build", "make bundles for the target ort", found, missing)


def examine_ort() -> Finding:
    """Whether bundles for ``ort`` run on this CPU."""
    plain, gpu = version_of("onnxruntime"), version_of("onnxruntime-gpu")
    missing = []
    if plain is None and gpu is None:
        missing.append("onnxruntime is not installed: pip install 'gemma3-compile[ort]'")
    if plain and gpu:
        missing.append("onnxruntime and onnxruntime-gpu overwrite each other: uninstall both, then install one of them")
    if plain and _numbers(plain) < _ORT_FROM:
        missing.append(f"onnxruntime {plain} has no window cache: pip install --upgrade 'onnxruntime>=1.32'")
    if gpu and _numbers(gpu) < _ORT_GPU_FROM:
        missing.append(f"onnxruntime-gpu {gpu} is too old: pip install --upgrade 'onnxruntime-gpu>=1.31.1'")
    if (plain or gpu) and isinstance(providers := _ort_providers(), str):
        missing.append(f"onnxruntime does not load: {providers}")
    found = ", ".join(f"{n} {v}" for n, v in (("onnxruntime", plain), ("onnxruntime-gpu", gpu)) if v)
    return _finding("ort", "run bundles for ort on the CPU", found, missing)


def examine_ort_cuda(gpus: tuple[Gpu, ...]) -> Finding:
    """Whether bundles for ``ort`` run on a GPU through onnxruntime's CUDA provider."""
    providers = _ort_providers()
    missing = []
    if not gpus:
        missing.append("no NVIDIA GPU with a driver")
    if isinstance(providers, str) or "CUDAExecutionProvider" not in providers:
        missing.append("onnxruntime has no CUDA provider: pip install 'gemma3-compile[ort-gpu]' in the place of [ort]")
    return _finding("ort-cuda", "run bundles for ort on an NVIDIA GPU", "CUDA provider" if not missing else "", missing)


def examine_planned(gpus: tuple[Gpu, ...]) -> tuple[Finding, ...]:
    """The targets that this version does not build yet, and what of them is there."""
    rtx = version_of("tensorrt-rtx-cu13") or version_of("tensorrt-rtx")
    refused = [g for g in gpus if g.capability not in _RTX_CAPABILITIES and g.capability <= (12, 0)]
    rtx_missing = tuple(f"TensorRT for RTX refuses {g.name}: full TensorRT is for that" for g in refused)
    no_gpu = () if gpus else ("no NVIDIA GPU with a driver",)
    return (
        _planned("trt", "TensorRT plans", "tensorrt", version_of("tensorrt-cu13") or version_of("tensorrt"), no_gpu),
        _planned("trt-rtx", "TensorRT for RTX plans", "tensorrt-rtx", rtx, no_gpu + rtx_missing),
        _planned("cuda", "tuned kernels without torch", "cuda-core", version_of("cuda-core"), no_gpu),
    )


def version_of(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def nvidia_gpus(load: Callable[[str], ctypes.CDLL] = ctypes.CDLL) -> tuple[Gpu, ...]:
    """The GPUs that the NVIDIA driver shows, asked through its C interface; none without a driver.

    Source: the CUDA driver API, cuDeviceGetAttribute and its neighbours.
    """
    try:
        cuda = load("libcuda.so.1" if sys.platform != "win32" else "nvcuda.dll")
    except OSError:
        return ()
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    gpus = []
    for index in range(count.value):
        device, major, minor, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
        name = ctypes.create_string_buffer(128)
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetName(name, len(name), device)
        cuda.cuDeviceGetAttribute(ctypes.byref(major), _CU_ATTRIBUTE_MAJOR, device)
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), _CU_ATTRIBUTE_MINOR, device)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        capability = (major.value, minor.value)
        gpus.append(Gpu(name=name.value.decode(errors="replace"), capability=capability, memory_bytes=memory.value))
    return tuple(gpus)


def _ort_providers() -> list[str] | str:
    """The execution providers of the installed onnxruntime, or why it does not load."""
    try:
        import onnxruntime
    except ImportError as error:
        return str(error)
    return list(onnxruntime.get_available_providers())


def _finding(name: str, purpose: str, found: str, missing: list[str]) -> Finding:
    state: State = "missing" if missing else "works"
    return Finding(name=name, purpose=purpose, state=state, found=found, missing=tuple(missing))


def _planned(name: str, purpose: str, package: str, version: str | None, missing: tuple[str, ...]) -> Finding:
    lacks = () if version else (f"{package} is not installed",)
    found = f"{package} {version}" if version else ""
    return Finding(name=name, purpose=purpose, state="planned", found=found, missing=lacks + missing)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
