"""The build, as one readable line: checkpoint, formats, graphs, weights, manifest.

    with BundleWriter(out) as writer:
        formats  = choose_formats(checkpoint, dtype)
        graphs   = export, passes, lowering for each stage
        weights  = one safetensors file that every graph points into
        manifest = what the runtime must know, and what was done

An error or an interrupt anywhere in it leaves nothing behind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from gemma3_compile.blocks import Blocks, keeps_grid
from gemma3_compile.checkpoints import Checkpoint, check_tensors, open_checkpoint
from gemma3_compile.config import ModelConfig, TextConfig
from gemma3_compile.facts import model_facts, stage_facts
from gemma3_compile.formats import Dtype, choose_formats, default_activations, stored_dtype
from gemma3_compile.quantize.calibration import calibrate
from gemma3_compile.quantize.text import calibration_tokens
from gemma3_compile.stage_graphs import CompiledStage, compile_for_ort
from gemma3_compile.weights_writer import WeightsWriter, ledger
from graphs.onnx_lowering.context import Activations, OrtOptions
from graphs.onnx_lowering.lower import bind_weights
from graphs.weights import BlockFormat, WeightsPlan
from graphs.weights_file import WeightsFile, WeightsLayout
from runtimes.bundle_writer import BundleWriter, source_date
from runtimes.errors import UsageError
from runtimes.manifest import CacheFacts, Manifest, Scalar, TokenizerFacts, WeightFacts
from runtimes.peak_memory import peak_rss_bytes
from runtimes.progress import SILENT, Progress
from runtimes.tokenizer import Tokenizer
from runtimes.version import __version__

Rounding = Literal["calibrated", "nearest"]
PREFILL_CHUNK = 1024
"""Tokens of a prompt at a time: MatMulNBits unpacks its weights once for all of them."""
WEIGHTS, LEDGER, TOKENIZER = "weights.safetensors", "weights.json", "tokenizer.model"
_NOT_HASHED = "0" * 64
WRITING_BYTES = 225 * 2**20
"""What writing weights takes on top of the traced graphs: a chunk in fp32, its codes and what rounding needs."""


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What is to be built. ``context`` is only what a plan counts the caches for; a bundle takes any."""

    target: str
    out: Path
    size: str | None = None
    checkpoint: str | Path | None = None
    random_seed: int | None = None
    dtype: Dtype = "auto"
    activations: Activations | None = None
    """None takes the default of ``dtype``."""
    overwrite: bool = False
    context: int | None = None
    rounding: Rounding | None = None
    """How int4 is rounded. None calibrates, but for random weights, which no text tells anything of."""
    calibration: Path | None = None
    token: str | None = None
    offline: bool = False
    revision: str | None = None
    empty_weights: bool = False
    """Lays the weights file out but writes nothing into it: a hole of zeros, to time a build or look at its graphs.
    The hole is not hashed, so ``verify`` says that the weights are not what the manifest tells."""


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """What a build would take, in bytes, before anything is written."""

    size: str
    source: str
    weights_bytes: int
    context: int
    cache_bytes: int
    peak_bytes: int
    notes: tuple[str, ...]


def build(request: BuildRequest, progress: Progress = SILENT) -> Path:
    """Compiles a checkpoint into a bundle at ``request.out``; all of it is there afterwards, or nothing.

    Raises:
        UsageError, CheckpointError, ConfigError, ExportError, BundleError: as the message says.
    """
    _require_target(request.target)
    with _open(request) as checkpoint, BundleWriter(request.out, overwrite=request.overwrite) as writer:
        for warning in checkpoint.warnings:
            progress.note(warning)
        formats = choose_formats(checkpoint, request.dtype)
        options = OrtOptions(activations=request.activations or default_activations(request.dtype))
        compiled = compile_for_ort(checkpoint.config, formats, options, progress=progress)
        plan = WeightsPlan.merge(stage.lowered.stored for stage in compiled)
        layout = WeightsLayout(plan)
        if not request.empty_weights:
            writer.reserve(layout.size_bytes)
        graphs = _write_graphs(writer, compiled, layout)
        calibrated: frozenset[str] = frozenset()
        with WeightsFile(writer.path(WEIGHTS), layout) as file:
            if not request.empty_weights:
                rounded = _calibrated(request, checkpoint, formats, progress)
                weights = WeightsWriter(plan=plan, checkpoint=checkpoint, file=file, calibrated=rounded)
                calibrated = weights.write(progress)
        if request.empty_weights:
            writer.register(WEIGHTS, _NOT_HASHED, layout.size_bytes)
        _write_json(writer, LEDGER, ledger(plan, checkpoint, _describe(checkpoint, calibrated)))
        tokenizer = _write_tokenizer(writer, checkpoint, progress)
        manifest = _manifest(checkpoint, compiled, graphs, formats, request.dtype, options, tokenizer)
        return writer.finish(manifest, progress).root


def plan(request: BuildRequest) -> BuildPlan:
    """What ``build`` would write and take. Traces the graphs, reads no weights."""
    _require_target(request.target)
    with _open(request) as checkpoint:
        config = checkpoint.config
        formats = choose_formats(checkpoint, request.dtype)
        compiled = compile_for_ort(config, formats, OrtOptions())
        weights = WeightsLayout(WeightsPlan.merge(stage.lowered.stored for stage in compiled)).size_bytes
        context = request.context or config.text.max_context
        if context > config.text.max_context:
            raise UsageError(f"the context {context} is longer than the {config.text.max_context} of {config.name}")
        return BuildPlan(
            size=config.name,
            source=checkpoint.source,
            weights_bytes=weights,
            context=context,
            cache_bytes=cache_bytes(config.text, context),
            peak_bytes=(peak_rss_bytes() or 0) + WRITING_BYTES,
            notes=checkpoint.warnings,
        )


def window_slack(text: TextConfig) -> int:
    """Slots that a local layer gets beyond its window, so that a full cache moves its rows once in that many tokens."""
    return max(1, text.sliding_window // 16)


def cache_bytes(text: TextConfig, context: int) -> int:
    """Keys and values of one sequence in fp32: the window and its slack on local layers, ``context`` on global ones."""
    local = text.sliding_window + window_slack(text)
    slots = sum(local if kind == "local" else context for kind in text.layer_kinds)
    return slots * 2 * text.num_kv_heads * text.head_dim * 4


def _require_target(target: str) -> None:
    if target != "ort":
        raise UsageError(
            f"this version builds the target `ort`; `{target}` is not there yet", hint="leave out --target"
        )


def _open(request: BuildRequest) -> Checkpoint:
    checkpoint = open_checkpoint(
        request.checkpoint,
        size=request.size,
        random_seed=request.random_seed,
        token=request.token,
        offline=request.offline,
        revision=request.revision,
    )
    try:
        check_tensors(checkpoint)
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint


def _write_graphs(writer: BundleWriter, compiled: tuple[CompiledStage, ...], layout: WeightsLayout) -> dict[str, str]:
    """Saves each stage's ONNX file, its initializers pointing into the weights file; stage to file name."""
    graphs: dict[str, str] = {}
    for stage in compiled:
        name = f"{stage.stage.name}.onnx"
        bind_weights(stage.lowered, file=WEIGHTS, offsets=layout.offsets, folder=writer.folder)
        writer.path(name).write_bytes(ir.to_proto(stage.lowered.model).SerializeToString(deterministic=True))
        graphs[stage.stage.name] = name
    return graphs


def _calibrated(
    request: BuildRequest, checkpoint: Checkpoint, formats: Mapping[str, BlockFormat], progress: Progress
) -> Iterator[tuple[str, Blocks]]:
    """Four-bit weights of the decoder rounded by what the model does with them; nothing where that is not wanted."""
    rounding = request.rounding or ("calibrated" if request.random_seed is None else "nearest")
    if request.dtype != "int4" or rounding == "nearest":
        return
    model = checkpoint.tokenizer()
    if model is None:
        progress.note("without a tokenizer no text can be read, so int4 is rounded to nearest")
        return
    tokens = model_facts(checkpoint.config, None).tokens
    encode = Tokenizer.from_bytes(model, tokens).encode
    ids = calibration_tokens(encode, tokens.bos, request.calibration)
    decoder = {name: form for name, form in formats.items() if name.startswith("decoder.")}
    yield from calibrate(checkpoint, decoder, ids, progress)


def _describe(checkpoint: Checkpoint, calibrated: Container[str]) -> Callable[[str, BlockFormat], str]:
    """Names what a source went through on its way into a format."""

    def how(source: str, form: BlockFormat) -> str:
        if source in calibrated:
            return "rounded with calibration"
        if keeps_grid(checkpoint, source, form):
            grid = checkpoint.grid_info(source)
            assert grid is not None
            return f"the checkpoint's own {grid.kind} grid, exactly"
        return "rounded to nearest"

    return how


def _write_tokenizer(writer: BundleWriter, checkpoint: Checkpoint, progress: Progress) -> TokenizerFacts | None:
    model = checkpoint.tokenizer()
    if model is None:
        progress.note("the checkpoint has no SentencePiece model, so the bundle takes token ids only")
        return None
    writer.path(TOKENIZER).write_bytes(model)
    return TokenizerFacts(file=TOKENIZER)


def _manifest(
    checkpoint: Checkpoint,
    compiled: tuple[CompiledStage, ...],
    graphs: Mapping[str, str],
    formats: dict[str, BlockFormat],
    dtype: Dtype,
    options: OrtOptions,
    tokenizer: TokenizerFacts | None,
) -> Manifest:
    versions = {package: metadata.version(package) for package in ("torch", "onnx", "onnx-ir")}
    return Manifest(
        producer={"gemma3c": __version__, **versions, "checkpoint": checkpoint.source},
        created=source_date(),
        target="ort",
        model=model_facts(checkpoint.config, checkpoint.image_settings()),
        caches=CacheFacts(dtype="float32", local_layout="compact"),
        stages={s.stage.name: stage_facts(s.stage, graphs[s.stage.name]) for s in compiled},
        weights=WeightFacts(file=WEIGHTS, dtype=stored_dtype(formats, dtype), ledger=LEDGER),
        tokenizer=tokenizer,
        probes={s.stage.name: tuple(s.lowered.probes.values()) for s in compiled},
        settings=_settings(checkpoint.config, options, quantised=bool(formats)),
    )


def _settings(config: ModelConfig, options: OrtOptions, *, quantised: bool) -> dict[str, Scalar]:
    """What only this target's runtime reads; docs/runtime.md lists the keys."""
    settings: dict[str, Scalar] = {
        "image_in_place": True,
        "graph_optimization": "all",
        "window_slack": window_slack(config.text),
        "prefill_chunk": PREFILL_CHUNK,
    }
    return {**settings, "activations": options.activations} if quantised else settings


def _write_json(writer: BundleWriter, name: str, data: object) -> None:
    writer.path(name).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
