"""Scratch: the decode kernels on a GPU. Correctness, a hunt for races, then times of many configurations. Under 120 s.

    python -m bench.kernels_scratch_decode

Times are medians of CUDA-graph replays, each graph holding many launches, so that a figure is the time from one launch
to the next in a chain. ``rotated`` reads buffers that do not fit the second-level cache, ``warm`` the same one again.
"""

from __future__ import annotations

import itertools
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from autotune.ahead_of_time import CompilerPool
from autotune.correctness import compare
from autotune.gpu import Gpu, present
from autotune.kernel import Case, Config, Kernel, Tensors
from autotune.kernels.cache_write import CacheWrite
from autotune.kernels.global_decode import GlobalDecode
from autotune.kernels.qk_norm_rope_cache import QkNormRopeCache
from autotune.kernels.window_decode import WindowDecode

STARTED = time.monotonic()
BUDGET_S = 105.0
READ_RATE = 3.03e12
"""What a read-only kernel reached on an H100."""
WINDOW, GLOBAL, ROPE, WRITE = WindowDecode(), GlobalDecode(), QkNormRopeCache(), CacheWrite()


def say(*words: object) -> None:
    print(f"[{time.monotonic() - STARTED:5.1f}]", *words, flush=True)


def attention(heads: int, kv_heads: int, head_dim: int, slots: int, keys: int, batch: int = 1) -> Case:
    dims = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "slots": slots, "keys": keys}
    return Case(dtype="bfloat16", dims=dims | {"scale_dim": 256})


def configs(
    splits: Sequence[int], blocks: Sequence[int], warps: Sequence[int], stages: Sequence[int]
) -> Iterator[Config]:
    for s, b, w, n in itertools.product(splits, blocks, warps, stages):
        yield Config(constants={"SPLITS": s, "BLOCK_K": b}, num_warps=w, num_stages=n)


def graph_us(runs: Sequence[Callable[[], object]], launches: int, replays: int = 7) -> float:
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


def runs_of(kernel: Kernel, case: Case, config: Config, sets: Sequence[Tensors]) -> list[Callable[[], object]]:
    runs: list[Callable[[], object]] = []
    for inputs in sets:
        written = kernel.outputs(case, config, device="cuda")
        launches = kernel.launches(case, config, inputs | written)
        runs.append(lambda launches=launches: [launch.run() for launch in launches])  # type: ignore[misc]
    return runs


def compile_first(pool: CompilerPool, jobs: Sequence[tuple[Kernel, Case, Config]], gpu: Gpu) -> None:
    """Fills Triton's cache by many processes; what that misses is compiled when it is run."""
    launches = []
    for kernel, case, config in jobs:
        tensors = kernel.inputs(case, device="meta") | kernel.outputs(case, config, device="meta")
        launches += [(launch, gpu.architecture) for launch in kernel.launches(case, config, tensors)]
    failed = [error for error in pool.compile_all(launches) if isinstance(error, Exception)]
    say(f"compiled {len(launches)}, {len(failed)} refused", *failed[:2])


def checked_cases() -> list[tuple[Kernel, Case]]:
    rope = {"heads": 16, "kv_heads": 8, "head_dim": 256}
    ring = {"batch": 2, "tokens": 3000, "kv_heads": 8, "head_dim": 256, "window": 1024}
    return [
        (WINDOW, attention(16, 8, 256, 1024, 1024)),
        (WINDOW, attention(16, 8, 256, 1024, 77, batch=4)),
        (WINDOW, attention(32, 16, 128, 1024, 1000, batch=16)),
        (WINDOW, attention(4, 1, 256, 512, 512)),
        (GLOBAL, attention(8, 4, 256, 32768, 30001)),
        (GLOBAL, attention(16, 8, 256, 131072, 131072)),
        (GLOBAL, attention(32, 16, 128, 4096, 4000, batch=3)),
        *(
            (ROPE, Case(dtype="bfloat16", dims={"batch": batch, "tokens": tokens} | rope | {"slots": slots}))
            for batch, tokens, slots in ((1, 1, 1024), (16, 1, 4096), (1, 2048, 0), (2, 1000, 4096))
        ),
        (WRITE, Case(dtype="bfloat16", dims=ring)),
    ]


def correctness() -> None:
    gpu = present()
    for kernel, case in checked_cases():
        try:
            inputs = kernel.inputs(case, device="cuda")
            results = compare(kernel, case, kernel.default(case, gpu), inputs)
            say("ok  " if all(result.passed for result in results) else "FAIL", kernel.name, case, *map(str, results))
        except Exception as error:  # noqa: BLE001 - the rest is worth running
            say("FAIL", kernel.name, case, type(error).__name__, str(error)[:500])
        torch.cuda.empty_cache()


RACED = attention(16, 8, 256, 4096, 4096, batch=4)
RACING = tuple(configs((7, 16, 33), (32, 64), (4, 8), (3,)))


def races() -> None:
    """Sequences of different lengths, one of them idle: 200 launches on the same inputs must give the same bits."""
    case = RACED
    inputs = GLOBAL.inputs(case, device="cuda")
    inputs["position"] = torch.tensor([4095, 1023, -1, 300], dtype=torch.int32, device="cuda")
    for config in RACING:
        written = GLOBAL.outputs(case, config, device="cuda")
        (launch,) = GLOBAL.launches(case, config, inputs | written)
        first: Tensor | None = None
        moved = 0
        for _ in range(200):
            written["out"].fill_(float("nan"))
            launch.run()
            first = written["out"].clone() if first is None else first
            moved += not torch.equal(first, written["out"])
        counters = int(written["_zero_arrived"].abs().sum())
        passed = all(result.passed for result in compare(GLOBAL, case, config, inputs))
        verdict = "ok  " if not moved and not counters and passed else "FAIL"
        say(verdict, "race", config, f"moved {moved} of 200, counters {counters}, right {passed}")


def sdpa(sets: Sequence[Tensors], launches: int, keys: int) -> None:
    for name, backend, repeat in (
        ("flash", SDPBackend.FLASH_ATTENTION, False), ("flash, kv repeated", SDPBackend.FLASH_ATTENTION, True),
        ("cuDNN", SDPBackend.CUDNN_ATTENTION, False), ("cuDNN, kv repeated", SDPBackend.CUDNN_ATTENTION, True),
    ):  # fmt: skip
        try:
            runs: list[Callable[[], object]] = []
            for inputs in sets:
                q = inputs["q"].transpose(1, 2)
                k, v = inputs["k_cache"][:, :, :keys], inputs["v_cache"][:, :, :keys]
                if repeat:
                    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
                call = partial(F.scaled_dot_product_attention, q, k, v, scale=1 / 16, enable_gqa=not repeat)
                runs.append(call)
            with sdpa_kernel(backend), torch.no_grad():
                say(f"    torch SDPA {name}: {graph_us(runs, launches):.1f} us")
        except Exception as error:  # noqa: BLE001 - a backend may refuse a shape
            say(f"    torch SDPA {name}: {type(error).__name__} {str(error)[:120]}")
        torch.cuda.empty_cache()


def times(
    kernel: Kernel, case: Case, candidates: Sequence[Config], *, copies: int, launches: int, warm: bool, peers: bool
) -> None:
    gpu = present()
    sets = [kernel.inputs(case, device="cuda", seed=seed) for seed in range(copies)]
    size = kernel.cost(case).bytes
    found: list[tuple[float, Config]] = []
    for config in [kernel.default(case, gpu), *candidates]:
        if kernel.refusal(case, config, gpu) or time.monotonic() - STARTED > BUDGET_S:
            continue
        try:
            found.append((graph_us(runs_of(kernel, case, config, sets), launches, replays=5), config))
        except Exception as error:  # noqa: BLE001 - the others are worth timing
            say("    failed:", config, type(error).__name__, str(error)[:200])
    say(f"== {kernel.name} {case}: {size / 1e6:.2f} MB, {size / READ_RATE * 1e6:.2f} us at the read rate")
    if not found:
        return
    default_us = found[0][0]
    for rank, (us, config) in enumerate(sorted(found, key=lambda pair: pair[0])[:8]):
        line = f"    {us:8.2f} us {size / us / 1e6:5.2f} TB/s {size / READ_RATE * 1e6 / us:5.2f} of the read rate  {config}"
        if warm:
            line += f"  | warm {graph_us(runs_of(kernel, case, config, sets[:1]), launches):.2f} us"
        if rank < 3 and not all(result.passed for result in compare(kernel, case, config, sets[0])):
            line += "  WRONG"
        say(line)
    say(f"    default {default_us:.2f} us; worst of {len(found)}: {max(us for us, _ in found):.2f} us")
    if "position" in sets[0]:
        idle = [inputs | {"position": torch.full_like(inputs["position"], -1)} for inputs in sets[:1]]
        best = min(found, key=lambda pair: pair[0])[1]
        say(
            f"    the best one's grid with nothing to do: {graph_us(runs_of(kernel, case, best, idle), launches):.2f} us"
        )
    if peers:
        sdpa(sets, launches, case.dims["keys"])
    del sets
    torch.cuda.empty_cache()


def main() -> None:
    gpu = present()
    say(gpu.name, "torch", torch.__version__)
    short = list(configs((8, 16, 32), (16, 32, 64, 128), (4, 8), (2, 3, 4, 5)))
    short += configs((16, 32), (16, 32), (2,), (2, 3, 4, 5))
    long = list(configs((16, 33, 66, 132), (32, 64, 128), (4, 8), (2, 3, 4, 6)))
    few = list(configs((16, 32, 64), (16, 32, 64), (4, 8), (3, 4)))
    window, far, farthest = (
        attention(16, 8, 256, 1024, 1024), attention(16, 8, 256, 32768, 32768), attention(16, 8, 256, 131072, 131072)
    )  # fmt: skip
    rope = {"heads": 16, "kv_heads": 8, "head_dim": 256}
    decode = Case(dtype="bfloat16", dims={"batch": 1, "tokens": 1} | rope | {"slots": 1024})
    prefill = Case(dtype="bfloat16", dims={"batch": 1, "tokens": 8192} | rope | {"slots": 0})
    ring = Case(dtype="bfloat16", dims={"batch": 1, "tokens": 8192, "kv_heads": 8, "head_dim": 256, "window": 1024})
    heads = [
        Config(constants={"BLOCK_HEADS": block}, num_warps=warps, num_stages=1)
        for block in (1, 2, 4, 8, 16)
        for warps in (1, 2, 4, 8)
    ]
    rows = [
        Config(constants={"BLOCK_ROWS": block}, num_warps=warps, num_stages=1)
        for block in (2, 4, 8, 16, 32)
        for warps in (1, 2, 4, 8)
    ]
    plan: list[tuple[Kernel, Case, list[Config], dict[str, object]]] = [
        (WINDOW, window, short, {"copies": 16, "launches": 192, "warm": True, "peers": True}),
        (WINDOW, attention(8, 4, 256, 1024, 1024), few, {"copies": 32, "launches": 192, "warm": True, "peers": False}),
        (GLOBAL, far, long, {"copies": 2, "launches": 20, "warm": False, "peers": True}),
        (GLOBAL, farthest, long, {"copies": 1, "launches": 6, "warm": False, "peers": True}),
        (ROPE, decode, heads, {"copies": 16, "launches": 192, "warm": True, "peers": False}),
        (ROPE, prefill, heads, {"copies": 1, "launches": 10, "warm": False, "peers": False}),
        (WRITE, ring, rows, {"copies": 8, "launches": 96, "warm": True, "peers": False}),
    ]
    jobs = [(kernel, case, kernel.default(case, gpu)) for kernel, case in checked_cases()]
    jobs += [(GLOBAL, RACED, config) for config in RACING]
    for kernel, case, candidates, _ in plan:
        jobs += [(kernel, case, config) for config in candidates if kernel.refusal(case, config, gpu) is None]
    with CompilerPool() as pool:
        compile_first(pool, jobs, gpu)
    correctness()
    races()
    for kernel, case, candidates, how in plan:
        try:
            times(kernel, case, candidates, **how)  # type: ignore[arg-type]
        except Exception:  # noqa: BLE001 - the next case is worth timing
            say(traceback.format_exc()[-600:])
    say("done")


if __name__ == "__main__":
    main()
