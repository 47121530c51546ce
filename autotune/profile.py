"""What a step of a model takes, kernel by kernel, against the least that the GPU could take.

The floor of a kernel is the larger of its bytes over the memory's rate and its operations over the matrix units'
rate; the floor of a step is the sum over its kernels. Without a measurement the profile is that floor alone.

Source: Roofline (Williams, Waterman, Patterson, CACM 52(4), 2009).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, get_args

import torch

from autotune.ahead_of_time import CompilerPool
from autotune.ceilings import Ceilings
from autotune.gpu import Gpu
from autotune.kernel import Case, Config, Cost, Kernel, Stage, Use
from autotune.launch import Launch
from autotune.measurement import kernel_us
from autotune.model_shapes import ModelShapes
from autotune.record_store import Choice, RecordStore
from runtimes.errors import Gemma3CompileError, HostError, UsageError
from runtimes.progress import SILENT, Progress

STAGES: tuple[Stage, ...] = get_args(Stage)
LONGEST_CHUNK = 8192
"""Tokens of a prefill step at most: a longer prompt takes several steps."""
Measure = Callable[[Kernel, Case, Config], float]
"""The time of a kernel on a case with a configuration, in microseconds; raises a Gemma3CompileError where it fails."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A use of a kernel in a step: figures of one call, and ``count`` calls a step.

    Args:
        memory_us, compute_us: the floor's two terms; the larger is the floor.
        time_us: None where nothing was measured; ``failure`` says why if it was tried.
    """

    use: Use
    kernel: str
    choice: Choice
    cost: Cost
    memory_us: float
    compute_us: float
    time_us: float | None
    failure: str | None = None

    @property
    def floor_us(self) -> float:
        return max(self.memory_us, self.compute_us)

    @property
    def step_floor_us(self) -> float:
        return self.use.count * self.floor_us

    @property
    def step_time_us(self) -> float | None:
        return None if self.time_us is None else self.use.count * self.time_us

    @property
    def lost_us(self) -> float | None:
        """What a step loses here: time less floor."""
        return None if self.time_us is None else self.use.count * (self.time_us - self.floor_us)

    @property
    def roofline(self) -> float | None:
        """The share of the floor that is reached, 1 at the best."""
        return None if self.time_us is None else self.floor_us / self.time_us

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.cost.flops / self.cost.bytes

    @property
    def bound(self) -> Literal["memory", "compute"]:
        """Which term of the floor is the larger."""
        return "memory" if self.floor_us == self.memory_us else "compute"

    def rates(self) -> tuple[float, float]:
        """GB/s and TFLOP/s, measured or else at the floor."""
        seconds = (self.floor_us if self.time_us is None else self.time_us) / 1e6
        return self.cost.bytes / seconds / 1e9, self.cost.flops / seconds / 1e12


@dataclass(frozen=True, kw_only=True)
class StageProfile:
    """One step: a token for each sequence, a chunk of ``context`` tokens for each, or ``batch`` pictures."""

    stage: Stage
    batch: int
    context: int
    rows: tuple[Row, ...]

    @property
    def floor_us(self) -> float:
        return sum(row.step_floor_us for row in self.rows)

    @property
    def measured(self) -> tuple[Row, ...]:
        """The rows that have a time: all, none, or those that did not fail."""
        return tuple(row for row in self.rows if row.time_us is not None)

    @property
    def complete(self) -> bool:
        """Every row has a time."""
        return len(self.measured) == len(self.rows)

    @property
    def time_us(self) -> float | None:
        """The sum over the measured kernels, each measured alone; None where there is none."""
        return sum(row.step_time_us or 0.0 for row in self.measured) if self.measured else None

    @property
    def roofline(self) -> float | None:
        """The share of the floor that the measured kernels reach together."""
        return sum(row.step_floor_us for row in self.measured) / self.time_us if self.time_us else None

    @property
    def lost_us(self) -> float | None:
        """What a step loses in the measured kernels."""
        return sum(row.lost_us or 0.0 for row in self.measured) if self.measured else None

    @property
    def unit(self) -> str:
        """What a step makes."""
        return "images" if self.stage == "vision" else "tokens"

    @property
    def made(self) -> int:
        """How many of them."""
        return self.batch * (self.context if self.stage == "prefill" else 1)

    @property
    def rate_at_floor(self) -> float:
        """Tokens or images a second, if every kernel ran at its floor."""
        return self.made / self.floor_us * 1e6

    @property
    def rate(self) -> float | None:
        """Tokens or images a second, None where a kernel's time is missing."""
        return self.made / self.time_us * 1e6 if self.time_us and self.complete else None

    def share(self, row: Row) -> float | None:
        """A row's share of the measured time, or of the floor where nothing was measured."""
        if self.time_us is None:
            return row.step_floor_us / self.floor_us
        return None if row.step_time_us is None else row.step_time_us / self.time_us

    def by_lost_time(self) -> list[Row]:
        """The rows that lose most first; unmeasured ones by their floor, after those."""
        return sorted(self.rows, key=lambda row: (row.lost_us is None, -(row.lost_us or 0.0), -row.step_floor_us))


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The steps of a model on a GPU whose rates are ``ceilings``, or a datasheet's."""

    model: str
    dtype: str
    gpu: Gpu
    ceilings: Ceilings | None
    stages: tuple[StageProfile, ...]
    warnings: tuple[str, ...]
    when: str


def stages_of(model: ModelShapes, stage: Stage | None) -> tuple[Stage, ...]:
    """The stages to profile.

    Raises:
        UsageError: ``vision`` of a model for text only.
    """
    if stage == "vision" and model.vision is None:
        raise UsageError(f"{model.name} is for text only, so there is no stage `vision`", hint="take 4b, 12b or 27b")
    if stage is not None:
        return (stage,)
    return tuple(known for known in STAGES if known != "vision" or model.vision is not None)


def profile(
    kernels: Sequence[Kernel],
    model: ModelShapes,
    stages: Sequence[Stage],
    *,
    batch: int,
    context: int,
    dtype: str,
    gpu: Gpu,
    store: RecordStore,
    ceilings: Ceilings | None = None,
    measure: Measure | None = None,
    compiler: CompilerPool | None = None,
    progress: Progress = SILENT,
) -> Profile:
    """Profiles one step of each stage.

    Args:
        context: positions before the token for decode; tokens of the chunk for prefill, at most 8192.
        gpu: what is measured on, or would be.
        ceilings: measured rates, in the place of those of ``gpu``.
        measure: None gives the floor only.
        compiler: compiles all kernels at once into Triton's cache, where the measurement finds them.

    Raises:
        UsageError: no kernel has work in a stage at this dtype.
    """
    rated = ceilings.of(gpu) if ceilings else gpu
    contexts = {stage: min(context, LONGEST_CHUNK) if stage == "prefill" else context for stage in stages}
    plans = {
        stage: [
            (kernel, use, store.best(kernel, use.case, gpu))
            for kernel in kernels
            if stage in kernel.stages
            for use in kernel.uses(model, stage, batch=batch, context=contexts[stage], dtype=dtype)
        ]
        for stage in stages
    }
    if idle := [stage for stage, plan in plans.items() if not plan]:
        raise UsageError(f"no kernel has work in {' and '.join(idle)} of {model.name} at {dtype}")
    flat = [step for plan in plans.values() for step in plan]
    if compiler is not None:
        with progress.task("compiling"):
            compiler.compile_all([(launch, gpu.architecture) for step in flat for launch in _launches(*step)])
    profiles = []
    with progress.task("measuring", total=len(flat)) as advance:
        for stage, plan in plans.items():
            rows = []
            for kernel, use, choice in plan:
                rows.append(_row(kernel, use, choice, rated, measure))
                advance(1)
            profiles.append(StageProfile(stage=stage, batch=batch, context=contexts[stage], rows=tuple(rows)))
    warnings = dict.fromkeys(warning for _, _, choice in flat for warning in choice.warnings) if measure else {}
    return Profile(
        model=model.name,
        dtype=dtype,
        gpu=rated,
        ceilings=ceilings,
        stages=tuple(profiles),
        warnings=tuple(warnings),
        when=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _launches(kernel: Kernel, use: Use, choice: Choice) -> tuple[Launch, ...]:
    case, config = use.case, choice.config
    tensors = kernel.inputs(case, device="meta") | kernel.outputs(case, config, device="meta")
    return kernel.launches(case, config, tensors)


def measured_us(kernel: Kernel, case: Case, config: Config) -> float:
    """The time on this host's GPU.

    Raises:
        HostError: its memory does not suffice, or Triton or the driver refuses the configuration.
    """
    from triton.errors import TritonError

    try:
        return kernel_us(kernel, case, config)
    except torch.OutOfMemoryError as error:
        raise HostError("the GPU's memory does not suffice") from error
    except (TritonError, RuntimeError) as error:
        raise HostError(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    finally:
        with contextlib.suppress(RuntimeError):  # of a GPU that a kernel has left unusable
            torch.cuda.empty_cache()


def _row(kernel: Kernel, use: Use, choice: Choice, gpu: Gpu, measure: Measure | None) -> Row:
    cost = kernel.cost(use.case)
    time_us = failure = None
    if measure is not None:
        try:
            time_us = measure(kernel, use.case, choice.config)
        except Gemma3CompileError as error:  # one kernel that fails leaves the others' figures
            failure = error.message
    return Row(
        use=use,
        kernel=kernel.name,
        choice=choice,
        cost=cost,
        memory_us=cost.bytes / gpu.read_bytes_per_s * 1e6,
        compute_us=cost.flops / gpu.bf16_flops * 1e6,
        time_us=time_us,
        failure=failure,
    )
