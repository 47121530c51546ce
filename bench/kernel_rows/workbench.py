"""Both sides of a row by one meter: captured into a CUDA graph, over copies of the inputs that do not fit the L2 cache.

Ours runs with the configuration that a user gets, and is timed only if it computes what its oracle does. A peer that
claims the same result is held against the oracle.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import ClassVar

import torch
from torch import Tensor

from autotune.ahead_of_time import CompileError, CompilerPool
from autotune.correctness import compare
from autotune.gpu import Gpu
from autotune.kernel import Case, Config, Cost, Kernel, Space, Stage, Tensors, Use
from autotune.launch import Launch
from autotune.measurement import REPEATS, GraphMeter, Meter, running_medians
from autotune.model_shapes import ModelShapes
from autotune.record_store import Choice, RecordStore
from bench.kernel_rows.subject import Peer, Prepare, Side, Subject
from runtimes.errors import Gemma3CompileError

APART = 0.02
"""Root mean square of a peer's difference from torch's oracle, to that of the oracle. Both round to bf16, 0.3% in all; a window
of 1024 keys that is off by one differs by 3%."""
DEPENDENT = "each launch may begin before the one ahead of it ends, as in a step (programmatic dependent launch)"


class Workbench:
    """Measures subjects on one GPU.

    Args:
        gpu: what is measured on.
        store: where configurations come from.
        meter: None takes the GPU.
        repeats: how often a time is taken; the last count's median stands.
    """

    def __init__(
        self, gpu: Gpu, store: RecordStore, *, meter: Meter | None = None, repeats: Sequence[int] = REPEATS
    ) -> None:
        self.gpu = gpu
        self.store = store
        self.meter = meter or GraphMeter()
        self.repeats = repeats

    def compile_all(self, subjects: Sequence[Subject]) -> list[CompileError]:
        """Compiles our side of all subjects at once, into Triton's cache; returns what was refused."""
        launches = []
        for subject in subjects:
            with suppress(Exception):  # measuring it fails too, and says how
                config = self.store.best(subject.kernel, subject.case, self.gpu).config
                launches += [(launch, self.gpu.architecture) for launch in _launches(subject, config)]
        with CompilerPool() as pool:
            return [done for done in pool.compile_all(launches) if isinstance(done, CompileError)]

    def measure(self, subject: Subject) -> tuple[Side, dict[str, Side]]:
        """Our side, and the peers' by label. A side that fails has no time, and leaves the others theirs."""
        choice = self.store.best(subject.kernel, subject.case, self.gpu)
        inputs = subject.kernel.inputs(subject.case, device=self.meter.device)
        try:
            ours = self._ours(subject, choice, inputs)
        except Exception as error:  # noqa: BLE001 - one kernel that fails leaves the other rows
            ours = Side(time_us=None, note=f"{chosen_by(choice)}: {_told(error)}")
        wanted = any(peer.returns for peer in subject.peers)
        expected = subject.kernel.oracle(subject.case, inputs) if wanted else {}
        peers = {peer.label: self._peer(subject, peer, choice.config, inputs, expected) for peer in subject.peers}
        del inputs, expected
        torch.cuda.empty_cache()
        return ours, peers

    def _ours(self, subject: Subject, choice: Choice, inputs: Tensors) -> Side:
        kernel, case = subject.kernel, subject.case
        results = compare(kernel, case, choice.config, inputs)
        if wrong := [result for result in results if not result.passed]:
            return Side(time_us=None, note=f"{chosen_by(choice)}: does not compute what its oracle does: {wrong[0]}")
        in_place = {result.name for result in results} & inputs.keys()
        note = chosen_by(choice)
        if any(launch.dependent for launch in _launches(subject, choice.config)):
            note = f"{note}; {DEPENDENT}"
        return Side(time_us=self._time_us(kernel, case, choice.config, inputs, in_place), note=note)

    def _peer(self, subject: Subject, peer: Peer, config: Config, inputs: Tensors, expected: Tensors) -> Side:
        kernel, case = subject.kernel, subject.case
        try:
            if peer.returns:
                result = peer.prepare(case, _copies(inputs, inputs))()
                if (apart := _apart(result, expected[peer.returns])) > APART:
                    return Side(time_us=None, note=f"{peer.label} computes something else, {apart:.2%} from the oracle")
            time_us = self._time_us(_Borrowed(kernel, peer.prepare), case, config, inputs, inputs)
        except Exception as error:  # noqa: BLE001 - as above; optional packages raise whatever they like
            return Side(time_us=None, note=f"{peer.label}: {_told(error)}")
        return Side(time_us=time_us, note=peer.remark)

    def _time_us(self, kernel: Kernel, case: Case, config: Config, inputs: Tensors, written: Collection[str]) -> float:
        """The median time; tensors that are ``written`` are copied first."""
        own = inputs | _copies(inputs, written)
        in_place = () if isinstance(kernel, _Borrowed) else written
        medians = running_medians(self.meter.times_us(kernel, case, config, own, in_place), self.repeats)
        return list(medians)[-1][1]


def chosen_by(choice: Choice) -> str:
    """The configuration, and whose it is."""
    if choice.record is None:
        return f"heuristic: {choice.config}"
    if choice.tuned_here:
        return f"tuned: {choice.config}"
    return f"record of another GPU, sources or Triton: {choice.config} ({choice.warning})"


class _Call(Launch):
    """A program where a meter expects a launch."""

    def run(self) -> None:
        self.function()


class _Borrowed(Kernel):
    """A peer where a meter expects a kernel: its launches are another program on the same inputs."""

    name: ClassVar[str] = "peer"
    dtypes: ClassVar[tuple[str, ...]] = ()
    stages: ClassVar[tuple[Stage, ...]] = ()
    source: ClassVar[tuple[str, ...]] = ()

    def __init__(self, kernel: Kernel, prepare: Prepare) -> None:
        self.kernel = kernel
        self.prepare = prepare

    def launches(self, case: Case, config: Config, tensors: Tensors) -> tuple[Launch, ...]:
        return (_Call(function=self.prepare(case, tensors), grid=(1, 1, 1), arguments={}),)

    def outputs(self, case: Case, config: Config, *, device: torch.device | str) -> Tensors:
        return {}

    def inputs(self, case: Case, *, device: torch.device | str, seed: int = 0) -> Tensors:
        return self.kernel.inputs(case, device=device, seed=seed)

    def oracle(self, case: Case, inputs: Tensors) -> Tensors:
        return self.kernel.oracle(case, inputs)

    def cost(self, case: Case) -> Cost:
        return self.kernel.cost(case)

    def uses(self, model: ModelShapes, stage: Stage, *, batch: int, context: int, dtype: str) -> tuple[Use, ...]:
        return ()

    def bucket(self, case: Case) -> str:
        return self.kernel.bucket(case)

    def space(self, case: Case) -> Space:
        return self.kernel.space(case)

    def refusal(self, case: Case, config: Config, gpu: Gpu) -> str | None:
        return None

    def default(self, case: Case, gpu: Gpu) -> Config:
        return self.kernel.default(case, gpu)


def _launches(subject: Subject, config: Config) -> tuple[Launch, ...]:
    kernel, case = subject.kernel, subject.case
    tensors = kernel.inputs(case, device="meta") | kernel.outputs(case, config, device="meta")
    return kernel.launches(case, config, tensors)


def _copies(inputs: Tensors, names: Collection[str]) -> Tensors:
    return {name: inputs[name].clone() for name in names}


def _apart(result: Tensor, expected: Tensor) -> float:
    """How far a result is from what was expected, by root mean square; infinite where shapes differ or one holds a NaN."""
    if result.shape != expected.shape:
        return float("inf")
    difference = float((result.double() - expected.double()).square().mean().sqrt())
    size = float(expected.double().square().mean().sqrt())
    apart = difference / size if size else difference
    return apart if apart == apart else float("inf")


def _told(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, Gemma3CompileError):
        return error.message
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
