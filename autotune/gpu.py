"""What a kernel must know of a GPU to fit it, and what a roofline needs.

Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; NVIDIA's datasheets for the
rates, dense and without sparsity. A measured rate (``gemma3c profile``) takes the place of a datasheet's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from runtimes.errors import HostError, UsageError

OLDEST = (8, 0)
"""bf16 products came with Ampere."""
_SHARED_BYTES = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376, 121: 101376}  # fmt: skip
"""Shared memory that one block may ask for."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU model. ``read_bytes_per_s`` and ``bf16_flops``: what its memory and its matrix units give at most."""

    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    l2_bytes: int
    memory_bytes: int
    read_bytes_per_s: float
    bf16_flops: float

    @property
    def architecture(self) -> int:
        """90 for compute capability 9.0."""
        return self.compute_capability[0] * 10 + self.compute_capability[1]

    @property
    def shared_bytes(self) -> int:
        """Shared memory that one block may ask for; of an unknown architecture, what the least of them has."""
        return _SHARED_BYTES.get(self.architecture, min(_SHARED_BYTES.values()))


def _gpu(name: str, cc: tuple[int, int], sms: int, l2_mb: float, memory_gb: float, tb_s: float, tflops: float) -> Gpu:
    return Gpu(
        name=name,
        compute_capability=cc,
        multiprocessors=sms,
        l2_bytes=round(l2_mb * 2**20),
        memory_bytes=round(memory_gb * 2**30),
        read_bytes_per_s=tb_s * 1e12,
        bf16_flops=tflops * 1e12,
    )


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        "a100": _gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 40, 80, 2.039, 312),
        "a10": _gpu("NVIDIA A10", (8, 6), 72, 6, 24, 0.600, 125),
        "rtx3090": _gpu("NVIDIA GeForce RTX 3090", (8, 6), 82, 6, 24, 0.936, 71),
        "l4": _gpu("NVIDIA L4", (8, 9), 58, 48, 24, 0.300, 121),
        "l40s": _gpu("NVIDIA L40S", (8, 9), 142, 96, 48, 0.864, 362),
        "rtx4090": _gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 72, 24, 1.008, 165),
        "h100": _gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 50, 80, 3.350, 989),
        "h200": _gpu("NVIDIA H200", (9, 0), 132, 50, 141, 4.800, 989),
        "b200": _gpu("NVIDIA B200", (10, 0), 148, 126, 180, 8.000, 2250),
        "rtx5090": _gpu("NVIDIA GeForce RTX 5090", (12, 0), 170, 96, 32, 1.792, 209),
    }
)
"""Known models by short name."""


def named(name: str) -> Gpu:
    """A known GPU by short name (``h100``) or by the driver's name for it.

    Raises:
        UsageError: it is not known; the message lists those that are.
    """
    found = GPUS.get(name.lower().replace(" ", "").replace("-", "")) or next(
        (gpu for gpu in GPUS.values() if gpu.name == name), None
    )
    if found is None:
        raise UsageError(f"no GPU is known as `{name}`", hint=f"known are {', '.join(sorted(GPUS))}")
    return found


def present(index: int = 0) -> Gpu:
    """The GPU of this host.

    Raises:
        HostError: there is none, or it is older than Ampere.
    """
    if not torch.cuda.is_available():
        raise HostError("no CUDA GPU is visible to torch", hint="check `nvidia-smi`, and that torch is a CUDA build")
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    if capability < OLDEST:
        raise HostError(
            f"{properties.name} has compute capability {capability[0]}.{capability[1]}, but the kernels need 8.0 (Ampere) or newer",
            hint="bf16 products are not there on older GPUs; the target `ort` runs on a CPU",
        )
    known = next((gpu for gpu in GPUS.values() if gpu.name == properties.name), None)
    like = known or max(
        (gpu for gpu in GPUS.values() if gpu.compute_capability <= capability), key=lambda gpu: gpu.compute_capability
    )
    return Gpu(
        name=properties.name,
        compute_capability=capability,
        multiprocessors=properties.multi_processor_count,
        l2_bytes=properties.L2_cache_size,
        memory_bytes=properties.total_memory,
        read_bytes_per_s=like.read_bytes_per_s,
        bf16_flops=like.bf16_flops / like.multiprocessors * properties.multi_processor_count,
    )
