"""Scratch: the small kernels on a GPU. Correctness at real shapes, then times beside torch's. Under 60 s.

    python -m bench.kernels_scratch_small

Times are medians of CUDA-graph replays over buffers that do not fit the second-level cache, torch's as the kernels'.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from autotune.ahead_of_time import CompilerPool
from autotune.correctness import compare
from autotune.gpu import Gpu, present
from autotune.kernel import Case, Config, Kernel, Tensors
from autotune.kernels.embed import Embed, multiplier
from autotune.kernels.layer_norm import LayerNorm
from autotune.kernels.patch_embed import PatchEmbed
from autotune.kernels.pool_norm import PoolNorm
from autotune.kernels.sample import Sample
from autotune.kernels.siglip_pool import siglip_pool
from autotune.measurement import GraphMeter, kernel_us

STARTED = time.monotonic()
BUDGET_S = 52.0
METER = GraphMeter(graph_us=1000.0, warm_up_us=3000.0)
POOL, NORM, EMBED, PATCH, SAMPLE = PoolNorm(), LayerNorm(), Embed(), PatchEmbed(), Sample()
VOCAB = 262_208


def say(*words: object) -> None:
    print(f"[{time.monotonic() - STARTED:5.1f}]", *words, flush=True)


def pooling(images: int) -> Case:
    return Case(dtype="bfloat16", dims={"images": images, "side": 64, "pool": 4, "hidden": 1152})


def norm(images: int, residual: int) -> Case:
    return Case(dtype="bfloat16", dims={"rows": 4096 * images, "hidden": 1152, "residual": residual})


def embedding(dtype: str, tokens: int, hidden: int, features: int) -> Case:
    dims = {"tokens": tokens, "hidden": hidden, "vocab": VOCAB, "features": features, "zeros": int(dtype == "int4")}
    return Case(dtype=dtype, dims=dims)


def patches(images: int, dtype: str = "bfloat16", wide: int = 1) -> Case:
    return Case(dtype=dtype, dims={"images": images, "size": 896, "patch": 14, "hidden": 1152, "wide": wide})


def sampling(rows: int, **options: int) -> Case:
    plain = {"temperature": 100, "top_k": 0, "top_p": 100, "min_p": 0, "penalty": 100}
    return Case(dtype="float32", dims={"rows": rows, "vocab": VOCAB, **plain, **options})


RECOMMENDED = {"top_k": 64, "top_p": 95}
CHECKED: list[tuple[Kernel, Case]] = [
    (POOL, pooling(1)), (POOL, pooling(3)), (NORM, norm(1, 0)), (NORM, norm(3, 1)),
    *((EMBED, embedding(dtype, *shape)) for dtype in EMBED.dtypes for shape in ((1, 2560, 0), (3000, 3840, 256))),
    (PATCH, patches(1)), (PATCH, patches(2)), (PATCH, patches(1, wide=0)), (PATCH, patches(1, "float32")),
    *((SAMPLE, sampling(8, **options)) for options in (
        {"temperature": 0}, {}, RECOMMENDED, RECOMMENDED | {"penalty": 115}, {"top_k": 5000}, {"top_p": 90},
        {"top_p": 99, "temperature": 200}, {"min_p": 5}, {"top_k": 300_000, "top_p": 99}, {"temperature": 10},
    )),
]  # fmt: skip


def product(warps: Sequence[int], stages: Sequence[int], **constants: Sequence[int]) -> list[Config]:
    return [
        Config(constants=dict(zip(constants, values, strict=True)), num_warps=w, num_stages=s)
        for *values, w, s in itertools.product(*constants.values(), warps, stages)
    ]


SAMPLING = [
    Config(constants={"GROUP": g, "BLOCK": b, "CHUNK": c, "SEARCH": s, "PIVOTS": p}, num_warps=w, num_stages=1)
    for g, b, c, s, p, w in (
        (128, 4096, 4096, 512, 16, 8), (128, 4096, 4096, 256, 16, 16), (128, 2048, 2048, 256, 16, 8),
        (64, 4096, 4096, 256, 16, 8), (64, 2048, 2048, 256, 16, 8), (64, 4096, 4096, 256, 16, 16),
        (32, 4096, 4096, 128, 16, 8), (128, 4096, 2048, 256, 8, 8), (128, 4096, 2048, 128, 32, 8),
        (128, 4096, 1024, 256, 16, 4), (64, 2048, 2048, 128, 16, 4), (256, 4096, 4096, 256, 16, 8),
    )
]  # fmt: skip
TIMED: list[tuple[Kernel, Case, list[Config]]] = [
    (SAMPLE, sampling(1, **RECOMMENDED), SAMPLING),
    (SAMPLE, sampling(1, temperature=0), SAMPLING[:5]),
    (SAMPLE, sampling(1), []),
    (SAMPLE, sampling(1, **RECOMMENDED, penalty=115), []),
    (SAMPLE, sampling(1, top_p=90), SAMPLING[:2]),
    (SAMPLE, sampling(1, top_p=99, temperature=200), []),
    (SAMPLE, sampling(1, min_p=5), []),
    (SAMPLE, sampling(16, **RECOMMENDED), []),
    (SAMPLE, sampling(16, temperature=0), []),
    (PATCH, patches(1), [
        *product((4, 8), (2, 3), BLOCK_P=(64, 128), BLOCK_H=(64, 128), BLOCK_K=(32, 64)),
        *product((4,), (1, 2, 4), BLOCK_P=(32, 64), BLOCK_H=(128,), BLOCK_K=(16, 32)),
    ]),
    (NORM, norm(1, 1), product((1, 2, 4, 8), (1,), BLOCK_ROWS=(1, 2, 4))),
    (NORM, norm(1, 0), []),
    (POOL, pooling(1), product((4, 8, 16), (1,), BLOCK_PATCHES=(1, 4, 8, 16))),
    (EMBED, embedding("bfloat16", 1, 2560, 0), product((1, 4), (1,), BLOCK_H=(512, 4096))),
    (EMBED, embedding("int4", 1, 3840, 0), product((1, 4), (1,), BLOCK_H=(512, 4096))),
    (EMBED, embedding("bfloat16", 8192, 2560, 256), product((1, 2, 4, 8), (1,), BLOCK_H=(512, 1024, 4096))),
    (EMBED, embedding("bfloat16", 8192, 3840, 256), []),
    (EMBED, embedding("int8", 8192, 3840, 256), []),
    (EMBED, embedding("int4", 8192, 3840, 256), product((1, 4), (1,), BLOCK_H=(512, 4096))),
]  # fmt: skip


def torch_runs(kernel: Kernel, case: Case, t: Tensors) -> dict[str, Callable[[], object]]:
    """What one writes in torch for the same, by name."""
    if kernel is POOL:
        return {"torch": lambda: siglip_pool(t["x"], t["scale"], 4, 1e-6)}
    if kernel is NORM:
        x = t["x"]

        def normed(h: Tensor) -> Tensor:
            return F.layer_norm(h, (h.shape[1],), t["weight"], t["bias"], 1e-6)

        return {"torch": lambda: normed(t["h"].add_(x)) if "h" in t else normed(x)}
    if kernel is PATCH:
        weight, position = t["weight"], t["position"]
        last = weight.to(memory_format=torch.channels_last)

        def convolved(w: Tensor) -> Tensor:
            x = F.conv2d(t["pixels"].to(w.dtype), w, t["bias"], stride=14)
            return x.flatten(2).transpose(1, 2) + position

        return {"torch conv2d": lambda: convolved(weight), "channels last": lambda: convolved(last)}
    if kernel is EMBED:
        factor = multiplier(case.dims["hidden"], torch.bfloat16)
        if case.dtype != "bfloat16":
            return {}

        def looked_up() -> Tensor:
            y = F.embedding(t["ids"], t["table"]) * factor
            if case.dims["features"]:
                image = t["features"][t["feature_rows"].clamp(min=0)]
                y = torch.where((t["feature_rows"] >= 0)[:, None], image, y)
            return y

        return {"torch": looked_up}
    if case.dims["temperature"] == 0:
        return {"torch argmax": lambda: t["logits"].argmax(-1)}

    def drawn(weights: Tensor) -> Tensor:
        return (weights / torch.empty_like(weights).exponential_()).argmax(-1, keepdim=True)

    def sorted_draw() -> Tensor:
        if case.dims["top_k"]:
            x, ids = t["logits"].topk(case.dims["top_k"])
        else:
            x, ids = t["logits"].sort(descending=True)
        weights = torch.softmax(x / (case.dims["temperature"] / 100), -1)
        before = weights.cumsum(-1) - weights
        return ids.gather(1, drawn(torch.where(before < case.dims["top_p"] / 100, weights, 0.0)))

    return {"torch": sorted_draw}


def torch_us(run: Callable[[], object], calls: int = 20) -> float:
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    times = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) * 1e3 / calls)
    return statistics.median(times[1:])


def compile_first(gpu: Gpu) -> None:
    """Fills Triton's cache by many processes; what that misses is compiled when it is run."""
    jobs = [(kernel, case, kernel.default(case, gpu)) for kernel, case in CHECKED]
    for kernel, case, configs in TIMED:
        jobs += [(kernel, case, config) for config in [kernel.default(case, gpu), *configs]]
    launches = []
    for kernel, case, config in jobs:
        if kernel.refusal(case, config, gpu) is None:
            tensors = kernel.inputs(case, device="meta") | kernel.outputs(case, config, device="meta")
            launches += [(launch, gpu.architecture) for launch in kernel.launches(case, config, tensors)]
    with CompilerPool() as pool:
        failed = [error for error in pool.compile_all(launches) if isinstance(error, Exception)]
    say(f"compiled {len(launches)}, {len(failed)} refused", *failed[:2])


def correctness(gpu: Gpu) -> None:
    for kernel, case in CHECKED:
        try:
            inputs = kernel.inputs(case, device="cuda")
            results = compare(kernel, case, kernel.default(case, gpu), inputs)
            right, note = all(result.passed for result in results), ""
            if kernel is SAMPLE:
                apart = 0
                for seed in range(3):
                    inputs = kernel.inputs(case, device="cuda", seed=seed)
                    expected = kernel.oracle(case, inputs)["token"]
                    apart += int((kernel.run(case, kernel.default(case, gpu), inputs)["token"] != expected).sum())
                right, note = right and not apart, f"{apart} of {3 * case.dims['rows']} tokens differ"
            say("ok  " if right else "FAIL", kernel.name, case, note, *map(str, results))
        except Exception as error:  # noqa: BLE001 - the rest is worth running
            say("FAIL", kernel.name, case, type(error).__name__, str(error)[:500])
        torch.cuda.empty_cache()


def times(gpu: Gpu, kernel: Kernel, case: Case, configs: Sequence[Config]) -> None:
    cost = kernel.cost(case)
    found: list[tuple[float, Config]] = []
    for config in [kernel.default(case, gpu), *configs]:
        if kernel.refusal(case, config, gpu) or (found and time.monotonic() - STARTED > BUDGET_S):
            continue
        try:
            found.append((kernel_us(kernel, case, config, METER), config))
        except Exception as error:  # noqa: BLE001 - the others are worth timing
            say("    failed:", config, type(error).__name__, str(error)[:300])
    say(f"== {kernel.name} {case}: {cost.bytes / 1e6:.3f} MB, floor {cost.floor_s(gpu) * 1e6:.2f} us")
    if found:
        say(f"    default {found[0][0]:.2f} us, {cost.bytes / found[0][0] / 1e3:.0f} GB/s")
    for us, config in sorted(found, key=lambda pair: pair[0])[:4] if configs else []:
        right = all(result.passed for result in compare(kernel, case, config, kernel.inputs(case, device="cuda")))
        say(f"    {us:8.2f} us {cost.bytes / us / 1e3:6.0f} GB/s  {config}{'' if right else '  WRONG'}")
    try:
        for name, run in torch_runs(kernel, case, kernel.inputs(case, device="cuda")).items():
            say(f"    {torch_us(run):8.2f} us by {name}")
    except Exception as error:  # noqa: BLE001 - the next case is worth timing
        say("    torch failed:", type(error).__name__, str(error)[:300])
    torch.cuda.empty_cache()


def main() -> None:
    gpu = present()
    say(gpu.name, "torch", torch.__version__)
    compile_first(gpu)
    correctness(gpu)
    for kernel, case, configs in TIMED:
        times(gpu, kernel, case, configs)
    say("done")


if __name__ == "__main__":
    main()
