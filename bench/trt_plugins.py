"""What a plugin's ``enqueue`` adds to the kernels that it launches: the same launches by Triton are the other side.

Both sides run the same configurations on the same tensors, in one process, over copies that do not fit the L2 cache.
In a CUDA graph no host takes part in either; without one, a call's time is what a stream of calls takes, and the host's
time what the caller waits before it may go on. TensorRT itself is not there: ``enqueue`` is called with the descriptors
and addresses that it would pass.

    python -m bench.trt_plugins                          on the GPU, about two minutes
    python -m bench.trt_plugins --commit 0123456789ab    where the checkout is a copy without its history
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autotune.ahead_of_time import CompilerPool
from autotune.gpu import Gpu, present
from autotune.kernel import Case, Config, Tensors
from autotune.kernels.cache_write import CacheWrite
from autotune.kernels.pool_norm import EPS, PoolNorm
from autotune.kernels.window_decode import WindowDecode
from autotune.kernels.window_prefill import WindowPrefill
from autotune.launch import Launch
from autotune.measurement import buffer_sets
from autotune.model_shapes import ModelShapes
from bench.record import Row, finish, less_is_better, options, with_gpu
from gemma3_compile.model_shapes import model_shapes
from gemma3_compile.presets import preset
from graphs.trt.kernels import write_kernels
from runtimes.gpu.expression import Values
from runtimes.gpu.kernel_store import KernelStore
from tests.runtimes.trt.driving import drive, pool_plugin, window_call

PEER = "the same launches by Triton"
BATCH, CHUNK = 4, 2048
CALLS = 64
"""In a graph, at least."""
APART = 0.01
"""Of the largest output: one rounding to bf16, where integers that vary are compiled otherwise."""
Run = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Sides:
    """A case: one call of each side for every copy of its tensors."""

    name: str
    plugin: list[Run]
    bare: list[Run]
    check: Callable[[], tuple[Tensor, Tensor]]
    """What each side makes of the same input."""


def _chunk(model: ModelShapes, *, chunk: int, start: int, batch: int, images: int) -> Case:
    dims = {"batch": batch, "chunk": chunk, "start": start, "heads": model.heads, "kv_heads": model.kv_heads}
    dims |= {"head_dim": model.head_dim, "window": model.window, "images": images, "ragged": 0}
    return Case(dtype="bfloat16", dims=dims)


def _config(store: KernelStore, name: str, values: Values) -> Config:
    """The one that the bundle's variant was compiled with."""
    found = dict(store.bind(name, values).variant.tuning.config)
    warps, stages = found.pop("num_warps"), found.pop("num_stages")
    return Config(constants=found, num_warps=warps, num_stages=stages)


def _bare_window(store: KernelStore, model: ModelShapes, tensors: Tensors) -> tuple[list[Launch], Tensor]:
    """The launches of one call, and what they write their output into."""
    q = tensors["q"]
    batch, chunk = q.shape[:2]
    values: Values = {"B": batch, "S": chunk, "scale": model.query_pre_attn_scalar**-0.5}
    rows = {"batch": batch, "tokens": chunk, "kv_heads": model.kv_heads, "head_dim": model.head_dim}
    write = CacheWrite().launches(
        Case(dtype="bfloat16", dims=rows | {"window": model.window}), _config(store, "cache_write", values), tensors
    )
    if chunk > 1:
        launches, out = _prefill(store, model, tensors, values)
        return [*launches, *write], out
    heads = {"batch": batch, "heads": model.heads, "kv_heads": model.kv_heads, "head_dim": model.head_dim}
    heads |= {"slots": model.window, "keys": model.window, "scale_dim": model.query_pre_attn_scalar}
    case, config = Case(dtype="bfloat16", dims=heads), _config(store, "window_decode", values)
    written = WindowDecode().outputs(case, config, device=q.device)
    given = {name: tensors[name] for name in ("q", "k_cache", "v_cache")} | {"position": tensors["newest"]}
    return [*write, *WindowDecode().launches(case, config, given | written)], written["out"]


def _prefill(store: KernelStore, model: ModelShapes, tensors: Tensors, values: Values) -> tuple[list[Launch], Tensor]:
    """The attention alone; the case's own scale is that of the head's size, which is not every model's."""
    out = torch.empty_like(tensors["q"])
    config = _config(store, "window_prefill", values)
    return [WindowPrefill().launch(config, tensors | {"out": out}, float(values["scale"]))], out


def _inputs(model: ModelShapes, case: Case, device: str) -> Tensors:
    """What a call is given. The plan of a model with pictures reads every row's end, for a text too."""
    inputs = WindowPrefill().inputs(case, device=device)
    if model.vision is not None and "visible_end" not in inputs:
        ends_S = torch.arange(1, case.dims["chunk"] + 1, dtype=torch.int32, device=device)
        inputs["visible_end"] = ends_S.expand(case.dims["batch"], -1).contiguous()
    return inputs | {"newest": inputs["start"] + inputs["length"] - 1}


def _precompile(store: KernelStore, model: ModelShapes, cases: Sequence[Case], gpu: Gpu) -> None:
    """Puts the bare launches into Triton's cache, on all cores at once; what is refused is told when it is run."""
    launches = [each for case in cases for each in _bare_window(store, model, _inputs(model, case, "meta"))[0]]
    with CompilerPool() as pool:
        pool.compile_all([(launch, gpu.architecture) for launch in launches])


def _running(launches: Sequence[Launch]) -> Run:
    def run() -> None:
        for launch in launches:
            launch.run()

    return run


def window_sides(name: str, store: KernelStore, model: ModelShapes, case: Case, gpu: Gpu) -> Sides:
    """``case``: of a chunk; one token for decode."""
    inputs = _inputs(model, case, "cuda")
    scale = model.query_pre_attn_scalar**-0.5
    copies = _copies(inputs, gpu)

    def check() -> tuple[Tensor, Tensor]:
        # Rings are written in place: each side has its own.
        ours, theirs = ({key: tensor.clone() for key, tensor in inputs.items()} for _ in range(2))
        call = window_call(store, ours, scale)
        call.enqueue()
        launches, out = _bare_window(store, model, theirs)
        _running(launches)()
        return call.outputs[0], out

    return Sides(
        name=name,
        plugin=[window_call(store, tensors, scale).enqueue for tensors in copies],
        bare=[_running(_bare_window(store, model, tensors)[0]) for tensors in copies],
        check=check,
    )


def pool_sides(name: str, store: KernelStore, model: ModelShapes, images: int, gpu: Gpu) -> Sides:
    kernel = PoolNorm()
    (use,) = kernel.uses(model, "vision", batch=images, context=0, dtype="bfloat16")
    config = _config(store, "siglip_pool", {"N": images, "eps": EPS})
    copies = _copies(kernel.inputs(use.case, device="cuda"), gpu)
    driven, bare, written = [], [], []
    for tensors in copies:
        theirs = kernel.outputs(use.case, config, device="cuda")
        inputs = [tensors["x"], tensors["scale"]]
        driven.append(drive(pool_plugin(store, use.case.dims["pool"], EPS), inputs, [torch.empty_like(theirs["y"])]))
        bare.append(_running(kernel.launches(use.case, config, tensors | theirs)))
        written.append(theirs["y"])

    def check() -> tuple[Tensor, Tensor]:
        driven[0].enqueue()
        bare[0]()
        return driven[0].outputs[0], written[0]

    return Sides(name=name, plugin=[call.enqueue for call in driven], bare=bare, check=check)


def _copies(inputs: Tensors, gpu: Gpu) -> list[Tensors]:
    size = sum(tensor.numel() * tensor.itemsize for tensor in inputs.values())
    count = min(buffer_sets(size, gpu.l2_bytes, torch.cuda.mem_get_info()[0]), 32)
    return [inputs] + [{name: tensor.clone() for name, tensor in inputs.items()} for _ in range(count - 1)]


# --- times ---


def graph_us(calls: Sequence[Run], repeats: int) -> float:
    """The median time of a call in a CUDA graph."""
    rounds = max(1, -(-CALLS // len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in list(calls) * rounds:
            call()
    times: list[float] = []
    for _ in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / (rounds * len(calls)))
    return statistics.median(times[2:])


def stream_us(calls: Sequence[Run], repeats: int) -> tuple[float, float]:
    """Without a graph: the median time of a call in a stream of them, and of the host until a call returns."""
    rounds = max(1, -(-CALLS // len(calls)))
    whole, host = [], []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for call in list(calls) * rounds:
            call()
        returned = time.perf_counter()
        torch.cuda.synchronize()
        whole.append(1e6 * (time.perf_counter() - began) / (rounds * len(calls)))
        host.append(1e6 * (returned - began) / (rounds * len(calls)))
    return statistics.median(whole[2:]), statistics.median(host[2:])


def rows_of(sides: Sides, repeats: int) -> list[Row]:
    """Runs both sides once, compares what they wrote, then times them in turn."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        found, wanted = (tensor.double() for tensor in sides.check())
        apart = float((found - wanted).abs().max() / wanted.abs().max())
        if not apart <= APART:
            raise AssertionError(f"{sides.name}: enqueue and the bare kernels are {apart:.2%} apart")
        for call in (*sides.plugin, *sides.bare):
            call()
        torch.cuda.synchronize()
        graphs = [[graph_us(calls, repeats) for calls in (sides.plugin, sides.bare)] for _ in range(3)]
        streams = [[stream_us(calls, repeats) for calls in (sides.plugin, sides.bare)] for _ in range(3)]
    ours, theirs = (statistics.median(column) for column in zip(*graphs, strict=True))
    rows = [less_is_better(sides.name, "a call in a CUDA graph", "µs", ours, PEER, theirs)]
    for which, metric in enumerate(("a call without a graph", "the host's part of a call without a graph")):
        ours, theirs = (statistics.median(pair[which] for pair in column) for column in zip(*streams, strict=True))
        rows.append(less_is_better(sides.name, metric, "µs", ours, PEER, theirs))
    return rows


def images_row(name: str, store: KernelStore, model: ModelShapes, gpu: Gpu, repeats: int) -> Row:
    """What it costs a chunk of text that the kernel reads each row's end from memory."""
    case = _chunk(model, chunk=CHUNK, start=4 * CHUNK, batch=1, images=0)
    copies = _copies(WindowPrefill().inputs(case, device="cuda"), gpu)
    ends = torch.arange(1, CHUNK + 1, dtype=torch.int32, device="cuda")[None].contiguous()
    values: Values = {"B": 1, "S": CHUNK, "scale": model.query_pre_attn_scalar**-0.5}
    sides = []
    for more in ({"visible_end": ends}, {}):
        launches = [_prefill(store, model, tensors | more, values)[0] for tensors in copies]
        runs = [_running(each) for each in launches]
        for run in runs:
            run()
        torch.cuda.synchronize()
        sides.append(runs)
    times = [[graph_us(runs, repeats) for runs in sides] for _ in range(3)]
    with_ends, without = (statistics.median(column) for column in zip(*times, strict=True))
    peer = "a kernel for text alone"
    return less_is_better(name, "attention with each row's end from memory", "µs", with_ends, peer, without)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--commit", help="the commit that is measured, where the checkout has no history")
    given = parser.parse_args()
    repeats = 3 if given.quick else 15
    gpu = present()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for size in ("4b", "12b", "27b"):
            model = model_shapes(preset(size))
            began = time.monotonic()
            path = Path(folder) / size
            path.mkdir()
            write_kernels(path, model, [gpu.architecture], max_batch=BATCH, chunk=CHUNK)
            store = KernelStore.open(path)
            _precompile(store, model, list(_cases(model).values()), gpu)
            print(f"{size}: kernels compiled in {time.monotonic() - began:.1f} s", flush=True)
            for found in _sides(size, store, model, gpu):
                measured = rows_of(found(), repeats)
                rows += measured
                torch.cuda.empty_cache()
                print(
                    f"{measured[0].case}: " + ", ".join(f"{r.value:.2f} / {r.peer_value:.2f} µs" for r in measured),
                    flush=True,
                )
            rows.append(images_row(f"{size} prefill, {CHUNK} tokens of text", store, model, gpu, repeats))
            print(f"{rows[-1].case}: {rows[-1].value:.1f} / {rows[-1].peer_value:.1f} µs", flush=True)
    finish(with_gpu("trt-plugins", gpu.name), rows, quick=given.quick, measured=given.commit)


def _cases(model: ModelShapes) -> dict[str, Case]:
    return {
        "decode, 1 sequence": _chunk(model, chunk=1, start=5000, batch=1, images=0),
        f"decode, {BATCH} sequences": _chunk(model, chunk=1, start=5000, batch=BATCH, images=0),
        "prefill, 256 tokens of text": _chunk(model, chunk=256, start=5000, batch=1, images=0),
        f"prefill, {CHUNK} tokens of text": _chunk(model, chunk=CHUNK, start=5000, batch=1, images=0),
        f"prefill, {CHUNK} tokens with 2 pictures": _chunk(model, chunk=CHUNK, start=5000, batch=1, images=2),
    }


def _sides(size: str, store: KernelStore, model: ModelShapes, gpu: Gpu) -> list[Callable[[], Sides]]:
    """Made one at a time: each holds memory."""

    def window(name: str, case: Case) -> Callable[[], Sides]:
        return lambda: window_sides(f"{size} {name}", store, model, case, gpu)

    made = [window(name, case) for name, case in _cases(model).items()]
    if size == "4b":
        made.append(lambda: pool_sides("pooling, 1 picture", store, model, 1, gpu))
    return made


if __name__ == "__main__":
    main()
