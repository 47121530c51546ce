"""Kernels that compute nothing, of a cost that is easy to check, and a profile of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from autotune.ceilings import Ceilings
from autotune.gpu import GPUS, Gpu
from autotune.kernel import Case, Config, Cost, Kernel, Space, Stage, Use
from autotune.model_shapes import ModelShapes, VisionShapes
from autotune.profile import Measure, Profile, profile
from autotune.record_store import RecordStore
from runtimes.errors import HostError

VISION = VisionShapes(
    layers=2, hidden=1152, ffn=4304, heads=16, head_dim=72, image_size=896, patch_size=14, patches=4096, tokens=256
)
MODEL = ModelShapes(
    name="12b",
    hidden=3840,
    ffn=15360,
    heads=16,
    kv_heads=8,
    head_dim=256,
    query_pre_attn_scalar=256,
    vocab=262208,
    window=1024,
    local_layers=40,
    global_layers=8,
    vision=VISION,
)
CEILINGS = Ceilings(read_bytes_per_s=3e12, read_by="a reduction", bf16_flops=750e12, product_by="a product")


class Toy(Kernel):
    """``megabytes`` and ``gigaflops`` a call, ``calls`` a step; decode has a tenth of the operations."""

    stages: ClassVar[tuple[Stage, ...]] = ("prefill", "decode")
    dtypes: ClassVar[tuple[str, ...]] = ("bfloat16", "int4")
    source: ClassVar[tuple[str, ...]] = ("tests.autotune.profiles",)

    def __init__(self, name: str, where: str, calls: int, megabytes: int, gigaflops: int) -> None:
        self.name = name  # type: ignore[misc]
        self.where, self.calls, self.megabytes, self.gigaflops = where, calls, megabytes, gigaflops

    def uses(self, model: ModelShapes, stage: Stage, *, batch: int, context: int, dtype: str) -> tuple[Use, ...]:
        if dtype not in self.dtypes:
            return ()
        flops = self.gigaflops * batch * (context // 10 if stage == "prefill" else 1)
        case = Case(dtype=dtype, dims={"megabytes": self.megabytes, "gigaflops": flops})
        return (Use(name=self.where, case=case, count=self.calls),)

    def bucket(self, case: Case) -> str:
        return "all"

    def space(self, case: Case) -> Space:
        return Space(constants={"BLOCK": (1, 2)}, num_warps=(4,), num_stages=(1,))

    def refusal(self, case: Case, config: Config, gpu: Gpu) -> str | None:
        return None

    def default(self, case: Case, gpu: Gpu) -> Config:
        return Config(constants={"BLOCK": 1}, num_warps=4, num_stages=1)

    def cost(self, case: Case) -> Cost:
        return Cost(bytes=case.dims["megabytes"] * 1e6, flops=case.dims["gigaflops"] * 1e9)

    def inputs(self, *args: Any, **options: Any) -> Any:
        raise NotImplementedError

    outputs = launches = oracle = inputs


KERNELS = (
    Toy("matvec", "gate & up <projection>", 48, 236, 1),
    Toy("matvec", "down projection", 48, 118, 1),
    Toy("attention", "local attention", 40, 8, 30),
    Toy("attention", "global attention", 8, 67, 60),
    Toy("rms_norm", "norms and residual", 96, 1, 0),
)
"""Floors at 3 TB/s and 750 TFLOP/s, decode: 78.67, 39.33, 40 (30 GFLOP), 80 and 0.33 µs."""


def twice_the_floor(kernel: Kernel, case: Case, config: Config) -> float:
    """Twice the floor; three times for the smallest; the global attention fails."""
    if case.dims["megabytes"] == 67:
        raise HostError("out of memory")
    factor = 3 if case.dims["megabytes"] == 1 else 2
    return factor * kernel.cost(case).floor_s(CEILINGS.of(GPUS["h100"])) * 1e6


def made(
    folder: Path, *stages: Stage, measure: Measure | None = twice_the_floor, kernels: tuple[Kernel, ...] = KERNELS
) -> Profile:
    """A profile at batch 1 and a context of 1000."""
    return profile(
        kernels,
        MODEL,
        stages,
        batch=1,
        context=1000,
        dtype="bfloat16",
        gpu=GPUS["h100"],
        store=RecordStore(folder / "mine", shipped_folder=folder),
        ceilings=CEILINGS if measure else None,
        measure=measure,
    )
