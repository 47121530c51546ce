"""Scratch: matvec on a GPU. Correctness, a hunt for races, then times of many configurations. Under 150 s.

    python -m bench.kernels_scratch_matvec [file for the full table]

Times are medians of replays of CUDA graphs whose launches go round over copies of the weights that exceed the L2 cache;
rates are a case's least bytes by that time, and fractions are of the rate at which one kernel reads 4 GB in the same run.
"""

from __future__ import annotations

import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from autotune.ahead_of_time import CompilerPool
from autotune.correctness import compare
from autotune.gpu import Gpu, present
from autotune.kernel import Case, Config, Tensors
from autotune.kernels.matvec import Matvec
from autotune.kernels.matvec_space import POST_NORM, row_of
from autotune.kernels.rms_norm import add_rms_norm_

STARTED = time.monotonic()
BUDGET_S = 135.0
KERNEL = Matvec()
TABLE: list[str] = []
Run = Callable[[], object]


def say(*words: object) -> None:
    print(f"[{time.monotonic() - STARTED:5.1f}]", *words, flush=True)


def late() -> bool:
    return time.monotonic() - STARTED > BUDGET_S


@triton.jit
def _read_kernel(x_ptr, y_ptr, LOOP: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offset = tl.program_id(0).to(tl.int64) * LOOP * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for i in tl.static_range(LOOP):
        total += tl.load(x_ptr + offset + i * BLOCK, eviction_policy="evict_first")
    tl.store(y_ptr + tl.program_id(0), tl.sum(total, 0))


def graph_us(runs: Sequence[Run], launches: int, replays: int = 7) -> float:
    """Microseconds of one run, the runs taken in turn until there are about ``launches`` in one graph."""
    rounds = max(1, launches // len(runs))
    for run in runs:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for run in runs:
                run()
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) * 1e3 / (rounds * len(runs)))
    return statistics.median(times)


def read_rate() -> float:
    """Bytes a second of a kernel that only reads."""
    x = torch.ones(2**30, dtype=torch.int32, device="cuda")
    best = 0.0
    for loop, block, warps in ((4, 1024, 4), (8, 1024, 4), (4, 2048, 8), (16, 512, 4), (2, 2048, 4)):
        programs = x.numel() // (loop * block)
        y = torch.empty(programs, dtype=torch.int32, device="cuda")
        run = partial(_read_kernel[(programs,)], x, y, LOOP=loop, BLOCK=block, num_warps=warps)
        rate = 4 * x.numel() / graph_us([run], 3) * 1e6
        assert int(y[-1]) == loop * block
        best = max(best, rate)
    return best


def case(dtype: str, columns: int, depth: int, rows: int = 1, **flags: int) -> Case:
    grid = {"zeros": 1} if dtype == "int4" else {}
    return Case(dtype=dtype, dims={"rows": rows, "columns": columns, "depth": depth} | grid | flags)


def config(values: Sequence[int]) -> Config:
    """From (DOT, BLOCK_N, BLOCK_K, LOOP, SPLIT, warps, stages)."""
    names = ("DOT", "BLOCK_N", "BLOCK_K", "LOOP", "SPLIT")
    return Config(constants=dict(zip(names, values[:5], strict=True)), num_warps=values[5], num_stages=values[6])


def fma(*values: tuple[int, ...]) -> list[Config]:
    """From (BLOCK_N, BLOCK_K, LOOP, SPLIT, warps, stages)."""
    return [config((0, *v)) for v in values]


def dot(*values: tuple[int, ...]) -> list[Config]:
    """From (BLOCK_N, BLOCK_K, SPLIT, warps, stages)."""
    return [config((1, n, k, 1, *v)) for n, k, *v in values]


BF16 = fma(
    (1, 1024, 1, 1, 4, 1), (2, 1024, 1, 1, 4, 1), (4, 1024, 1, 1, 4, 1), (8, 1024, 1, 1, 4, 1), (2, 2048, 1, 1, 8, 1),
    (4, 2048, 1, 1, 8, 1), (4, 512, 1, 1, 4, 1), (8, 256, 1, 1, 4, 1), (4, 256, 1, 1, 2, 1), (2, 512, 1, 1, 2, 1),
    (4, 1024, 1, 1, 4, 3), (8, 512, 1, 1, 4, 3), (1, 4096, 4, 1, 4, 1), (2, 4096, 4, 1, 8, 1), (1, 4096, 8, 1, 4, 3),
    (2, 4096, 4, 1, 4, 2),
)  # fmt: skip
BF16_DEEP = fma((1, 4096, 1, 1, 8, 1), (2, 1024, 1, 2, 4, 1), (4, 2048, 1, 3, 8, 1), (1, 2048, 1, 1, 4, 1), (4, 1024, 1, 2, 4, 3))  # fmt: skip
INT8 = fma(
    (4, 2048, 1, 1, 4, 1), (2, 2048, 1, 1, 4, 1), (1, 2048, 1, 1, 4, 1), (8, 2048, 1, 1, 4, 1), (8, 512, 1, 1, 1, 1),
    (4, 512, 1, 1, 1, 1), (4, 1024, 1, 1, 2, 1), (4, 2048, 1, 1, 4, 2), (2, 4096, 4, 1, 8, 1), (1, 4096, 8, 1, 8, 1),
    (2, 4096, 4, 1, 8, 3), (2, 4096, 4, 1, 4, 1),
)  # fmt: skip
INT4 = fma(
    (4, 4096, 1, 1, 4, 1), (4, 4096, 4, 1, 4, 1), (2, 4096, 4, 1, 4, 1), (2, 4096, 8, 1, 4, 1), (1, 4096, 16, 1, 4, 1),
    (2, 4096, 8, 1, 4, 3), (4, 4096, 4, 1, 4, 3), (4, 4096, 8, 1, 4, 2), (8, 4096, 2, 1, 4, 1), (2, 1024, 1, 1, 1, 1),
    (4, 1024, 1, 1, 1, 1), (8, 1024, 1, 1, 1, 1), (4, 1024, 1, 1, 1, 3), (2, 2048, 1, 1, 2, 1), (4, 2048, 1, 1, 2, 1),
    (16, 1024, 1, 1, 4, 3),
)  # fmt: skip
INT4_DEEP = fma(
    (4, 4096, 1, 1, 4, 3), (2, 4096, 1, 1, 4, 1), (1, 4096, 1, 1, 4, 1), (1, 16384, 4, 1, 16, 1), (2, 16384, 4, 1, 16, 2),
    (2, 8192, 1, 1, 8, 1), (1, 8192, 1, 1, 8, 2), (4, 4096, 2, 4, 4, 1), (2, 4096, 4, 4, 4, 1), (4, 4096, 4, 4, 4, 3),
)  # fmt: skip
BF16_8 = fma((1, 1024, 1, 1, 4, 1), (2, 512, 1, 1, 4, 1), (2, 1024, 1, 1, 4, 2)) + dot(
    (16, 128, 1, 4, 4), (16, 256, 1, 4, 4), (32, 128, 1, 4, 5), (64, 128, 1, 4, 4), (64, 128, 2, 4, 5), (32, 256, 2, 4, 4),
    (16, 512, 1, 4, 3), (16, 128, 3, 2, 5),
)  # fmt: skip
INT_8 = fma((1, 1024, 1, 1, 1, 1), (2, 1024, 1, 1, 2, 1)) + dot(
    (16, 128, 1, 2, 4), (16, 256, 1, 4, 4), (32, 128, 1, 4, 4), (64, 128, 1, 4, 4), (32, 256, 1, 8, 3), (64, 128, 2, 8, 4),
    (16, 256, 2, 4, 3), (64, 256, 1, 8, 3), (32, 64, 1, 2, 5), (16, 64, 1, 1, 5),
)  # fmt: skip
INT4_2 = fma(
    (2, 4096, 4, 1, 4, 1), (1, 4096, 8, 1, 4, 1), (2, 4096, 4, 1, 4, 3), (8, 1024, 1, 1, 4, 1), (2, 8192, 4, 1, 8, 1)
) + dot((32, 128, 1, 4, 4), (16, 256, 1, 4, 4))

SWEEPS: list[tuple[Case, list[Config], float]] = [
    (case("bfloat16", 262208, 2560), BF16, 0.92),
    (case("bfloat16", 30720, 3840), BF16, 0.92),
    (case("bfloat16", 8192, 3840), BF16, 0.85),
    (case("bfloat16", 3840, 15360), BF16 + BF16_DEEP, 0.85),
    (case("int4", 262208, 2560), INT4, 0.75),
    (case("int4", 30720, 3840), INT4, 0.75),
    (case("int4", 8192, 3840), INT4, 0.75),
    (case("int4", 3840, 15360), INT4 + INT4_DEEP, 0.75),
    (case("int4", 15360, 3840, norm=1, geglu=1), INT4, 0.75),
    (case("bfloat16", 15360, 3840, norm=1, geglu=1), BF16, 0.92),
    (case("bfloat16", 8192, 3840, norm=1), BF16, 0.85),
    (case("bfloat16", 262208, 2560, norm=1, fp32=1), BF16, 0.92),
    (case("int4", 30720, 3840, scale_bits=16), INT4[:6], 0.75),
    (case("int8", 30720, 3840), INT8, 0.75),
    (case("int8", 8192, 3840), INT8, 0.75),
    (case("int8", 3840, 15360), INT8, 0.75),
    (case("bfloat16", 30720, 3840, rows=8), BF16_8, 0.85),
    (case("bfloat16", 3840, 15360, rows=8), BF16_8, 0.85),
    (case("int4", 30720, 3840, rows=2), INT4_2, 0.75),
    (case("int4", 30720, 3840, rows=8), INT_8, 0.6),
    (case("int8", 30720, 3840, rows=8), INT_8, 0.75),
]


def usable(gpu: Gpu, shape: Case, configs: Iterable[Config]) -> Iterator[Config]:
    seen = set()
    for chosen in [KERNEL.default(shape, gpu), *configs]:
        if str(chosen) not in seen and KERNEL.refusal(shape, chosen, gpu) is None:
            seen.add(str(chosen))
            yield chosen


def compile_ahead(gpu: Gpu, pairs: Iterable[tuple[Case, Config]]) -> None:
    """Fills Triton's cache from several processes; whatever fails is met again, and reported, where it is run."""
    launches = []
    for shape, chosen in pairs:
        tensors = KERNEL.inputs(shape, device="meta") | KERNEL.outputs(shape, chosen, device="meta")
        launches += [(launch, gpu.architecture) for launch in KERNEL.launches(shape, chosen, tensors)]
    with CompilerPool(timeout_s=40) as pool:
        compiled = pool.compile_all(launches)
    failed = [str(result) for result in compiled if isinstance(result, Exception)]
    spilt = sum(1 for result in compiled if not isinstance(result, Exception) and result.spill_bytes)
    say(f"compiled {len(compiled)} launches, {len(failed)} failed, {spilt} spill", *(text[:300] for text in failed[:3]))


def checks() -> Iterator[tuple[Case, Config]]:
    ways = (
        *fma((4, 1024, 1, 1, 4, 1), (2, 4096, 4, 1, 4, 1), (2, 4096, 4, 1, 4, 3), (4, 1024, 1, 2, 4, 2)),
        *dot((16, 256, 1, 4, 4), (64, 128, 3, 4, 3)),
    )
    for dtype in KERNEL.dtypes:
        for rows in (1, 4, 16):
            for chosen in ways:
                if rows == 16 and not chosen.constants["DOT"]:
                    continue
                if rows == 4 and chosen.constants["BLOCK_K"] == 4096:
                    continue
                yield case(dtype, 1536, 3840, rows=rows, norm=1, geglu=1), chosen
                yield case(dtype, 1551, 3840, rows=rows, residual=POST_NORM, zeros=0 if dtype != "int4" else 2), chosen


def check_all(gpu: Gpu) -> None:
    passed = failed = 0
    for shape, chosen in checks():
        refused = KERNEL.refusal(shape, chosen, gpu)
        if refused is not None:
            say("not checked:", shape, chosen, refused)
            continue
        try:
            for comparison in compare(KERNEL, shape, chosen, KERNEL.inputs(shape, device="cuda")):
                passed, failed = passed + comparison.passed, failed + (not comparison.passed)
                if not comparison.passed:
                    say("WRONG", shape, chosen, comparison)
        except Exception as error:  # noqa: BLE001 - whatever Triton raises, the others go on
            failed += 1
            say("FAILED", shape, chosen, type(error).__name__, str(error)[:300])
    say(f"correctness: {passed} passed, {failed} failed")


def hunt_races(gpu: Gpu) -> None:
    """Results of split depth and post-norm must not change from launch to launch, and counters end at zero."""
    for dtype in KERNEL.dtypes:
        shape = case(dtype, 3840, 4096, rows=2, residual=POST_NORM)
        for chosen in (*fma((4, 1024, 1, 4, 4, 1)), *dot((16, 256, 4, 4, 3))):
            try:
                inputs = KERNEL.inputs(shape, device="cuda")
                written = KERNEL.outputs(shape, chosen, device="cuda")
                (launch,) = KERNEL.launches(shape, chosen, inputs | written)
                launch.run()
                first, different = written["y"].clone(), 0
                for _ in range(300):
                    written["y"].fill_(float("nan"))
                    launch.run()
                    different += int(not torch.equal(first, written["y"]))
                left = int(written["_zero_counters"].abs().max())
                say(f"races {dtype} {chosen}: {different} of 300 differ, counters {left}")
            except Exception as error:  # noqa: BLE001
                say("FAILED", shape, chosen, type(error).__name__, str(error)[:300])


def copies_of(shape: Case, gpu: Gpu) -> list[Tensors]:
    first = KERNEL.inputs(shape, device="cuda")
    size = KERNEL.cost(shape).bytes
    count = max(2, min(24, -(-4 * gpu.l2_bytes // int(size))))
    return [first] + [{name: tensor.clone() for name, tensor in first.items()} for _ in range(count - 1)]


def timed(shape: Case, chosen: Config, sets: Sequence[Tensors], floor_us: float) -> float:
    runs: list[Run] = []
    for inputs in sets:
        tensors = inputs | KERNEL.outputs(shape, chosen, device="cuda")
        runs += [launch.run for launch in KERNEL.launches(shape, chosen, tensors)]
    return graph_us(runs, max(len(runs), min(400, int(2500 / floor_us))))


def wrong(shape: Case, chosen: Config, inputs: Tensors, exact: torch.Tensor) -> str:
    """Empty where the result is near the oracle's."""
    y = KERNEL.run(shape, chosen, inputs)["y"].float()
    error = float((y - exact).abs().max() / exact.abs().max())
    return "" if error < 0.02 else f"  WRONG by {error:.3g}"


def sweep(gpu: Gpu, shape: Case, configs: list[Config], bar: float, rate: float) -> None:
    cost, sets = KERNEL.cost(shape), copies_of(shape, gpu)
    floor_us = cost.bytes / rate * 1e6
    exact = KERNEL.oracle(shape, sets[0])["y"].float()
    found: list[tuple[float, str]] = []
    for chosen in usable(gpu, shape, configs):
        try:
            us = timed(shape, chosen, sets, floor_us)
            share = floor_us / us
            text = f"{us:8.2f} us  {cost.bytes / us / 1e6:5.2f} TB/s  {share:5.3f}  {chosen}"
            found.append((us, text + wrong(shape, chosen, sets[0], exact)))
        except Exception as error:  # noqa: BLE001
            found.append((1e9, f"FAILED {chosen} {type(error).__name__} {str(error)[:200]}"))
    default = str(KERNEL.default(shape, gpu))
    found.sort()
    best = floor_us / found[0][0]
    title = f"{shape}: floor {floor_us:.1f} us, bar {bar}, best {best:.3f} {'PASS' if best >= bar else 'MISS'}"
    if shape.dtype == "bfloat16" and set(shape.dims) <= {"rows", "columns", "depth"}:
        runs: list[Run] = [partial(F.linear, inputs["x"], inputs["w"]) for inputs in sets]
        us = graph_us(runs, min(400, int(2500 / floor_us)))
        title += f"; F.linear {us:.2f} us {cost.bytes / us / 1e6:.2f} TB/s"
    say(title)
    TABLE.append(title)
    for place, (_, text) in enumerate(found):
        TABLE.append("   " + text)
        if place < 3 or "WRONG" in text or "FAILED" in text:
            print("   ", text)
        elif default in text:
            print("   ", text, "(default)")
    sys.stdout.flush()


def post_norms(gpu: Gpu) -> None:
    """The product with its post-norm in one launch, against two launches; both with the heuristic's configuration."""
    for depth, rows in ((4096, 1), (4096, 2), (4096, 4), (4096, 8), (15360, 1), (15360, 8)):
        plain, fused = case("bfloat16", 3840, depth, rows), case("bfloat16", 3840, depth, rows, residual=POST_NORM)
        try:
            chosen = KERNEL.default(plain, gpu)
            sets = copies_of(fused, gpu)
            scale = torch.ones(3840, device="cuda")
            alone: list[Run] = []
            together: list[Run] = []
            for inputs in sets:
                only = {name: inputs[name] for name in ("x", "w")}
                tensors = only | KERNEL.outputs(plain, chosen, device="cuda")
                (first,) = KERNEL.launches(plain, chosen, tensors)
                alone.append(partial(_both, first, inputs["h"].clone(), tensors["y"], scale))
                tensors = inputs | KERNEL.outputs(fused, chosen, device="cuda")
                together += [launch.run for launch in KERNEL.launches(fused, chosen, tensors)]
            two_us, one_us = graph_us(alone, 100), graph_us(together, 100)
            say(f"post-norm 3840 x {depth}, {rows} rows: two launches {two_us:.2f} us, one {one_us:.2f} us")
        except Exception as error:  # noqa: BLE001
            say("FAILED", fused, type(error).__name__, str(error)[:300])


def _both(first: Any, h: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> None:
    first.run()
    add_rms_norm_(h, y, scale, scale)


def main() -> None:
    gpu = present()
    say(gpu.name, "triton", triton.__version__)
    pairs = [(shape, chosen) for shape, configs, _ in SWEEPS for chosen in usable(gpu, shape, configs)]
    pairs += [pair for pair in checks() if KERNEL.refusal(*pair, gpu) is None]
    compile_ahead(gpu, pairs)
    rate = read_rate()
    say(f"read rate {rate / 1e12:.3f} TB/s")
    for part in (check_all, hunt_races):
        try:
            part(gpu)
        except Exception:  # noqa: BLE001
            traceback.print_exc()
    for shape, configs, bar in SWEEPS:
        if late():
            say("out of time before", shape)
            break
        try:
            sweep(gpu, shape, configs, bar, rate)
        except Exception:  # noqa: BLE001
            say("FAILED", shape)
            traceback.print_exc()
        torch.cuda.empty_cache()
        if len(sys.argv) > 1:
            Path(sys.argv[1]).write_text("\n".join(TABLE))
    if not late():
        post_norms(gpu)
    say("end; rows of activations:", sorted({row_of(shape).rows for shape, _, _ in SWEEPS}))


if __name__ == "__main__":
    main()
