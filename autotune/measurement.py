"""How long a case takes on a GPU, in microseconds.

Calls are captured into a CUDA graph, so that no launch from the host counts, and go round over copies of all tensors
that together exceed the L2 cache twice: weights come from memory, as in a step of a model. A case so small that
256 copies do not fill the cache stays in it, as the few rows of a decode step do. The time is a median over replays.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch

from autotune.kernel import Case, Config, Kernel, Tensors
from autotune.launch import Launch

REPEATS = (3, 9, 27)
"""After so many replays a candidate's running median is reported; after the last it is the time."""
MOST_SETS = 256
MOST_CALLS = 1024
"""In one graph."""


class Meter(Protocol):
    """What times candidates."""

    @property
    def device(self) -> str:
        """Where the inputs have to be."""
        ...

    def times_us(
        self, kernel: Kernel, case: Case, config: Config, inputs: Tensors, in_place: Collection[str]
    ) -> Iterator[float]:
        """Times of one call, without an end.

        Args:
            inputs: as the kernel makes them; the meter changes only those of ``in_place``.
            in_place: names of those that the kernel writes.
        """
        ...


def running_medians(times_us: Iterator[float], repeats: Sequence[int] = REPEATS) -> Iterator[tuple[int, float]]:
    """Pairs of how many times were seen and their median. Takes no more of ``times_us`` than that."""
    seen: list[float] = []
    for count in repeats:
        seen.extend(islice(times_us, count - len(seen)))
        yield count, statistics.median(seen)


def buffer_sets(set_bytes: int, l2_bytes: int, free_bytes: int) -> int:
    """How many copies of a case's tensors go round: twice the cache, in no more than half the free memory."""
    wanted = math.ceil(2 * l2_bytes / max(set_bytes, 1))
    return max(1, min(wanted, MOST_SETS, free_bytes // 2 // max(set_bytes, 1)))


@dataclass(frozen=True, kw_only=True)
class GraphMeter:
    """Times with CUDA events around replays of a graph.

    Args:
        graph_us: how long a graph runs at least, so that starting one does not count.
        warm_up_us: for how long it is replayed before the first time is taken: clocks rise under load.
    """

    device: str = "cuda"
    graph_us: float = 1000.0
    warm_up_us: float = 10_000.0

    def times_us(
        self, kernel: Kernel, case: Case, config: Config, inputs: Tensors, in_place: Collection[str]
    ) -> Iterator[float]:
        """Replays the graph once for each time; what the kernel writes in place is restored in between."""
        sets = self._tensor_sets(kernel, case, config, inputs)
        original = {name: inputs[name].clone() for name in in_place}
        graph, calls = self._captured([kernel.launches(case, config, tensors) for tensors in sets])
        spent_us = 0.0
        while spent_us < self.warm_up_us:
            spent_us += _replay_us(graph)
        while True:
            for tensors in sets:
                for name, tensor in original.items():
                    tensors[name].copy_(tensor)
            yield _replay_us(graph) / calls

    def _tensor_sets(self, kernel: Kernel, case: Case, config: Config, inputs: Tensors) -> list[Tensors]:
        device = next(iter(inputs.values())).device
        first = inputs | kernel.outputs(case, config, device=device)
        size = sum(tensor.numel() * tensor.itemsize for tensor in first.values())
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        copies = buffer_sets(size, l2_bytes, _free_bytes(device)) - 1
        return [first] + [
            {name: tensor.clone() for name, tensor in inputs.items()} | kernel.outputs(case, config, device=device)
            for _ in range(copies)
        ]

    def _captured(self, sets: Sequence[Sequence[Launch]]) -> tuple[torch.cuda.CUDAGraph, int]:
        """A graph that runs for ``graph_us``, and how many calls it holds: every set equally often."""
        for launches in sets:
            for launch in launches:  # compiles, and loads: neither may happen while a graph is captured
                launch.run()
        torch.cuda.synchronize()
        rounds = 1
        while True:
            graph = _graph_of([launch for launches in sets for launch in launches] * rounds)
            _replay_us(graph)  # the first replay uploads the graph
            elapsed_us = _replay_us(graph)
            most = max(1, MOST_CALLS // len(sets))
            if elapsed_us >= self.graph_us / 2 or rounds == most:
                return graph, rounds * len(sets)
            rounds = min(most, max(rounds + 1, math.ceil(rounds * self.graph_us / elapsed_us)))


def kernel_us(kernel: Kernel, case: Case, config: Config, meter: Meter | None = None) -> float:
    """The time of one call in this process, without a check of what it computes.

    Args:
        meter: None takes the GPU.
    """
    meter = meter or GraphMeter()
    inputs = kernel.inputs(case, device=meter.device)
    medians = running_medians(meter.times_us(kernel, case, config, inputs, kernel.in_place(case)))
    return list(medians)[-1][1]


def _free_bytes(device: torch.device) -> int:
    """What can still be allocated: the driver's free memory, and what torch keeps of tensors that are gone."""
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return free_bytes + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _graph_of(launches: Sequence[Launch]) -> torch.cuda.CUDAGraph:
    """Captures launches, without the garbage collection of ``torch.cuda.graph``, which costs more than a candidate."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            for launch in launches:
                launch.run()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3
