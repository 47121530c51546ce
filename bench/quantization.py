"""What quantisation costs: KL divergence and top-1 agreement with fp32 on the real 270M, against bytes of weights.

The reference is the eager model in fp32 over the checkpoint's own weights, dequantised. The text is 512 tokens each
of this repository's prose, code and licence, none of it in the text that int4 is calibrated on. llama.cpp reads the
very file whose grid ``kept grid`` keeps, so what it loses is lost in its arithmetic, and what we lose, in ours.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench import real_270m
from bench.record import BAR, IMAGES, ROOT, Row, finish, less_is_better, more_is_better, options
from gemma3_compile.numerics import Divergence, DivergenceMeter

TEXTS = ("docs/architecture.md", "runtimes/sampling.py", "LICENSE")
TOKENS, CHUNK = 512, 128
LLAMA = "llama.cpp Q4_K_M"
REFERENCE = "reference-logits.f32"

Tokens = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A build of ours; the bars hold for what ``--dtype`` gives unless told otherwise."""

    name: str
    dtype: str
    activations: str | None = None
    kl_bar: float | None = None
    top1_bar: float | None = None


VARIANTS = (
    Variant(name="float32", dtype="float32"),
    Variant(name="int8", dtype="int8", activations="int16", kl_bar=0.005, top1_bar=0.98),
    Variant(name="int8, int8 activations", dtype="int8", activations="int8"),
    Variant(name="kept grid", dtype="auto", activations="int16"),
    Variant(name="kept grid, int8 activations", dtype="auto", activations="int8"),
    Variant(name="int4", dtype="int4", activations="int8", kl_bar=0.13),
    Variant(name="int4, int16 activations", dtype="int4", activations="int16"),
)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A dot of the plot. ``name`` does without the activations."""

    name: str
    weights_bytes: int
    kl: float
    activations: str | None = None


def texts(limit: int) -> list[Tokens]:
    """The first tokens of each text, begun with <bos>."""
    from gemma3_compile.checkpoints import open_checkpoint
    from gemma3_compile.facts import model_facts
    from runtimes.tokenizer import Tokenizer

    with open_checkpoint(real_270m.gguf(), size="270m") as checkpoint:
        model = checkpoint.tokenizer()
        assert model is not None, "the GGUF file has a tokenizer"
        tokenizer = Tokenizer.from_bytes(model, model_facts(checkpoint.config, None).tokens)
    encoded = [tokenizer.encode((ROOT / name).read_text(encoding="utf-8"), bos=True)[:limit] for name in TEXTS]
    return [np.array(ids, dtype=np.int64) for ids in encoded]


def reference(sequences: list[Tokens]) -> Logits:
    """fp32 logits of every row [R, V], in a file that is mapped: they take 1 MB a row."""
    import torch

    from gemma3_compile.checkpoints import load_eager, open_checkpoint

    with open_checkpoint(real_270m.gguf(), size="270m") as checkpoint:
        decoder = load_eager(checkpoint).decoder
    shape = (sum(map(len, sequences)), checkpoint.config.text.vocab_size)
    logits_RV = np.memmap(real_270m.WORK / REFERENCE, np.float32, "w+", shape=shape)
    row = 0
    with torch.inference_mode():
        for ids in sequences:
            caches = decoder.empty_caches(1, len(ids))
            for start in range(0, len(ids), CHUNK):
                part = torch.from_numpy(ids[start : start + CHUNK])[None]
                length, rows = torch.tensor([part.shape[1]]), torch.arange(part.shape[1])[None]
                out_1SV, caches = decoder(part, torch.tensor([start]), length, rows, caches)
                logits_RV[row : row + part.shape[1]] = out_1SV[0].numpy()
                row += part.shape[1]
    return logits_RV


def divergence_of_bundle(bundle: Path, sequences: list[Tokens], expected_RV: Logits) -> Divergence:
    """Ours, in chunks through a session."""
    from runtimes.bundle import Bundle
    from runtimes.session import Chunk, open_session

    with open_session(Bundle.open(bundle), provider="cpu") as session:

        def evaluate(ids: Tokens) -> Callable[[int, int], Logits]:
            caches = session.open_caches(1, len(ids))

            def rows(start: int, stop: int) -> Logits:
                logits_RV = session.extend(caches, 0, Chunk(token_ids=ids[start:stop]), rows="all")
                assert logits_RV is not None
                return logits_RV

            return rows

        return _divergence(evaluate, sequences, expected_RV)


def divergence_of_llama(sequences: list[Tokens], expected_RV: Logits) -> Divergence:
    """llama.cpp on its own file."""
    import llama_cpp

    size = max(map(len, sequences))
    model = llama_cpp.Llama(str(real_270m.gguf()), n_ctx=size, n_batch=CHUNK, logits_all=True, verbose=False)

    def evaluate(ids: Tokens) -> Callable[[int, int], Logits]:
        model.reset()
        model.eval(ids.tolist())
        return lambda start, stop: model.scores[start:stop]

    return _divergence(evaluate, sequences, expected_RV)


def _divergence(
    evaluate: Callable[[Tokens], Callable[[int, int], Logits]], sequences: list[Tokens], expected_RV: Logits
) -> Divergence:
    meter, row = DivergenceMeter(), 0
    for ids in sequences:
        rows = evaluate(ids)
        for start in range(0, len(ids), CHUNK):
            stop = min(start + CHUNK, len(ids))
            meter.add(expected_RV[row : row + stop - start], rows(start, stop))
            row += stop - start
    return meter.result()


def gguf_weights_bytes() -> int:
    """Bytes of the tensors in the file, without tokenizer and header."""
    import gguf

    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(real_270m.gguf()).tensors)


def plot(points: list[Point], path: Path) -> None:
    """KL against bytes, both on logarithmic axes; hollow where activations are rounded to int8."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    labelled: dict[str, float] = {}
    for point in points:
        kl, size = max(point.kl, 1e-12), point.weights_bytes / 1e6
        color, marker = ("C3", "D") if point.name == LLAMA else ("C0", "o")
        fill = color if point.activations == "int16" or point.name == "float32" else "white"
        axes.plot(size, kl, marker, color=color, markerfacecolor=fill, markersize=8)
        if not 0.5 < labelled.get(point.name, 0.0) / kl < 2:  # two that lie on each other take one label
            left = point.name == "kept grid"
            place = {"xytext": (-8, -12) if left else (8, 4), "ha": "right" if left else "left"}
            axes.annotate(point.name, (size, kl), textcoords="offset points", fontsize=9, **place)
        labelled[point.name] = kl
    for words, fill in (("int16 activations, or fp32", "C0"), ("int8 activations", "white")):
        axes.plot([], [], "o", color="C0", markerfacecolor=fill, label=words)
    axes.legend(frameon=False)
    axes.set(xscale="log", yscale="log", xlabel="weights (MB)", ylabel="mean KL divergence from fp32 (nats)")
    axes.set_title(f"Gemma 3 270M, {TOKENS * len(TEXTS):,} tokens of prose, code and licence")
    axes.set(xlim=(130, 1800), ylim=(1e-12, 3))
    axes.set_xticks([150, 200, 300, 500, 1000], ["150", "200", "300", "500", "1000"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"drawn: {path.name}")


@dataclass(frozen=True, kw_only=True)
class Llama:
    """What llama.cpp came to, or why there is nothing."""

    found: Divergence | None
    weights_bytes: int
    missing: str | None


def llama(sequences: list[Tokens], expected_RV: Logits) -> Llama:
    """llama.cpp's figures, where it is installed."""
    size = gguf_weights_bytes()
    if find_spec("llama_cpp") is None:
        return Llama(found=None, weights_bytes=size, missing="llama_cpp is not installed: pip install -e .[bench]")
    return Llama(found=divergence_of_llama(sequences, expected_RV), weights_bytes=size, missing=None)


def rows_of(variant: Variant, found: Divergence, weights_bytes: int, peer: Llama) -> list[Row]:
    """KL and top-1 of one variant against its bars and against llama.cpp, and its bytes."""
    name, theirs, mb = variant.name, peer.found, weights_bytes / 1e6
    if variant.dtype == "float32":
        note = "the reference's own weights: what differs is the order of sums"
        return [
            Row(case=name, metric="mean KL", unit="nats", value=found.kl_mean, note=note),
            Row(case=name, metric="weights", unit="MB", value=mb, note=note),
        ]
    rows = [
        less_is_better(
            name, "mean KL", "nats", found.kl_mean, LLAMA, None if theirs is None else theirs.kl_mean, peer.missing
        ),
        more_is_better(
            name, "top-1 agreement", "share", found.top1, LLAMA, None if theirs is None else theirs.top1, peer.missing
        ),
        less_is_better(name, "weights", "MB", mb, LLAMA, peer.weights_bytes / 1e6, peer.missing),
    ]
    if variant.kl_bar is not None:
        rows.append(less_is_better(name, "mean KL", "nats", found.kl_mean, BAR, variant.kl_bar))
    if variant.top1_bar is not None:
        rows.append(more_is_better(name, "top-1 agreement", "share", found.top1, BAR, variant.top1_bar))
    return rows


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--reuse", action="store_true", help="take the bundles of an earlier run")
    given = parser.parse_args()
    sequences = texts(48 if given.quick else TOKENS)
    expected_RV = reference(sequences)
    peer = llama(sequences, expected_RV)
    points, rows = list[Point](), list[Row]()
    if peer.found is not None:
        points.append(Point(name=LLAMA, weights_bytes=peer.weights_bytes, kl=peer.found.kl_mean, activations="int8"))
    for variant in VARIANTS:
        bundle = real_270m.bundle(variant.dtype, activations=variant.activations, reuse=given.reuse)
        found = divergence_of_bundle(bundle, sequences, expected_RV)
        size = (bundle / "weights.safetensors").stat().st_size
        name = variant.name.partition(",")[0]
        points.append(Point(name=name, weights_bytes=size, kl=found.kl_mean, activations=variant.activations))
        rows += rows_of(variant, found, size, peer)
        print(f"{variant.name}: {found}", file=sys.stderr, flush=True)
    (real_270m.WORK / REFERENCE).unlink()
    if not given.quick:
        plot(points, IMAGES / "quantization.png")
    finish("quantization", rows, quick=given.quick)


if __name__ == "__main__":
    main()
