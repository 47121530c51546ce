"""A kernel file by hand: one kernel of two launches, in two variants, with a workspace, a counter and scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtimes.gpu.kernel_file import (
    KernelArgument,
    KernelFacts,
    KernelFile,
    KernelLaunch,
    KernelTensor,
    KernelVariant,
    TuningFacts,
    cubin_name,
    hash_of,
)

CUBINS = (b"\x7fELF first", b"\x7fELF second")
FIRST, SECOND = (hash_of(cubin) for cubin in CUBINS)
TUNING = TuningFacts(config={"BLOCK": 64, "num_warps": 4, "num_stages": 2}, origin="heuristic", gpu="NVIDIA H100")


def launch(cubin: str = FIRST, **changes: Any) -> KernelLaunch:
    fields: dict[str, Any] = {
        "symbol": "scale_rows",
        "arguments": (
            KernelArgument(name="x_ptr", type="*bf16", tensor="x"),
            KernelArgument(name="second_ptr", type="*bf16", tensor="x", offset=32),
            KernelArgument(name="part_ptr", type="*fp32", tensor="_part"),
            KernelArgument(name="count_ptr", type="*i32", tensor="_zero_count"),
            KernelArgument(name="rows", type="i32", value="B * S"),
            KernelArgument(name="factor", type="fp32", value="scale * 2.0"),
        ),
        "grid": ("(S + 63) // 64", "B", "1"),
        "num_warps": 4,
        "shared_bytes": 50_000,
        "scratch_bytes": 128,
        "scratch_align": 128,
        "dependent": False,
        "constants": {"BLOCK": 64, "IMAGES": False, "mask_ptr": None},
    }
    return KernelLaunch(cubin=cubin, **fields | changes)


def variant(architecture: int = 90, when: tuple[str, ...] = (), **changes: Any) -> KernelVariant:
    fields: dict[str, Any] = {
        "tensors": (
            KernelTensor(name="x", type="bf16", shape=("B", "S", "64"), role="in_place"),
            KernelTensor(name="_part", type="fp32", shape=("B", "S"), role="workspace"),
            KernelTensor(name="_zero_count", type="i32", shape=("B",), role="counter"),
        ),
        "launches": (launch(), launch(SECOND, dependent=True, scratch_bytes=0)),
        "tuning": TUNING,
    }
    return KernelVariant(architecture=architecture, when=when, **fields | changes)


def kernel_file(**changes: Any) -> KernelFile:
    facts = KernelFacts(
        dimensions={"B": (1, 4), "S": (1, 2048)},
        parameters=("scale",),
        variants=(variant(when=("B * S <= 512",)), variant(), variant(120)),
    )
    return KernelFile(producer={"gemma3c": "0", "triton": "0"}, kernels={"rows": facts}, **changes)


def write(folder: Path, file: KernelFile | None = None) -> None:
    """As a bundle has it."""
    (folder / "kernels.json").write_bytes((file or kernel_file()).dumps())
    (folder / "cubins").mkdir(exist_ok=True)
    for cubin in CUBINS:
        (folder / cubin_name(hash_of(cubin))).write_bytes(cubin)
