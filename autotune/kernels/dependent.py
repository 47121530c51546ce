"""Launches that begin while the one before them ends: programmatic dependent launch, from compute capability 9.0.

A launch costs two to three microseconds beyond its work: programs must be handed out, and the last of them leave most
of the GPU idle. A dependent launch is handed out in that time. Its programs read what no launch writes (weights), and
wait before they touch anything else: a product of one token then begins with its weights on their way.

Three rules keep that right:

- before :func:`wait` a program writes nothing, and reads only what no launch of the same step writes;
- every launch whose configuration says ``DEPENDENT`` waits, in every program that does not leave at once: what a launch
  two steps back wrote is there because the one in between waited for it;
- :func:`release` may stand anywhere: it only lets the next launch be handed out, which waits for all of this one.

Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, ``griddepcontrol``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from autotune.gpu import Gpu

SINCE = (9, 0)


@triton.jit
def wait(DEPENDENT: tl.constexpr):
    """Waits until the launch before this one has ended and all that it wrote can be read."""
    if DEPENDENT:
        gdc_wait()


@triton.jit
def release(DEPENDENT: tl.constexpr):
    """Lets the next launch be handed out once every program of this one has come here or ended."""
    if DEPENDENT:
        gdc_launch_dependents()


def dependent_refusal(dependent: int, gpu: Gpu) -> str | None:
    """Why ``DEPENDENT`` has to be otherwise on a GPU: there is one right value, so that a study need not try both."""
    wanted = best_dependent(gpu)
    if dependent == wanted:
        return None
    if wanted:
        return f"a launch on {gpu.name} can begin before the one ahead of it ends"
    major, minor = gpu.compute_capability
    return f"a dependent launch needs compute capability 9.0; {gpu.name} has {major}.{minor}"


def best_dependent(gpu: Gpu) -> int:
    """What heuristics take: 1 where the GPU can."""
    return int(gpu.compute_capability >= SINCE)
