"""What the GPU of this host gives at most, measured: the rate its memory is read at, and the rate of its bf16 products.

A datasheet's figures are out of reach (an H100 SXM reads at 3.03 of its 3.35 TB/s), so a kernel is held against
these. Each is the best of a few plain programs of torch, since a ceiling is what anything has reached.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from autotune.gpu import Gpu
from runtimes.errors import HostError

READ_BYTES = 4 * 2**30
"""What is read at once: far beyond any L2 cache."""
PRODUCT_SIZE = 8192
_WARM_UPS, _READS, _PRODUCTS = 3, 10, 20


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Measured rates, and of which programs they are."""

    read_bytes_per_s: float
    read_by: str
    bf16_flops: float
    product_by: str

    def of(self, gpu: Gpu) -> Gpu:
        """``gpu`` with these rates in the place of its datasheet's."""
        return dataclasses.replace(gpu, read_bytes_per_s=self.read_bytes_per_s, bf16_flops=self.bf16_flops)


def measure_ceilings(*, read_bytes: int = READ_BYTES, product_size: int = PRODUCT_SIZE) -> Ceilings:
    """Measures both rates on the current CUDA device; takes about a second, and ``read_bytes`` of its memory.

    Raises:
        HostError: the GPU's free memory does not suffice.
    """
    free, _ = torch.cuda.mem_get_info()
    needed = read_bytes + 3 * 2 * product_size**2
    if free < 1.1 * needed:
        raise HostError(
            f"measuring this GPU's ceilings takes {needed / 1e9:.1f} GB of its memory, but {free / 1e9:.1f} GB are free",
            hint="`nvidia-smi` shows which processes hold memory",
        )
    read, read_by = _read_rate(read_bytes)
    product = _product_rate(product_size)
    torch.cuda.empty_cache()
    return Ceilings(
        read_bytes_per_s=read,
        read_by=f"{read_by} over {read_bytes / 2**30:.3g} GiB",
        bf16_flops=product,
        product_by=f"torch.matmul of {product_size}x{product_size} in bf16, random values",
    )


def _read_rate(read_bytes: int) -> tuple[float, str]:
    """Bytes a second of the fastest reduction."""
    data = torch.zeros(read_bytes // 4, device="cuda")
    data.uniform_()
    programs: dict[str, Callable[[], object]] = {
        "torch.sum in fp32": lambda: data.sum(),
        "torch.amax in fp32": lambda: data.amax(),
        "torch.sum in fp32, by rows of 16384": lambda: data.view(-1, 16384).sum(1),
    }
    rates = {name: read_bytes / median_s(program, _READS) for name, program in programs.items()}
    fastest = max(rates, key=lambda name: rates[name])
    return rates[fastest], fastest


def _product_rate(size: int) -> float:
    """Operations a second. Random values, since zeros draw less power and so run at higher clocks."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / median_s(lambda: torch.matmul(a, b, out=out), _PRODUCTS)


def median_s(program: Callable[[], object], repeats: int) -> float:
    """The median time of a program on the GPU, from events before and after each run."""
    for _ in range(_WARM_UPS):
        program()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]  # type: ignore[no-untyped-call]
    marks[0].record()
    for mark in marks[1:]:
        program()
        mark.record()
    marks[-1].synchronize()
    times_ms: list[float] = [start.elapsed_time(end) for start, end in pairwise(marks)]
    return statistics.median(times_ms) / 1e3
