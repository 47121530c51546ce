"""Scratch, for one GPU: are `matmul` and `siglip_attention` right at real shapes, and how fast beside cuBLAS and SDPA?

python3 bench/kernels_scratch_matmul.py [--seconds 165] [--only dense,geglu,int4,short,vision,siglip,right]
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from autotune.correctness import compare
from autotune.gpu import Gpu, present
from autotune.kernel import Case, Config, Kernel, Tensors
from autotune.kernels.matmul import Matmul
from autotune.kernels.siglip_attention import SiglipAttention

MATMUL, SIGLIP = Matmul(), SiglipAttention()
START = time.monotonic()
DEVICE = torch.device("cuda")


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:5.1f}] {text}", flush=True)


def dense(loads: int, m: int, n: int, k: int, warps: int, stages: int, *, stay: int = 0, parts: int = 1, group: int = 8) -> Config:  # fmt: skip
    constants = {"LOADS": loads, "PROGRAMS": stay * GPU.multiprocessors, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
    return Config(constants=constants | {"GROUP": group, "PARTS": parts}, num_warps=warps, num_stages=stages)


def blocks(loads: int, m: int, n: int, k: int, warps: int, stages: int) -> Config:
    config = dense(loads, m, n, k, warps, stages)
    return Config(constants={"AHEAD": 0} | dict(config.constants), num_warps=warps, num_stages=stages)


def ahead(config: Config) -> Config:
    return Config(constants={"AHEAD": 1} | dict(config.constants), num_warps=config.num_warps, num_stages=config.num_stages)  # fmt: skip


def attention(loads: int, split: int, m: int, n: int, warps: int, stages: int) -> Config:
    constants = {"LOADS": loads, "SPLIT": split, "BLOCK_M": m, "BLOCK_N": n}
    return Config(constants=constants, num_warps=warps, num_stages=stages)


def dense_configs() -> list[Config]:
    return [
        dense(1, 128, 256, 64, 8, 4, stay=1, parts=2),
        dense(1, 128, 256, 64, 8, 4, stay=1, parts=2, group=16),
        dense(1, 128, 256, 64, 8, 4, stay=1, parts=2, group=4),
        dense(1, 128, 256, 64, 8, 3, stay=1),
        dense(1, 256, 128, 64, 8, 4, stay=1, parts=2),
        dense(1, 256, 128, 64, 8, 3, stay=1),
        dense(1, 128, 256, 64, 8, 4),
        dense(1, 256, 128, 64, 8, 4),
        dense(1, 128, 128, 64, 4, 3),
        dense(1, 128, 128, 128, 8, 3, stay=1),
        dense(0, 128, 256, 64, 8, 3),
        dense(0, 128, 128, 64, 4, 3),
        dense(2, 128, 256, 64, 4, 3, stay=1),
        dense(2, 128, 256, 64, 4, 3),
        dense(2, 256, 128, 64, 4, 3, stay=1),
    ]


def geglu_configs() -> list[Config]:
    return [
        dense(1, 128, 128, 64, 8, 4, stay=1, parts=2),
        dense(1, 128, 128, 64, 8, 4, stay=1, parts=2, group=16),
        dense(1, 128, 128, 64, 8, 3, stay=1),
        dense(1, 256, 64, 64, 8, 4, stay=1),
        dense(1, 256, 64, 64, 8, 3, stay=1),
        dense(1, 128, 128, 64, 8, 4),
        dense(1, 256, 64, 64, 8, 4),
        dense(1, 64, 128, 64, 4, 3),
        dense(0, 128, 128, 64, 8, 3),
        dense(2, 128, 128, 64, 4, 3, stay=1),
        dense(2, 128, 128, 64, 4, 3),
    ]


def blocks_configs() -> list[Config]:
    return [
        blocks(1, 128, 128, 64, 4, 3),
        blocks(1, 128, 128, 64, 8, 3),
        blocks(1, 256, 128, 64, 8, 3),
        blocks(1, 256, 128, 32, 8, 4),
        blocks(1, 128, 256, 64, 8, 3),
        blocks(1, 128, 128, 128, 8, 3),
        blocks(1, 64, 128, 64, 4, 4),
        blocks(0, 128, 128, 64, 8, 3),
    ]


def blocks_geglu_configs() -> list[Config]:
    return [
        blocks(1, 128, 64, 64, 4, 3),
        blocks(1, 128, 64, 64, 8, 3),
        blocks(1, 256, 64, 64, 8, 3),
        blocks(1, 128, 128, 64, 8, 3),
        blocks(1, 128, 128, 32, 8, 4),
        blocks(1, 64, 64, 64, 4, 3),
    ]


def attention_configs() -> list[Config]:
    return [
        attention(1, 2, 128, 64, 4, 2),
        attention(1, 2, 128, 64, 4, 3),
        attention(1, 2, 64, 128, 4, 2),
        attention(1, 2, 64, 64, 4, 3),
        attention(1, 2, 128, 128, 8, 2),
        attention(1, 2, 128, 64, 8, 3),
        attention(1, 2, 128, 32, 4, 3),
        attention(1, 1, 128, 64, 4, 2),
        attention(1, 1, 128, 128, 8, 2),
        attention(1, 1, 64, 128, 4, 2),
        attention(1, 0, 128, 64, 4, 2),
        attention(1, 0, 128, 128, 8, 2),
        attention(1, 1, 256, 64, 8, 2),
        attention(1, 2, 256, 64, 8, 2),
        attention(0, 2, 128, 64, 4, 2),
        attention(0, 2, 128, 128, 8, 2),
        attention(2, 2, 128, 128, 4, 2),
        attention(2, 1, 128, 128, 4, 2),
        attention(2, 0, 128, 128, 4, 2),
        attention(2, 2, 128, 64, 4, 3),
    ]


def case(dtype: str, rows: int, columns: int, depth: int, flags: str = "", zeros: int = 0) -> Case:
    dims = {"rows": rows, "columns": columns, "depth": depth} | dict.fromkeys(flags.split(), 1)
    return Case(dtype=dtype, dims=dims | ({"zeros": zeros} if zeros else {}))


def siglip_case(images: int, patches: int) -> Case:
    return Case(dtype="bfloat16", dims={"images": images, "patches": patches, "heads": 16, "head_dim": 72})


def allowed(kernel: Kernel, wanted: Case, configs: Iterable[Config]) -> list[Config]:
    """The default first; what the kernel refuses is named."""
    default = kernel.default(wanted, GPU)
    found = [default]
    for config in configs:
        refused = kernel.refusal(wanted, config, GPU)
        if refused is not None:
            say(f"    refused for {wanted}: {config}: {refused}")
        elif str(config) != str(default):
            found.append(config)
    return found


def launch_key(launch: Any) -> tuple[Any, ...]:
    """What decides the cubin: the same specialisation as Triton's."""
    arguments = []
    for name, value in launch.arguments.items():
        fact = value.dtype if isinstance(value, torch.Tensor) else "float" if isinstance(value, float) else (value == 1, value % 16 == 0)  # fmt: skip
        arguments.append((name, fact))
    constants = tuple(sorted((name, str(value)) for name, value in launch.constants.items()))
    return (launch.function.fn.__name__, tuple(arguments), constants, launch.num_warps, launch.num_stages)


def all_launches(jobs: list[tuple[Kernel, Case, list[Config]]]) -> dict[tuple[Any, ...], tuple[str, Any]]:
    found = {}
    for kernel, wanted, configs in jobs:
        for config in configs:
            tensors = {**kernel.inputs(wanted, device="meta"), **kernel.outputs(wanted, config, device="meta")}
            for launch in kernel.launches(wanted, config, tensors):
                found[launch_key(launch)] = (f"{kernel.name} {wanted} {config}", launch)
    return found


def warm(jobs: list[tuple[Kernel, Case, list[Config]]]) -> None:
    """Compiles every launch once, in threads."""
    dtypes = (torch.bfloat16, torch.float32, torch.uint8, torch.int32)
    real = {dtype: torch.empty(1 << 12, dtype=dtype, device=DEVICE) for dtype in dtypes}

    def one(named: tuple[str, Any]) -> str:
        name, launch = named
        arguments = {n: real[v.dtype] if isinstance(v, torch.Tensor) else v for n, v in launch.arguments.items()}
        try:
            launch.function.warmup(
                **arguments, **launch.constants, grid=launch.grid,
                num_warps=launch.num_warps, num_stages=launch.num_stages,
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001
            return f"    did not compile: {name}: {str(error)[:150]}"
        return ""

    launches = all_launches(jobs)
    with ThreadPoolExecutor(14) as pool:
        for line in pool.map(one, launches.values()):
            if line:
                say(line)
    say(f"compiled {len(launches)} kernels")


def graph_us(work: Callable[[], Any], repeats: int = 5, replays: int = 4) -> float:
    """Median microseconds of one run within a CUDA graph of ``repeats`` runs."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            work()
    times = []
    for turn in range(replays + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if turn:
            times.append(begin.elapsed_time(end) * 1000 / repeats)
    return sorted(times)[len(times) // 2]


def time_configs(kernel: Kernel, wanted: Case, configs: list[Config], peers: dict[str, Callable[[], Any]], inputs: Tensors) -> None:  # fmt: skip
    flops = kernel.cost(wanted).flops
    base = {}
    for name, work in peers.items():
        try:
            base[name] = graph_us(work)
        except Exception as error:  # noqa: BLE001
            say(f"    {name} failed: {str(error)[:100]}")
    best = min(base.values())
    say(f"{kernel.name} {wanted}: " + ", ".join(f"{n} {u:.1f} us {flops / u / 1e6:.0f} TF" for n, u in base.items()))
    results = []
    for config in configs:
        try:
            written = kernel.outputs(wanted, config, device=DEVICE)
            launches = kernel.launches(wanted, config, inputs | written)

            def work(launches: tuple[Any, ...] = launches) -> None:
                for launch in launches:
                    launch.run()

            results.append((graph_us(work), str(config)))
        except Exception as error:  # noqa: BLE001
            say(f"    FAILED {config}: {type(error).__name__} {str(error)[:150]}")
    default = next((us for us, name in results if name == str(configs[0])), float("nan"))
    for us, name in sorted(results):
        say(f"    {best / us:.3f} of best peer  {us:8.1f} us  {flops / us / 1e6:6.1f} TF  {name}")
    again = graph_us(next(iter(peers.values())))
    say(f"    default {best / default:.3f}; first peer again {again:.1f} us")


def check(kernel: Kernel, wanted: Case, configs: Iterable[Config]) -> None:
    inputs = kernel.inputs(wanted, device=DEVICE)
    for config in configs:
        try:
            for comparison in compare(kernel, wanted, config, inputs):
                if not comparison.passed:
                    say(f"    WRONG {wanted} {config}: {comparison}")
        except Exception as error:  # noqa: BLE001
            say(f"    FAILED {wanted} {config}: {type(error).__name__} {str(error)[:150]}")
    torch.cuda.synchronize()


def cublas(inputs: Tensors, w: torch.Tensor) -> Callable[[], Any]:
    x, bias = inputs["x"], inputs.get("bias")
    return lambda: F.linear(x, w, bias)


def run_matmul(wanted: Case, configs: list[Config]) -> None:
    inputs = MATMUL.inputs(wanted, device=DEVICE)
    if wanted.dtype == "bfloat16":
        w = inputs["w"].T if wanted.dims.get("transposed") else inputs["w"]
    else:
        rows = inputs["codes"].shape[0]
        w = torch.randn(rows, wanted.dims["depth"], device=DEVICE, dtype=torch.bfloat16)
    time_configs(MATMUL, wanted, configs, {"cuBLAS": cublas(inputs, w)}, inputs)


def run_siglip(wanted: Case, configs: list[Config]) -> None:
    inputs = SIGLIP.inputs(wanted, device=DEVICE)
    peers: dict[str, Callable[[], Any]] = {}
    for layout in ("strided", "separate"):
        parts = [x.transpose(1, 2) for x in inputs["qkv"].unbind(2)]
        if layout == "separate":
            parts = [x.contiguous() for x in parts]
        for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):

            def work(parts: list[torch.Tensor] = parts, backend: str = backend) -> Any:
                with sdpa_kernel(getattr(SDPBackend, backend)):
                    return F.scaled_dot_product_attention(parts[0], parts[1], parts[2])

            peers[f"{backend.split('_')[0].lower()} {layout}"] = work
    time_configs(SIGLIP, wanted, configs, peers, inputs)


SHAPES = {"4b": (2560, 10240, 8, 4, 256), "12b": (3840, 15360, 16, 8, 256)}


def jobs_of(part: str) -> list[tuple[Kernel, Case, list[Config]]]:
    jobs: list[tuple[Kernel, Case, Iterable[Config]]] = []
    for hidden, ffn, heads, kv, dim in SHAPES.values():
        plain = [((heads + 2 * kv) * dim, hidden), (hidden, heads * dim), (hidden, ffn)]
        if part == "dense":
            jobs += [(MATMUL, case("bfloat16", 8192, n, k), dense_configs()) for n, k in plain]
        if part == "geglu":
            jobs.append((MATMUL, case("bfloat16", 8192, ffn, hidden, "geglu"), geglu_configs()))
        if part == "int4":
            after = [ahead(c) for c in dense_configs()[:1]]
            jobs += [(MATMUL, case("int4", 8192, n, k, "", 1), after + blocks_configs()) for n, k in plain[:1]]
            after = [ahead(c) for c in geglu_configs()[:1]]
            jobs.append((MATMUL, case("int4", 8192, ffn, hidden, "geglu", 1), after + blocks_geglu_configs()))
        if part == "short":
            for rows in (64, 512):
                one = [ahead(dense(1, 128, 256, 64, 8, 4)), *blocks_configs(), blocks(1, 64, 64, 64, 4, 3)]
                jobs.append((MATMUL, case("int4", rows, *plain[0], "", 1), one))
                few = [dense(1, 64, 64, 64, 4, 4), dense(1, 64, 128, 64, 4, 4), dense(1, 128, 128, 64, 4, 3)]
                jobs.append((MATMUL, case("bfloat16", rows, *plain[0]), few))
    if part == "vision":
        few = [
            dense(1, 128, 128, 64, 4, 3),
            dense(1, 128, 128, 64, 4, 4),
            dense(1, 128, 128, 64, 8, 3),
            dense(1, 128, 256, 64, 8, 3, stay=1, parts=2),
            dense(1, 256, 128, 64, 8, 3, stay=1, parts=2),
            dense(1, 128, 192 // 3, 64, 4, 4),
        ]
        for columns, depth, flags in ((3456, 1152, "bias"), (1152, 1152, "bias residual"), (4304, 1152, "bias gelu"), (1152, 4304, "bias residual")):  # fmt: skip
            jobs.append((MATMUL, case("bfloat16", 4096, columns, depth, flags), few))
        jobs.append((MATMUL, case("bfloat16", 256, 2560, 1152, "transposed"), [dense(1, 64, 64, 64, 4, 4)]))
    if part == "siglip":
        jobs += [(SIGLIP, siglip_case(images, 4096), attention_configs()) for images in (1, 4)]
    if part == "right":
        jobs += [
            (MATMUL, case("bfloat16", 2064, 2576, 1152), dense_configs()),
            (MATMUL, case("bfloat16", 2064, 2576, 1152, "geglu"), geglu_configs()),
            (MATMUL, case("int4", 2064, 2576, 1152, "", 1), blocks_configs()),
            (MATMUL, case("int4", 2064, 2576, 1152, "geglu", 1), blocks_geglu_configs()),
            (MATMUL, case("int8", 1000, 1304, 1160, "bias gelu", 2), blocks_configs()[:3]),
            (MATMUL, case("bfloat16", 1000, 1304, 1160, "bias geglu"), geglu_configs()[:1]),
            (MATMUL, case("bfloat16", 777, 1301, 587, "bias gelu"), []),
            (MATMUL, case("bfloat16", 4096, 1152, 4304, "bias residual"), [dense(2, 128, 128, 64, 4, 3, stay=1)]),
            (MATMUL, case("bfloat16", 256, 2560, 1152, "transposed"), []),
            (MATMUL, case("bfloat16", 8192, 3840, 4096), []),
            (SIGLIP, siglip_case(1, 4096), attention_configs()),
            (SIGLIP, siglip_case(2, 1000), attention_configs()[:5]),
        ]
    return [(kernel, wanted, allowed(kernel, wanted, configs)) for kernel, wanted, configs in jobs]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=165)
    parser.add_argument("--only", default="right,dense,geglu,siglip,int4,vision,short")
    given = parser.parse_args()
    faulthandler.dump_traceback_later(given.seconds, exit=True)
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=DEVICE))
    say(f"{GPU.name}, torch {torch.__version__}, triton {triton.__version__}")
    parts = {part: jobs_of(part) for part in given.only.split(",")}
    warm([job for jobs in parts.values() for job in jobs])
    for part, jobs in parts.items():
        say(f"== {part}")
        for kernel, wanted, configs in jobs:
            try:
                if part == "right":
                    check(kernel, wanted, configs)
                elif kernel is MATMUL:
                    run_matmul(wanted, configs)
                else:
                    run_siglip(wanted, configs)
            except Exception:  # noqa: BLE001
                say(traceback.format_exc(limit=3))
    say("done")


GPU: Gpu = present()
if __name__ == "__main__":
    main()
