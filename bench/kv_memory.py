"""Memory of the key and value caches against context, beside a model whose layers were all global.

Five of six layers of Gemma 3 keep a window only: section 5.2 of its report (arXiv 2503.19786) says what that saves.
Caches are fp32, one sequence. Every figure is of buffers that were really opened (the system gives pages as they are
written, so a cache larger than the memory can be opened too), and tracemalloc must have seen as many bytes.
nano and the 270M are opened through sessions of real bundles besides, which must agree.
"""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path

from bench import real_270m
from bench.record import IMAGES, Row, finish, less_is_better, options
from gemma3_compile.facts import model_facts
from gemma3_compile.pipeline import BuildRequest, build
from gemma3_compile.presets import PRESETS
from gemma3_compile.targets.ort import window_slack
from runtimes.bundle import Bundle
from runtimes.manifest import Manifest
from runtimes.ort_caches import OrtCaches
from runtimes.session import open_session

ALL_GLOBAL = "all layers global"
MIB = 2**20
SHORTEST, LONGEST = 4096, 131072


def contexts(size: str) -> list[int]:
    """4k to 128k as far as the model goes; nano, which ends at 512, from 128."""
    limit = PRESETS[size].text.max_context
    first = min(SHORTEST, limit // 4)
    return [first << power for power in range(16) if first << power <= min(limit, LONGEST)]


def manifest_of(size: str, built: Manifest) -> Manifest:
    """What a bundle of ``size`` says of its caches, by way of the manifest of one that was built."""
    config = PRESETS[size]
    settings = {**built.settings, "window_slack": window_slack(config.text)}
    return dataclasses.replace(built, model=model_facts(config, None), settings=settings)


def all_global(manifest: Manifest) -> Manifest:
    """The same model with no windows."""
    layers = tuple(dataclasses.replace(layer, kind="global", window=None) for layer in manifest.model.layers)
    return dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, layers=layers))


def opened_bytes(manifest: Manifest, context: int) -> int:
    """Opens caches for one sequence and returns their bytes, which must be what was really allocated."""
    before, _ = tracemalloc.get_traced_memory()
    caches = OrtCaches(manifest, batch=1, context=context, provider="cpu")
    allocated = tracemalloc.get_traced_memory()[0] - before
    overhead = 4096 * len(caches.buffers)  # alignment, and Python's own objects
    assert 0 <= allocated - caches.bytes_allocated < overhead, (allocated, caches.bytes_allocated)
    return caches.bytes_allocated


def session_bytes(bundle: Path, context: int) -> int:
    """The same through a session, as an engine opens them."""
    with open_session(Bundle.open(bundle), provider="cpu") as session:
        return session.open_caches(1, context).bytes_allocated


def _check_sessions(sizes: dict[str, Path], built: Manifest) -> None:
    for size, bundle in sizes.items():
        for context in contexts(size):
            real, expected = session_bytes(bundle, context), opened_bytes(manifest_of(size, built), context)
            assert real == expected, f"{size} at {context}: a session opens {real} bytes, but {expected} were expected"


def plot(figures: dict[str, list[tuple[int, int, int]]], path: Path) -> None:
    """Bytes against context, and what the windows save; ``figures``: (context, ours, all global) by size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for number, (size, rows) in enumerate(figures.items()):
        color = f"C{number}"
        at = [row[0] for row in rows]
        left.plot(at, [row[1] / 2**30 for row in rows], "o-", color=color, label=size, markersize=4)
        left.plot(at, [row[2] / 2**30 for row in rows], "--", color=color, linewidth=1)
        right.plot(at, [row[2] / row[1] for row in rows], "o-", color=color, label=size, markersize=4)
    left.plot([], [], "--", color="gray", linewidth=1, label=ALL_GLOBAL)
    left.set(yscale="log", ylabel="keys and values, fp32 (GiB)", title="Cache of one sequence")
    left.yaxis.set_major_formatter("{x:g}")
    right.set(ylabel="times smaller", title="Saved by local layers", ylim=(1, None))
    ticks = sorted({row[0] for rows in figures.values() for row in rows})
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick // 1024}k" for tick in ticks])
        axes.set_xlabel("context (tokens)")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"drawn: {path.name}")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--reuse", action="store_true", help="take the bundles of an earlier run")
    given = parser.parse_args()
    nano = build(BuildRequest(target="ort", out=real_270m.WORK / "nano", size="nano", random_seed=0, overwrite=True))
    built = Bundle.open(nano).manifest
    tracemalloc.start()
    _check_sessions({"nano": nano, "270m": real_270m.bundle("auto", reuse=given.reuse or given.quick)}, built)
    rows, figures = [], dict[str, list[tuple[int, int, int]]]()
    for size in PRESETS:
        manifest = manifest_of(size, built)
        for context in contexts(size):
            ours, theirs = opened_bytes(manifest, context), opened_bytes(all_global(manifest), context)
            rows.append(less_is_better(f"{size}, {context} tokens", "keys and values", "MiB", ours / MIB, ALL_GLOBAL, theirs / MIB))  # fmt: skip
            if size != "nano":
                figures.setdefault(size, []).append((context, ours, theirs))
    plot(figures, IMAGES / "kv-cache.png")
    finish("kv_memory", list[Row](rows), quick=given.quick)


if __name__ == "__main__":
    main()
