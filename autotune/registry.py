"""Every tunable kernel, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from autotune.kernel import Kernel
from autotune.kernels.cache_write import CacheWrite
from autotune.kernels.embed import Embed
from autotune.kernels.global_decode import GlobalDecode
from autotune.kernels.global_prefill import GlobalPrefill
from autotune.kernels.layer_norm import LayerNorm
from autotune.kernels.matmul import Matmul
from autotune.kernels.matvec import Matvec
from autotune.kernels.patch_embed import PatchEmbed
from autotune.kernels.pool_norm import PoolNorm
from autotune.kernels.qk_norm_rope_cache import QkNormRopeCache
from autotune.kernels.rms_norm import RmsNorm
from autotune.kernels.sample import Sample
from autotune.kernels.siglip_attention import SiglipAttention
from autotune.kernels.window_decode import WindowDecode
from autotune.kernels.window_prefill import WindowPrefill
from runtimes.errors import UsageError


def by_name(kernels: Iterable[Kernel]) -> Mapping[str, Kernel]:
    """The kernels by name, in their order.

    Raises:
        ValueError: two of them have one name; the message says which.
    """
    found: dict[str, Kernel] = {}
    for kernel in kernels:
        other = found.setdefault(kernel.name, kernel)
        if other is not kernel:
            raise ValueError(
                f"two kernels are named `{kernel.name}`: {type(other).__qualname__} and {type(kernel).__qualname__}"
            )
    return MappingProxyType(found)


_KERNELS: tuple[Kernel, ...] = (
    # text, in the order of a step
    Embed(),
    RmsNorm(),
    QkNormRopeCache(),
    WindowPrefill(),
    GlobalPrefill(),
    CacheWrite(),
    WindowDecode(),
    GlobalDecode(),
    Matmul(),
    Matvec(),
    Sample(),
    # vision
    PatchEmbed(),
    LayerNorm(),
    SiglipAttention(),
    PoolNorm(),
)

KERNELS: Mapping[str, Kernel] = by_name(_KERNELS)
"""Every kernel by name, in the order in which a step runs them."""


def kernel(name: str) -> Kernel:
    """The kernel of that name.

    Raises:
        UsageError: there is none; the message lists the names.
    """
    if name not in KERNELS:
        raise UsageError(f"no kernel is named `{name}`", hint=f"the kernels are {', '.join(sorted(KERNELS))}")
    return KERNELS[name]
