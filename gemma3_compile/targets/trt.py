"""TensorRT: kernels, graphs that name them, and a plan for each graph."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata, util
from typing import TYPE_CHECKING, cast

from gemma3_compile.build_request import BuildRequest, Decision, only_for
from gemma3_compile.checkpoints import Checkpoint
from gemma3_compile.config import ModelConfig
from gemma3_compile.doctor import nvidia_gpus
from gemma3_compile.formats import TrtDtype, trt_formats
from gemma3_compile.model_shapes import model_shapes
from gemma3_compile.stage_graphs import CompiledStage, compile_for_trt
from gemma3_compile.targets.target import Formats, Target, TargetFacts, cache_numbers, graph_name
from gemma3_compile.targets.trt_host import Host, PresentGpu, choose
from gemma3_compile.targets.trt_weights import builder_bytes, choose_weights, host_memory_bytes, stored_bytes
from graphs.onnx_lowering.context import TrtOptions, WeightSource
from graphs.trt.build import PlanRequest, build_plan
from graphs.trt.profiles import MAX_IMAGES, PlanSizes, Profile, decoder_profiles, vision_profiles
from graphs.trt.report import BuiltPlan
from graphs.weights import BlockFormat
from runtimes import records
from runtimes.bundle_writer import BundleWriter
from runtimes.errors import HostError, UsageError
from runtimes.manifest import CacheFacts, Scalar, WeightFacts
from runtimes.progress import SILENT, Progress
from runtimes.trt.binding import MODULES, installed

if TYPE_CHECKING:  # what it imports needs triton, which building for other targets does not
    from graphs.trt.kernels import KernelsFacts

PLANS = "plans.json"
CONTEXT, CHUNK = 8192, 2048
"""Defaults, where the model goes so far. Caches of global layers are as long as the context from the start."""


class TrtTarget(Target):
    """Plans of TensorRT, of the flavour that serves the architectures."""

    def __init__(self, request: BuildRequest) -> None:
        message = only_for("ort", {"activations": request.activations})
        if message is not None:
            raise UsageError(message, hint="leave that out: TensorRT computes in bfloat16")
        self._request = request
        self._dtype = cast(TrtDtype, request.dtype)  # `formats` refuses what it is not
        host = this_host()
        self._choice = choose(host, flavour=request.flavour, architectures=request.architectures, dtype=self._dtype)
        self._weights: WeightSource = "input"
        self._weights_decision: Decision
        self._kernels: KernelsFacts | None = None
        self._built: dict[str, BuiltPlan] = {}

    def formats(self, checkpoint: Checkpoint) -> dict[str, BlockFormat]:
        """Also decides where the weights are, which some formats depend on."""
        names = checkpoint.names()
        self._weights, self._weights_decision = choose_weights(
            self._request.weights,
            dtype=self._dtype,
            weights_bytes=stored_bytes(checkpoint, trt_formats(names, self._dtype, "constant")),
            memory_bytes=host_memory_bytes(),
        )
        return trt_formats(names, self._dtype, self._weights)

    def sizes(self, config: ModelConfig) -> PlanSizes:
        """What the plans take at most."""
        context = self.context(config)
        chunk = self._request.chunk or min(CHUNK, context)
        if chunk > context:
            raise UsageError(
                f"a chunk of {chunk} tokens does not go into a context of {context}",
                hint="raise --context or lower --chunk",
            )
        if config.vision is not None and chunk < config.vision.tokens_per_image:
            raise UsageError(
                f"a chunk of {chunk} tokens does not hold a picture, which is {config.vision.tokens_per_image} tokens",
                hint="raise --chunk",
            )
        return PlanSizes(batch=self._request.batch or 1, chunk=chunk, images=MAX_IMAGES)

    def prepare(self, config: ModelConfig, writer: BundleWriter, progress: Progress) -> None:
        if util.find_spec("triton") is None:
            raise HostError(
                "the kernels of a bundle for TensorRT are compiled by triton, which is not installed",
                hint="pip install 'gemma3-compile[tune]', which holds triton; whoever runs the bundle needs none",
            )
        from graphs.trt.kernels import write_kernels

        sizes = self.sizes(config)
        self._kernels = write_kernels(
            writer.folder,
            model_shapes(config),
            self._choice.architectures,
            max_batch=sizes.batch,
            chunk=sizes.chunk,
            max_images=sizes.images,
            progress=progress,
        )
        for warning in self._kernels.warnings:
            progress.note(warning)

    def compile(self, config: ModelConfig, formats: Formats, progress: Progress = SILENT) -> tuple[CompiledStage, ...]:
        self.sizes(config)  # refuses what does not go together, in a dry run too
        options = TrtOptions(context=self.context(config), weights=self._weights)
        if self._kernels is not None:
            options = replace(options, kernels_hash=self._kernels.hash)
        return compile_for_trt(config, formats, options, progress=progress)

    def finish(
        self, config: ModelConfig, compiled: Sequence[CompiledStage], writer: BundleWriter, progress: Progress
    ) -> None:
        sizes = self.sizes(config)
        if self._weights == "constant":
            writer.reserve(sum(entry.size_bytes for stage in compiled for entry in stage.lowered.stored))
        with progress.task("building plans", total=len(compiled), unit="steps") as advance:
            for stage in compiled:
                name = stage.stage.name
                self._built[name] = build_plan(writer.folder, self._plan_request(name, profiles_of(name, sizes)))
                advance(1)
        if not all(built.fixed_addresses for built in self._built.values()):
            progress.note(
                "this system draws the addresses of memory at random, so that an equal build may have other plans"
            )
        reports = {name: records.to_json(built.report) for name, built in self._built.items()}
        writer.path(PLANS).write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")

    def facts(self, config: ModelConfig, formats: Formats, *, weights: str, ledger: str) -> TargetFacts:
        assert self._kernels is not None and self._built, "the plans are built before the manifest is written"
        report = self._built["decoder"].report
        sizes = self.sizes(config)
        settings: dict[str, Scalar] = {
            "flavour": self._choice.flavour,
            "tensorrt_version": report.tensorrt_version,
            "weights": self._weights,
            "prefill_chunk": sizes.chunk,
            "max_batch": sizes.batch,
            "max_context": self.context(config),
            "kernels": self._kernels.file,
        }
        if config.vision is not None:
            settings["max_images"] = sizes.images
        stored = "bfloat16" if self._dtype == "auto" else self._dtype
        return TargetFacts(
            target="trt",
            caches=CacheFacts(dtype="bfloat16", local_layout="ring"),
            weights=WeightFacts(file=weights, dtype=stored, ledger=ledger),
            settings=settings,
            versions={
                MODULES[self._choice.flavour].replace("_", "-"): report.tensorrt_version,
                "triton": metadata.version("triton"),
            },
            plans={name: plan_name(name) for name in self._built},
            gpu_architectures=report.architectures,
            tuning_records=self._kernels.tuning_records,
        )

    def context(self, config: ModelConfig) -> int:
        longest = config.text.max_context
        context = self._request.context or min(longest, CONTEXT)
        if context > longest:
            raise UsageError(
                f"the context {context} is longer than the {longest} of {config.name}", hint="lower --context"
            )
        return context

    def cache_bytes(self, config: ModelConfig, context: int) -> int:
        return cache_numbers(config.text, local=config.text.sliding_window, context=context) * 2

    def peak_bytes(self, weights_bytes: int) -> int:
        return builder_bytes(self._weights, self._dtype, weights_bytes)

    def decisions(self) -> tuple[Decision, ...]:
        return (*self._choice.decisions, self._weights_decision)

    def _plan_request(self, name: str, profiles: tuple[Profile, ...]) -> PlanRequest:
        return PlanRequest(
            onnx=graph_name(name),
            plan=plan_name(name),
            flavour=self._choice.flavour,
            architectures=self._choice.architectures,
            profiles=profiles,
        )


def plan_name(stage: str) -> str:
    """The file of a stage's plan."""
    return f"{stage}.plan"


def profiles_of(stage: str, sizes: PlanSizes) -> tuple[Profile, ...]:
    """The profiles of a stage's plan."""
    return vision_profiles(sizes) if stage == "vision" else decoder_profiles(sizes)


def this_host() -> Host:
    """TensorRT and GPUs as they are here."""
    gpus = [PresentGpu(name=gpu.name, architecture=10 * gpu.capability[0] + gpu.capability[1]) for gpu in nvidia_gpus()]
    return Host(installed=tuple(flavour for flavour in MODULES if installed(flavour)), gpus=gpus)
