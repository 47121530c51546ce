"""A kernel small enough to be tuned in Triton's interpreter, and a clock that says what a candidate costs.

Legend: N values.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import triton
import triton.language as tl

from autotune.gpu import GPUS, Gpu
from autotune.kernel import Case, Config, Cost, Kernel, Space, Stage, Tensors, Use
from autotune.launch import Launch
from autotune.model_shapes import ModelShapes
from autotune.study import Problem
from autotune.trial_worker import Candidate, Cases, GoOn, Outcome, evaluate

H100 = GPUS["h100"]
CASE = Case(dtype="float32", dims={"size": 40})


@triton.jit
def _double_kernel(x_ptr, y_ptr, size, WRONG: tl.constexpr, BLOCK: tl.constexpr):
    offset_N = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x_N = tl.load(x_ptr + offset_N, offset_N < size)
    tl.store(y_ptr + offset_N.to(tl.int64) + (WRONG // 6) * 2**40, 2 * x_N + WRONG, offset_N < size)


class Double(Kernel):
    """y = 2 x. What ``WRONG`` says goes wrong: 0 nothing, 1 the result, 2 it hangs, 3 it crashes, 4 it raises, 5 memory.

    6 writes where it must not, which a GPU does not forgive.

    Only ``Faulty`` has other values than 0 in its space.
    """

    name: ClassVar[str] = "double"
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    stages: ClassVar[tuple[Stage, ...]] = ("decode",)
    source: ClassVar[tuple[str, ...]] = ("tests.autotune.tiny",)
    faults: ClassVar[tuple[int, ...]] = (0,)

    def uses(self, model: ModelShapes, stage: Stage, *, batch: int, context: int, dtype: str) -> tuple[Use, ...]:
        case = Case(dtype="float32", dims={"size": model.hidden * batch})
        return (Use(name="doubling", case=case, count=model.layers),) if stage == "decode" else ()

    def bucket(self, case: Case) -> str:
        return f"size<={triton.next_power_of_2(case.dims['size'])}"

    def space(self, case: Case) -> Space:
        return Space(
            constants={"BLOCK": (8, 16, 32, 64, 128), "WRONG": self.faults}, num_warps=(1, 2, 4, 8), num_stages=(1, 2)
        )

    def refusal(self, case: Case, config: Config, gpu: Gpu) -> str | None:
        if config.constants["BLOCK"] < 16 * config.num_warps // 4:
            return f"{config.num_warps} warps for {config.constants['BLOCK']} values"
        return None

    def default(self, case: Case, gpu: Gpu) -> Config:
        return Config(constants={"BLOCK": 128, "WRONG": 0}, num_warps=1, num_stages=1)

    def inputs(self, case: Case, *, device: torch.device | str, seed: int = 0) -> Tensors:
        return {"x": torch.arange(case.dims["size"], dtype=torch.float32, device=device)}

    def outputs(self, case: Case, config: Config, *, device: torch.device | str) -> Tensors:
        return {"y": torch.empty(case.dims["size"], device=device)}

    def launches(self, case: Case, config: Config, tensors: Tensors) -> tuple[Launch, ...]:
        match config.constants["WRONG"]:
            case 2:
                time.sleep(60)
            case 3:
                os.kill(os.getpid(), signal.SIGSEGV)
            case 4:
                raise ZeroDivisionError("on purpose")
            case 5:
                raise torch.OutOfMemoryError("on purpose")
        return (
            Launch(
                function=_double_kernel,
                grid=(triton.cdiv(case.dims["size"], config.constants["BLOCK"]), 1, 1),
                arguments={"x_ptr": tensors["x"], "y_ptr": tensors["y"], "size": case.dims["size"]},
                constants=config.constants,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            ),
        )

    def oracle(self, case: Case, inputs: Tensors) -> Tensors:
        return {"y": inputs["x"] * 2}

    def cost(self, case: Case) -> Cost:
        return Cost(bytes=8 * case.dims["size"], flops=case.dims["size"])


class Faulty(Double):
    """All that can go wrong."""

    name: ClassVar[str] = "faulty"
    faults: ClassVar[tuple[int, ...]] = (0, 1, 4, 5)


class Hopeless(Double):
    """No candidate is right."""

    name: ClassVar[str] = "hopeless"
    faults: ClassVar[tuple[int, ...]] = (1,)


def true_us(config: Config) -> float:
    """What a candidate costs; the least is 10, at a block of 32, four warps and two stages."""
    block, warps = config.constants["BLOCK"].bit_length() - 6, config.num_warps.bit_length() - 3
    return 10.0 + 3.0 * abs(block) + 2.0 * abs(warps) + 0.5 * (2 - config.num_stages)


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Says :func:`true_us`, after ``delay_s`` for each candidate."""

    device: str = "cpu"
    delay_s: float = 0.0

    def times_us(
        self, kernel: Kernel, case: Case, config: Config, inputs: Tensors, in_place: Collection[str]
    ) -> Iterator[float]:
        time.sleep(self.delay_s)
        while True:
            yield true_us(config)


class InProcess:
    """An evaluator without a process of its own: what runs is what a trial process runs."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.meter = Clock(delay_s=delay_s)
        self.cases = Cases()
        self.seen: list[Config] = []

    def evaluate(self, kernel: Kernel, case: Case, config: Config, go_on: GoOn) -> Outcome:
        self.seen.append(config)
        return evaluate(Candidate(kernel=kernel, case=case, config=config, meter=self.meter), go_on, self.cases)


def problem(kernel: Kernel | None = None, case: Case = CASE) -> Problem:
    return Problem(kernel=kernel or Double(), case=case, gpu=H100)
