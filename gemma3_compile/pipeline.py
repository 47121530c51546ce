"""The build, as one readable line: checkpoint, formats, graphs, weights, what the target makes of them, manifest.

    target = what the request is for: ort, trt
    with BundleWriter(out) as writer:
        formats  = how each weight is stored
        graphs   = export, passes, lowering for each stage
        weights  = one safetensors file that every graph points into
        the target's own files (plans, for trt)
        manifest = what the runtime must know, and what was done

An error or an interrupt anywhere in it leaves nothing behind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import onnx_ir as ir

from gemma3_compile.blocks import Blocks, keeps_codes, keeps_grid
from gemma3_compile.build_request import BuildPlan, BuildRequest, Decision, Rounding
from gemma3_compile.checkpoints import Checkpoint, check_tensors, open_checkpoint
from gemma3_compile.facts import model_facts, stage_facts
from gemma3_compile.quantize.calibration import calibrate
from gemma3_compile.quantize.text import calibration_tokens
from gemma3_compile.stage_graphs import CompiledStage
from gemma3_compile.targets import TargetFacts, target_of
from gemma3_compile.targets.target import graph_name
from gemma3_compile.weights_writer import WeightsWriter, ledger
from graphs.onnx_lowering.lower import bind_weights
from graphs.weights import BlockFormat, WeightsPlan
from graphs.weights_file import WeightsFile, WeightsLayout
from runtimes.bundle_writer import BundleWriter, source_date
from runtimes.manifest import Manifest, TokenizerFacts
from runtimes.peak_memory import peak_rss_bytes
from runtimes.progress import SILENT, Progress
from runtimes.tokenizer import Tokenizer
from runtimes.version import __version__

__all__ = ["BuildPlan", "BuildRequest", "Decision", "Rounding", "build", "plan"]

WEIGHTS, LEDGER, TOKENIZER = "weights.safetensors", "weights.json", "tokenizer.model"
_NOT_HASHED = "0" * 64
WRITING_BYTES = 225 * 2**20
"""What writing weights takes on top of the traced graphs: a chunk in fp32, its codes and what rounding needs."""


def build(request: BuildRequest, progress: Progress = SILENT) -> Path:
    """Compiles a checkpoint into a bundle at ``request.out``; all of it is there afterwards, or nothing.

    Raises:
        UsageError, HostError, CheckpointError, ConfigError, ExportError, BundleError: as the message says.
    """
    target = target_of(request)
    with _open(request) as checkpoint, BundleWriter(request.out, overwrite=request.overwrite) as writer:
        for warning in checkpoint.warnings:
            progress.note(warning)
        config = checkpoint.config
        formats = target.formats(checkpoint)
        target.prepare(config, writer, progress)
        compiled = target.compile(config, formats, progress)
        weights = WeightsPlan.merge(stage.lowered.stored for stage in compiled)
        layout = WeightsLayout(weights)
        _write_graphs(writer, compiled, layout)
        calibrated = _write_weights(request, writer, checkpoint, weights, layout, formats, progress)
        _write_json(writer, LEDGER, ledger(weights, checkpoint, _describe(checkpoint, calibrated)))
        tokenizer = _write_tokenizer(writer, checkpoint, progress)
        target.finish(config, compiled, writer, progress)
        facts = target.facts(config, formats, weights=WEIGHTS, ledger=LEDGER)
        return writer.finish(_manifest(checkpoint, compiled, facts, tokenizer), progress).root


def plan(request: BuildRequest) -> BuildPlan:
    """What ``build`` would write and take. Traces the graphs, reads no weights."""
    target = target_of(request)
    with _open(request) as checkpoint:
        config = checkpoint.config
        context = target.context(config)
        compiled = target.compile(config, target.formats(checkpoint))
        weights = WeightsLayout(WeightsPlan.merge(stage.lowered.stored for stage in compiled)).size_bytes
        return BuildPlan(
            target=request.target,
            size=config.name,
            source=checkpoint.source,
            weights_bytes=weights,
            context=context,
            cache_bytes=target.cache_bytes(config, context),
            peak_bytes=(peak_rss_bytes() or 0) + max(WRITING_BYTES, target.peak_bytes(weights)),
            decisions=target.decisions(),
            notes=checkpoint.warnings,
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


def _write_graphs(writer: BundleWriter, compiled: Sequence[CompiledStage], layout: WeightsLayout) -> None:
    """Saves each stage's ONNX file, its initializers pointing into the weights file."""
    for stage in compiled:
        bind_weights(stage.lowered, file=WEIGHTS, offsets=layout.offsets, folder=writer.folder)
        proto = ir.to_proto(stage.lowered.model)
        writer.path(graph_name(stage.stage.name)).write_bytes(proto.SerializeToString(deterministic=True))


def _write_weights(
    request: BuildRequest,
    writer: BundleWriter,
    checkpoint: Checkpoint,
    plan: WeightsPlan,
    layout: WeightsLayout,
    formats: Mapping[str, BlockFormat],
    progress: Progress,
) -> frozenset[str]:
    """Writes the weights file, or leaves it a hole; the names that were rounded with calibration."""
    if request.empty_weights:
        with WeightsFile(writer.path(WEIGHTS), layout):
            writer.register(WEIGHTS, _NOT_HASHED, layout.size_bytes)
        return frozenset()
    writer.reserve(layout.size_bytes)
    with WeightsFile(writer.path(WEIGHTS), layout) as file:
        rounded = _calibrated(request, checkpoint, formats, progress)
        return WeightsWriter(plan=plan, checkpoint=checkpoint, file=file, calibrated=rounded).write(progress)


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
        if keeps_codes(checkpoint, source, form):
            grid = checkpoint.grid_info(source)
            assert grid is not None
            return f"the checkpoint's own {grid.kind} codes, scales rounded to {form.scales}"
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
    checkpoint: Checkpoint, compiled: Sequence[CompiledStage], facts: TargetFacts, tokenizer: TokenizerFacts | None
) -> Manifest:
    versions = {package: metadata.version(package) for package in ("torch", "onnx", "onnx-ir")}
    stages = {s.stage.name: stage_facts(s.stage, graph_name(s.stage.name)) for s in compiled}
    return Manifest(
        producer={"gemma3c": __version__, **versions, **facts.versions, "checkpoint": checkpoint.source},
        created=source_date(),
        target=facts.target,
        model=model_facts(checkpoint.config, checkpoint.image_settings()),
        caches=facts.caches,
        stages={name: replace(stage, plan=facts.plans.get(name)) for name, stage in stages.items()},
        weights=facts.weights,
        tokenizer=tokenizer,
        probes={s.stage.name: tuple(s.lowered.probes.values()) for s in compiled},
        settings=facts.settings,
        gpu_architectures=facts.gpu_architectures,
        tuning_records=facts.tuning_records,
    )


def _write_json(writer: BundleWriter, name: str, data: object) -> None:
    writer.path(name).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
