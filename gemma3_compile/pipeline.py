"""The build, as one readable line: checkpoint, formats, graphs, weights, manifest.

    with BundleWriter(out) as writer:
        formats  = choose_formats(checkpoint, dtype)
        graphs   = export, passes, lowering for each stage
        weights  = one safetensors file that every graph points into
        manifest = what the runtime must know, and what was done
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import onnx_ir as ir

from gemma3_compile.blocks import Blocks, keeps_grid
from gemma3_compile.checkpoints import Checkpoint, check_tensors, open_checkpoint
from gemma3_compile.facts import model_facts, stage_facts
from gemma3_compile.formats import Dtype, choose_formats, default_activations, stored_dtype
from gemma3_compile.stage_graphs import CompiledStage, compile_for_ort, stages_of
from gemma3_compile.weights_writer import WeightsWriter, ledger
from graphs.onnx_lowering.context import Activations, OrtOptions
from graphs.onnx_lowering.lower import bind_weights
from graphs.weights import BlockFormat, WeightsPlan
from graphs.weights_file import WeightsFile, WeightsLayout
from runtimes.bundle_writer import BundleWriter, source_date
from runtimes.errors import UsageError
from runtimes.manifest import CacheFacts, Manifest, TokenizerFacts, WeightFacts
from runtimes.progress import SILENT, Progress
from runtimes.version import __version__

WEIGHTS, LEDGER, TOKENIZER = "weights.safetensors", "weights.json", "tokenizer.model"
BUILD_OVERHEAD_BYTES = 900 * 2**20
"""What a build takes whatever the size: torch, the traced graphs and a few million weights at a time."""


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
    calibration: Path | None = None
    token: str | None = None
    offline: bool = False
    revision: str | None = None
    empty_weights: bool = False
    """Lays the weights file out but writes nothing into it: a hole of zeros, to time a build or look at its graphs."""


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
        calibrated = _calibrate(request, checkpoint, formats, progress)
        with WeightsFile(writer.path(WEIGHTS), layout) as file:
            if not request.empty_weights:
                WeightsWriter(plan=plan, checkpoint=checkpoint, file=file, calibrated=calibrated).write(progress)
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
            cache_bytes=cache_bytes(config.text.layer_kinds, config.text.sliding_window, context, 4)
            * 2 * config.text.num_kv_heads * config.text.head_dim,
            peak_bytes=_peak_rss_bytes() + BUILD_OVERHEAD_BYTES // 4,
            notes=checkpoint.warnings,
        )  # fmt: skip


def cache_bytes(kinds: tuple[str, ...], window: int, context: int, item_bytes: int) -> int:
    """Bytes of one head's keys for each unit of head size: W slots on local layers, ``context`` on global ones."""
    return sum(min(window, context) if kind == "local" else context for kind in kinds) * item_bytes


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
    graphs = {}
    for stage in compiled:
        name = f"{stage.stage.name}.onnx"
        bind_weights(stage.lowered, file=WEIGHTS, offsets=layout.offsets, folder=writer.folder)
        writer.path(name).write_bytes(ir.to_proto(stage.lowered.model).SerializeToString(deterministic=True))
        graphs[stage.stage.name] = name
    return graphs


def _calibrate(
    request: BuildRequest, checkpoint: Checkpoint, formats: Mapping[str, BlockFormat], progress: Progress
) -> dict[str, Blocks]:
    """Rows of int4 weights rounded by what the model does with them; nothing for other dtypes."""
    return {}


def _describe(checkpoint: Checkpoint, calibrated: Mapping[str, Blocks]):  # type: ignore[no-untyped-def]
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
    packages = ("torch", "onnx", "onnx-ir")
    return Manifest(
        producer={"gemma3c": __version__, **{p: metadata.version(p) for p in packages}, "checkpoint": checkpoint.source},
        created=source_date(),
        target="ort",
        model=model_facts(checkpoint.config, checkpoint.image_settings()),
        caches=CacheFacts(dtype="float32", local_layout="compact"),
        stages={s.stage.name: stage_facts(s.stage, graphs[s.stage.name]) for s in compiled},
        weights=WeightFacts(file=WEIGHTS, dtype=stored_dtype(formats, dtype), ledger=LEDGER),
        tokenizer=tokenizer,
        probes={s.stage.name: tuple(s.lowered.probes.values()) for s in compiled},
        settings={
            "image_in_place": True,
            "graph_optimization": "all",
            "window_slack": max(1, checkpoint.config.text.sliding_window // 16),
        }
        | ({"activations": options.activations} if formats else {}),
    )


def _write_json(writer: BundleWriter, name: str, data: object) -> None:
    writer.path(name).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
