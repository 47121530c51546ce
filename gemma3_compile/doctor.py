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

from autotune.gpu_model import GpuModel
from autotune.record_folders import summary
from runtimes.bundle import Bundle
from runtimes.trt.binding import ARCHITECTURES, EXTRAS, Flavour

State = Literal["works", "missing", "planned"]

_BUILD_PACKAGES = ("torch", "onnx", "onnx-ir", "safetensors", "gguf", "huggingface-hub")
_TORCH_RANGE = ((2, 11), (2, 15))
_ORT_FROM = (1, 32)
_ORT_GPU_FROM = (1, 31, 1)
_TRT: Mapping[Flavour, tuple[str, tuple[str, ...], tuple[int, ...]]] = {
    "full": ("full TensorRT", ("tensorrt-cu13", "tensorrt"), (11, 4)),
    "rtx": ("TensorRT for RTX", ("tensorrt-rtx-cu13", "tensorrt-rtx"), (1, 7)),
}
"""What it is called, its packages, and from which version on."""
_CU_ATTRIBUTE_MULTIPROCESSORS, _CU_ATTRIBUTE_MAJOR, _CU_ATTRIBUTE_MINOR = 16, 75, 76


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """An NVIDIA GPU as its driver describes it."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    multiprocessors: int = 0


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


def examine(bundle: Bundle | None = None) -> Examination:
    """Looks at this host. With ``bundle``, the last finding tells whether that one runs here."""
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
    if gpus:
        host["tuning"] = tuning_records(gpus)
    findings: tuple[Finding, ...] = (
        examine_build(),
        examine_ort(),
        examine_ort_cuda(gpus),
        examine_trt("full", gpus),
        examine_trt("rtx", gpus),
        examine_cuda(gpus),
    )
    if bundle is not None:
        findings = (*findings, examine_bundle(bundle, gpus))
    return Examination(host=host, gpus=gpus, findings=findings)


def tuning_records(gpus: tuple[Gpu, ...]) -> str:
    """What is tuned for these GPUs."""
    models = dict.fromkeys(
        GpuModel(name=gpu.name, compute_capability=gpu.capability, multiprocessors=gpu.multiprocessors) for gpu in gpus
    )
    return "; ".join(summary(model) for model in models)


def examine_build() -> Finding:
    """Whether bundles can be built: torch and the packages that read and write checkpoints and graphs."""
    versions = {name: version_of(name) for name in _BUILD_PACKAGES}
    lacks = [name for name, version in versions.items() if version is None]
    missing = [f"not installed: {', '.join(lacks)}: pip install 'gemma3-compile[build]'"] if lacks else []
    torch = versions["torch"]
    if torch is not None and not _TORCH_RANGE[0] <= _numbers(torch) < _TORCH_RANGE[1]:
        missing.append(f"torch {torch} is outside of 2.11 to 2.14: pip install 'torch>=2.11,<2.15'")
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return _finding("build", "make bundles for ort; for trt with the extras trt-rtx or trt, and tune", found, missing)


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


def examine_trt(flavour: Flavour, gpus: tuple[Gpu, ...]) -> Finding:
    """Whether plans of a flavour run here."""
    title, packages, oldest = _TRT[flavour]
    install = f"pip install 'gemma3-compile[{EXTRAS[flavour]}]'"
    found, version = _first(packages)
    missing = []
    if version is None:
        missing.append(f"{packages[0]} is not installed: {install}")
    elif _numbers(version) < oldest:
        missing.append(f"{found} {version} is too old: {install} -U")
    if version_of("cuda-core") is None:
        missing.append(f"cuda-core is not installed, which launches the plugins' kernels: {install}")
    if not gpus:
        missing.append("no NVIDIA GPU with a driver")
    refused = [gpu for gpu in gpus if not _serves(flavour, gpu)]
    if gpus and len(refused) == len(gpus):
        missing += [_refusal(flavour, gpu) for gpu in refused]
    purpose = f"run bundles for trt with {title}" + ("; to build them, no GPU is needed" if flavour == "rtx" else "")
    name = EXTRAS[flavour]
    return _finding(name, purpose, f"{found} {version}" if version else "", missing)


def examine_cuda(gpus: tuple[Gpu, ...]) -> Finding:
    """The target that this version does not build yet, and what of it is there."""
    no_gpu = () if gpus else ("no NVIDIA GPU with a driver",)
    return _planned("cuda", "tuned kernels without torch", "cuda-core", version_of("cuda-core"), no_gpu)


def examine_bundle(bundle: Bundle, gpus: tuple[Gpu, ...]) -> Finding:
    """Whether one bundle runs here: for ``trt`` its flavour, its version and its architectures beside this host's."""
    manifest = bundle.manifest
    purpose = f"run {bundle.root}, built for {manifest.target}"
    if manifest.target != "trt":
        like = examine_ort() if manifest.target == "ort" else examine_cuda(gpus)
        return Finding(name="bundle", purpose=purpose, state=like.state, found=like.found, missing=like.missing)
    flavour: Flavour = "full" if manifest.settings.get("flavour") == "full" else "rtx"
    of_flavour = examine_trt(flavour, gpus)
    missing = list(of_flavour.missing)
    built = str(manifest.settings.get("tensorrt_version"))
    _, version = _first(_TRT[flavour][1])
    if version is not None and _numbers(version) != _numbers(built):
        missing.append(
            f"its plans were built by version {built}, and {version} is installed: install that, or build again"
        )
    here = [f"sm_{gpu.capability[0]}{gpu.capability[1]}" for gpu in gpus]
    if gpus and not set(here) & set(manifest.gpu_architectures):
        missing.append(
            f"its plans are for {', '.join(manifest.gpu_architectures)}, and this host has {', '.join(here)}: "
            f"build again with --arch {here[0]}"
        )
    found = f"{flavour}, version {built}, for {', '.join(manifest.gpu_architectures)}"
    return _finding("bundle", purpose, found, missing)


def _first(packages: tuple[str, ...]) -> tuple[str, str | None]:
    """The first package that is installed, and its version."""
    installed = ((name, version) for name in packages if (version := version_of(name)))
    return next(installed, (packages[0], None))


def _serves(flavour: Flavour, gpu: Gpu) -> bool:
    number = 10 * gpu.capability[0] + gpu.capability[1]
    return number in ARCHITECTURES[flavour] or number > max(ARCHITECTURES[flavour])


def _refusal(flavour: Flavour, gpu: Gpu) -> str:
    other = "full TensorRT is for that" if flavour == "rtx" and _serves("full", gpu) else "the target ort is for that"
    return f"{_TRT[flavour][0]} refuses {gpu.name}: {other}"


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
        device, memory = ctypes.c_int(), ctypes.c_size_t()
        multiprocessors, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name = ctypes.create_string_buffer(128)
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetName(name, len(name), device)
        cuda.cuDeviceGetAttribute(ctypes.byref(multiprocessors), _CU_ATTRIBUTE_MULTIPROCESSORS, device)
        cuda.cuDeviceGetAttribute(ctypes.byref(major), _CU_ATTRIBUTE_MAJOR, device)
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), _CU_ATTRIBUTE_MINOR, device)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        gpus.append(
            Gpu(
                name=name.value.decode(errors="replace"),
                capability=(major.value, minor.value),
                memory_bytes=memory.value,
                multiprocessors=multiprocessors.value,
            )
        )
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
