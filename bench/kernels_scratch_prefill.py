"""Scratch, for one run on a GPU: are the prefill kernels right there, and how fast is every sensible configuration.

python bench/kernels_scratch_prefill.py            all parts, each in a process with a time limit
python bench/kernels_scratch_prefill.py PART       one part: plain, hopper, time, long, peers
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton

from autotune.correctness import compare
from autotune.gpu import present
from autotune.kernel import Case, Config, Kernel
from autotune.kernels.global_prefill import GlobalPrefill
from autotune.kernels.prefill_space import prefill_config
from autotune.kernels.window_prefill import WindowPrefill

PARTS = {"hopper": 45, "time": 50, "plain": 30, "peers": 70, "long": 40}
BUDGET_S = 150.0
LOCAL, GLOBAL = WindowPrefill(), GlobalPrefill()


def say(*words: object) -> None:
    print(*words, flush=True)


def hopper(keys: int = 64, stages: int = 2, programs: int | None = None) -> Config:
    programs = present().multiprocessors if programs is None else programs
    return prefill_config(128, keys, 2, warps=8, stages=stages, tma=1, hopper=1, programs=programs)


def plain(keys: int = 64, pack: int = 2, tma: int = 1, mask_all: int = 0, stages: int = 2, rows: int = 128) -> Config:
    return prefill_config(rows, keys, pack, warps=rows // 16, stages=stages, tma=tma, mask_all=mask_all)


def case(kernel: Kernel, chunk: int, start: int, head_dim: int, heads: tuple[int, int], **more: int) -> Case:
    dims = {"batch": 1, "chunk": chunk, "start": start, "heads": heads[0], "kv_heads": heads[1], "head_dim": head_dim}
    dims |= {"images": 0, "ragged": 0} | more
    dims |= {"window": 1024} if kernel is LOCAL else {"slots": (start + chunk + 127) // 64 * 64}
    return Case(dtype="bfloat16", dims=dims)


def check(configs: Callable[[int], list[Config]]) -> bool:
    right = True
    for kernel in (LOCAL, GLOBAL):
        for shape in (  # few distinct ones to compile: heads, head_dim, images, multiples of 16
            case(kernel, 64, 0, 256, (16, 8)),
            case(kernel, 2048, 0, 256, (16, 8)),
            case(kernel, 1008, 4992, 256, (16, 8)),
            case(kernel, 1000, 5000, 256, (16, 8), images=2),
            case(kernel, 1537, 700, 256, (16, 8), images=2, batch=3, ragged=1),
            case(kernel, 3, 900, 256, (16, 8), images=1),
            case(kernel, 1300, 100, 128, (32, 16), images=1, batch=2, ragged=1),
        ):
            for config in configs(shape.dims["head_dim"]):
                began = time.perf_counter()
                try:
                    for c in compare(kernel, shape, config, kernel.inputs(shape, device="cuda")):
                        right &= c.passed
                        took = time.perf_counter() - began
                        say("ok   " if c.passed else "WRONG", kernel.name, shape, "|", config, "|", c, f"{took:.1f} s")
                except Exception:  # noqa: BLE001 - it goes on with the next
                    right = False
                    say(
                        "FAILED", kernel.name, shape, "|", config, traceback.format_exc().strip().splitlines()[-1][:300]
                    )
    return right


def graph_us(run: Callable[[], None], launches: int = 4, repeats: int = 15) -> float:
    """Median µs of one run, from a CUDA graph of several; the tensors are far larger than L2."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            run()
    times = []
    for _ in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / launches)
    return statistics.median(times[3:])


def time_all(kernel: Kernel, shape: Case, configs: list[Config]) -> None:
    say(f"\n{kernel.name}, {shape}")
    inputs = kernel.inputs(shape, device="cuda")
    flops = kernel.cost(shape).flops
    found = []
    for config in configs:
        refused = kernel.refusal(shape, config, present())
        if refused:
            say("refused", config, refused)
            continue
        try:
            tensors = inputs | kernel.outputs(shape, config, device="cuda")
            (launch,) = kernel.launches(shape, config, tensors)
            began = time.perf_counter()
            us = graph_us(launch.run)
            found.append((us, str(config)))
            say(f"{us:9.1f} us {flops / us / 1e6:7.1f} TFLOP/s  {config}  ({time.perf_counter() - began:.1f} s)")
        except Exception:  # noqa: BLE001 - it goes on with the next
            say("FAILED", config, traceback.format_exc().strip().splitlines()[-1][:300])
    say("best:")
    for us, words in sorted(found)[:10]:
        say(f"{us:9.1f} us {flops / us / 1e6:7.1f} TFLOP/s  {words}")


def time_bar() -> None:
    configs = [hopper(), hopper(programs=0), hopper(32, 4), hopper(32, 3)]
    configs += [plain(pack=pack, mask_all=mask) for pack in (2, 1) for mask in (0, 1)]
    configs += [plain(tma=0), plain(32, stages=3), plain(32, stages=4), plain(64, rows=64)]
    time_all(LOCAL, case(LOCAL, 8192, 0, 256, (16, 8)), configs)


def time_more() -> None:
    time_all(GLOBAL, case(GLOBAL, 8192, 0, 256, (16, 8)), [hopper(), hopper(programs=0), plain()])
    time_all(
        LOCAL, case(LOCAL, 8192, 0, 128, (32, 16)), [hopper(128), hopper(64, 4), hopper(64, 3), plain(128), plain()]
    )
    time_all(GLOBAL, case(GLOBAL, 8192, 0, 128, (32, 16)), [hopper(128), hopper(64, 4), plain(128)])
    time_all(LOCAL, case(LOCAL, 2048, 2048, 256, (16, 8)), [hopper(), hopper(programs=0), plain()])
    time_all(GLOBAL, case(GLOBAL, 2048, 2048, 256, (16, 8)), [hopper(), plain()])


def time_peers() -> None:
    q, k, v = (torch.randn(1, n, 8192, 256, device="cuda", dtype=torch.bfloat16) for n in (16, 8, 8))
    causal = 4 * 16 * 256 * (8192 * 8193 // 2)
    window = LOCAL.cost(case(LOCAL, 8192, 0, 256, (16, 8))).flops
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(backend):
                us = graph_us(
                    lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                )
            say(f"{us:9.1f} us {causal / us / 1e6:7.1f} TFLOP/s  SDPA {backend.name}, causal without a window")
        except Exception:  # noqa: BLE001 - it goes on with the next
            say("FAILED", backend, traceback.format_exc().strip().splitlines()[-1][:300])
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, s, j: (j <= s) & (j > s - 1024), None, None, 8192, 8192, device="cuda")
    for mode in (None, "max-autotune-no-cudagraphs"):
        try:
            torch.compiler.reset()
            compiled = torch.compile(flex_attention, mode=mode)
            us = graph_us(lambda f=compiled: f(q, k, v, block_mask=mask, enable_gqa=True))  # type: ignore[misc]
            say(f"{us:9.1f} us {window / us / 1e6:7.1f} TFLOP/s  FlexAttention, {mode}")
        except Exception:  # noqa: BLE001 - it goes on with the next
            say("FAILED FlexAttention", mode, traceback.format_exc().strip().splitlines()[-1][:300])


def run_part(part: str) -> int:
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    if part == "hopper":
        return 0 if check(lambda head_dim: [hopper(64 if head_dim == 256 else 128)]) else 1
    if part == "plain":
        return 0 if check(lambda head_dim: [plain(), plain(32, 2, 0, 1, 2, 64)]) else 1
    {"time": time_bar, "long": time_more, "peers": time_peers}[part]()
    return 0


def main() -> None:
    if len(sys.argv) > 1:
        raise SystemExit(run_part(sys.argv[1]))
    began = time.perf_counter()
    for part, limit_s in PARTS.items():
        left = BUDGET_S - (time.perf_counter() - began)
        if left < 5:
            say(f"== {part}: left out, the time is up")
            continue
        say(f"\n== {part}, {time.perf_counter() - began:.0f} s in")
        try:
            done = subprocess.run([sys.executable, "-u", __file__, part], timeout=min(limit_s, left), check=False)
            say(f"== {part} ended with {done.returncode}")
        except subprocess.TimeoutExpired:
            say(f"== {part} TIMED OUT")


if __name__ == "__main__":
    main()
