"""What a target adds to a build; the rest is the same for all (:mod:`gemma3_compile.pipeline`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gemma3_compile.build_request import Decision
from gemma3_compile.checkpoints import Checkpoint
from gemma3_compile.config import ModelConfig, TextConfig
from gemma3_compile.stage_graphs import CompiledStage
from graphs.weights import BlockFormat
from runtimes.bundle_writer import BundleWriter
from runtimes.manifest import CacheFacts, Scalar, WeightFacts
from runtimes.manifest import Target as TargetName
from runtimes.progress import SILENT, Progress

Formats = Mapping[str, BlockFormat]


@dataclass(frozen=True, kw_only=True)
class TargetFacts:
    """What a target says of itself in the manifest.

    Args:
        versions: packages that took part, besides those that make every graph.
        plans: for a stage, the file that was made from its graph.
    """

    target: TargetName
    caches: CacheFacts
    weights: WeightFacts
    settings: Mapping[str, Scalar]
    versions: Mapping[str, str] = field(default_factory=dict)
    plans: Mapping[str, str] = field(default_factory=dict)
    gpu_architectures: tuple[str, ...] = ()
    tuning_records: tuple[str, ...] = ()


class Target(ABC):
    """One build's target. Made from the request alone, it refuses at once what this host cannot build."""

    @abstractmethod
    def formats(self, checkpoint: Checkpoint) -> dict[str, BlockFormat]:
        """The block format of every tensor that is quantised, by canonical name."""

    def prepare(self, config: ModelConfig, writer: BundleWriter, progress: Progress) -> None:
        """Writes what the graphs refer to."""

    @abstractmethod
    def compile(self, config: ModelConfig, formats: Formats, progress: Progress = SILENT) -> tuple[CompiledStage, ...]:
        """The graphs."""

    def finish(
        self, config: ModelConfig, compiled: Sequence[CompiledStage], writer: BundleWriter, progress: Progress
    ) -> None:
        """Writes what is made of graphs and weights, which are written."""

    @abstractmethod
    def facts(self, config: ModelConfig, formats: Formats, *, weights: str, ledger: str) -> TargetFacts:
        """For the manifest; the last call. ``weights`` and ``ledger`` are names of files."""

    # --- a dry run ---

    @abstractmethod
    def context(self, config: ModelConfig) -> int:
        """How many tokens the caches are counted for; raises UsageError where the model has not so many."""

    @abstractmethod
    def cache_bytes(self, config: ModelConfig, context: int) -> int:
        """Keys and values of one sequence."""

    def peak_bytes(self, weights_bytes: int) -> int:
        """The most memory of processes of the target's own."""
        return 0

    def decisions(self) -> tuple[Decision, ...]:
        """What was left to the build."""
        return ()


def cache_numbers(text: TextConfig, *, local: int, context: int) -> int:
    """How many numbers the keys and values of one sequence are, with ``local`` slots on local layers."""
    slots = sum(local if kind == "local" else context for kind in text.layer_kinds)
    return slots * 2 * text.num_kv_heads * text.head_dim


def graph_name(stage: str) -> str:
    """The file of a stage's graph."""
    return f"{stage}.onnx"
