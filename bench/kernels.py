"""The kernels against what torch, cuBLAS, FlexAttention and cuDNN do, and against what the GPU gives at most.

Both sides run in one process, under CUDA graphs, on inputs that are not in the L2 cache; each of ours computes what its
oracle does before it is timed, and runs with the configuration that a user gets.

    python -m bench.kernels                          on the GPU, about four minutes
    python -m bench.kernels --only products          one kind of rows; writes nothing
    python -m bench.kernels --commit 0123456789ab    where the checkout is a copy without its history

`pip install nvidia-cudnn-frontend` adds cuDNN's own sliding window.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from autotune.ceilings import Ceilings, measure_ceilings
from autotune.gpu import present
from autotune.measurement import REPEATS
from autotune.record_store import RecordStore
from bench.kernel_rows import attention, products, small
from bench.kernel_rows.subject import Side, Sizes, Subject, rows_of
from bench.kernel_rows.workbench import Workbench
from bench.record import Row, finish, options, with_gpu
from gemma3_compile.model_shapes import model_shapes
from gemma3_compile.presets import preset
from runtimes.errors import Gemma3CompileError

PARTS: dict[str, Callable[[Sizes], list[Subject]]] = {
    "attention": attention.subjects,
    "products": products.subjects,
    "small": small.subjects,
}
CHUNK = 8192
KEYS = (32_768, 131_072)
QUICK_REPEATS = (1,)


def sizes() -> Sizes:
    """The 4B and the 12B."""
    return Sizes(small=model_shapes(preset("4b")), large=model_shapes(preset("12b")), chunk=CHUNK, keys=KEYS)


def ceiling_rows(ceilings: Ceilings) -> list[Row]:
    """What shares are of."""
    read, product = ceilings.read_bytes_per_s / 1e9, ceilings.bf16_flops / 1e12
    return [
        Row(case="memory", metric="read rate", unit="GB/s", value=read, note=f"measured: {ceilings.read_by}"),
        Row(case="bf16 product", metric="rate", unit="TFLOP/s", value=product, note=f"measured: {ceilings.product_by}"),
    ]


def measured(bench: Workbench, subjects: Sequence[Subject]) -> list[Row]:
    """The rows of all subjects, each told as it comes: a run that is cut off has said what it found."""
    rows = []
    for subject in subjects:
        began = time.monotonic()
        ours, peers = bench.measure(subject)
        found = rows_of(subject, ours, peers, bench.gpu)
        rows += found
        told = ", ".join(f"{name} {_shown(side)}" for name, side in {"ours": ours, **peers}.items())
        _say(f"{subject.name}: {told} (took {time.monotonic() - began:.1f} s)")
    return rows


def run(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints and writes.

    Raises:
        HostError: there is no GPU that the kernels run on.
    """
    parser = options(__doc__)
    parser.add_argument("--only", choices=PARTS, help="one kind of rows; writes nothing")
    parser.add_argument("--commit", help="the commit that is measured, where the checkout has no history")
    given = parser.parse_args(arguments)
    gpu = present()
    ceilings = measure_ceilings()
    _say(f"{gpu.name}: {ceilings.read_bytes_per_s / 1e12:.3f} TB/s, {ceilings.bf16_flops / 1e12:.0f} TFLOP/s")
    bench = Workbench(ceilings.of(gpu), RecordStore(), repeats=QUICK_REPEATS if given.quick else REPEATS)
    subjects = [s for name, part in PARTS.items() if given.only in (None, name) for s in part(sizes())]
    for refused in bench.compile_all(subjects):
        _say(refused.message)
    _say("compiled")
    rows = ceiling_rows(ceilings) + measured(bench, subjects)
    finish(with_gpu("kernels", gpu.name), rows, quick=given.quick or given.only is not None, measured=given.commit)


def main() -> None:
    try:
        run()
    except Gemma3CompileError as error:
        raise SystemExit(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else "")) from None


def _shown(side: Side) -> str:
    return f"{side.time_us:.2f} µs" if side.time_us else f"failed ({side.note})"


def _say(words: str) -> None:
    print(f"[{time.perf_counter() - _STARTED:5.1f} s] {words}", file=sys.stderr, flush=True)


_STARTED = time.perf_counter()

if __name__ == "__main__":
    main()
