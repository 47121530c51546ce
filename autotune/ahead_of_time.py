"""Compiles launches for a GPU that need not be there, in processes of their own.

What is compiled is what :meth:`Launch.run` would run: the same specialisation as Triton's own launcher, so that a
measured kernel and a shipped one are the same, and a launch finds in Triton's cache what was compiled here. That is: an
integer that is 1 becomes a constant and leaves the cubin's arguments; pointers and integers that are multiples of 16 are compiled as such. Meta tensors count as aligned
up to their offset in their storage: whoever loads the cubin must align its buffers to 16 bytes. Integers that one cubin
must take at any value are named in ``varying``.

    with CompilerPool() as pool:
        for compiled in pool.compile_all([(launch, 80), (launch, 90)]):
            ...
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from autotune.child_process import ChildProcess
from autotune.compile_worker import ArgumentFacts, Refusal, Reply, Request
from autotune.launch import Argument, Launch
from runtimes.errors import Gemma3CompileError

ALIGNMENT = 16
TIMEOUT_S = 300.0
"""A compilation takes 0.2 to 20 s; one that takes this long hangs."""
_ELEMENTS = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
    torch.bool: "i1", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8",
}  # fmt: skip
_INTEGERS = ((-(2**31), 2**31, "i32"), (-(2**63), 2**63, "i64"), (0, 2**64, "u64"))


class CompileError(Gemma3CompileError):
    """Triton refused a launch, or its compiler died or hung.

    Args:
        details: the compiler's traceback.
    """

    def __init__(self, message: str, *, hint: str | None = None, details: str = "") -> None:
        super().__init__(message, hint=hint)
        self.details = details


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A run-time argument of a cubin: the Triton function's own name, and the type as Triton writes it (``*bf16``)."""

    name: str
    type: str


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A cubin, and what launching it takes.

    Args:
        architecture: 90 for compute capability 9.0.
        name: of the function in the cubin.
        parameters: in order; after them the cubin takes two more pointers, to global and to profile scratch.
        aligned: parameters that must be multiples of 16.
        shared_bytes: dynamic shared memory to launch with.
        registers: of each thread.
        spill_bytes: stack of each thread, which only spilt registers fill.
        num_warps, num_ctas: a block is 32 x num_warps threads, a cluster num_ctas blocks.
        global_scratch_bytes: for each program of the grid, to be aligned to ``global_scratch_align``; 0 mostly.
        profile_scratch_bytes: 0 unless Triton's own profiler asked for it.
    """

    architecture: int
    cubin: bytes
    name: str
    parameters: tuple[Parameter, ...]
    aligned: tuple[str, ...]
    shared_bytes: int
    registers: int
    spill_bytes: int
    num_warps: int
    num_ctas: int
    global_scratch_bytes: int
    global_scratch_align: int
    profile_scratch_bytes: int


def compile_launch(launch: Launch, architecture: int, *, varying: Collection[str] = ()) -> Compiled:
    """Compiles one launch. For many, a :class:`CompilerPool` spares the seconds that a process takes to start.

    Args:
        launch: from real or meta tensors.
        architecture: 90 for compute capability 9.0.
        varying: integers that the cubin must take at any value.

    Raises:
        CompileError: Triton refuses it; the message ends with the compiler's own words.
    """
    with CompilerPool(workers=1) as pool:
        return pool.submit(launch, architecture, varying=varying).result()


class CompilerPool:
    """Processes that compile, each started when there is work for it.

    Args:
        workers: None takes every core of this host that the process may use.
        timeout_s: how long one compilation may take.
        cache_folder: Triton's cache; None leaves it where Triton has it.
    """

    def __init__(
        self, *, workers: int | None = None, timeout_s: float = TIMEOUT_S, cache_folder: Path | None = None
    ) -> None:
        self.timeout_s = timeout_s
        self.cache_folder = cache_folder
        self._threads = ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)), thread_name_prefix="compile")
        self._own = threading.local()
        self._lock = threading.Lock()
        self._started: list[ChildProcess] = []

    def submit(self, launch: Launch, architecture: int, *, varying: Collection[str] = ()) -> Future[Compiled]:
        """Compiles in the background; the future raises CompileError where Triton refuses."""
        return self._threads.submit(self._compile, request_of(launch, architecture, varying=varying))

    def compile_all(
        self, launches: Sequence[tuple[Launch, int]], *, varying: Collection[str] = ()
    ) -> list[Compiled | CompileError]:
        """Compiles launches for architectures, equal ones once; errors stand in the place of what failed."""
        requests = [request_of(launch, architecture, varying=varying) for launch, architecture in launches]
        futures: dict[str, Future[Compiled]] = {}
        for request in requests:
            if repr(request) not in futures:
                futures[repr(request)] = self._threads.submit(self._compile, request)
        return [_outcome(futures[repr(request)]) for request in requests]

    def close(self) -> None:
        """Ends the processes, at once."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for worker in self._started:
                worker.kill()
        self._threads.shutdown(wait=True)
        for worker in self._started:
            worker.close()

    def __enter__(self) -> CompilerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _compile(self, request: Request) -> Compiled:
        """Runs in a thread of the pool, each of which has a worker of its own."""
        worker: ChildProcess | None = getattr(self._own, "worker", None)
        if worker is None or not worker.alive:
            worker = self._own.worker = _started(self.cache_folder)
            with self._lock:
                self._started = [other for other in self._started if other.alive] + [worker]
        reply = _ask(worker, request, self.timeout_s)
        return Compiled(
            architecture=request.architecture,
            cubin=reply.cubin,
            name=reply.name,
            parameters=tuple(Parameter(name=name, type=kind) for name, kind in reply.arguments),
            aligned=reply.aligned,
            shared_bytes=reply.metadata["shared"],
            registers=reply.registers,
            spill_bytes=reply.spill_bytes,
            num_warps=reply.metadata["num_warps"],
            num_ctas=reply.metadata["num_ctas"],
            global_scratch_bytes=reply.metadata["global_scratch_size"],
            global_scratch_align=reply.metadata["global_scratch_align"],
            profile_scratch_bytes=reply.metadata["profile_scratch_size"],
        )


def request_of(launch: Launch, architecture: int, *, varying: Collection[str] = ()) -> Request:
    """A launch in the words of the process that compiles.

    Raises:
        CompileError: its function is not at the top of a module, where another process could find it.
    """
    python = getattr(launch.function, "fn", launch.function)
    if "." in python.__qualname__:
        raise CompileError(
            f"{python.__module__}.{python.__qualname__} cannot be compiled in another process",
            hint="define the @triton.jit function at the top of its module",
        )
    return Request(
        module=python.__module__,
        function=python.__qualname__,
        arguments={name: _facts(value, name in varying) for name, value in launch.arguments.items()},
        constants=dict(launch.constants),
        options=launch.options,
        architecture=architecture,
    )


def _facts(value: Argument, varies: bool) -> ArgumentFacts:
    if isinstance(value, Tensor):
        address = value.storage_offset() * value.itemsize if value.is_meta else value.data_ptr()
        return ArgumentFacts(type=f"*{_ELEMENTS[value.dtype]}", specialised=True, aligned=address % ALIGNMENT == 0)
    if isinstance(value, bool):
        return ArgumentFacts(type="u1")
    if isinstance(value, float):
        return ArgumentFacts(type="fp32")
    kind = next(kind for low, end, kind in _INTEGERS if low <= value < end)
    if varies:
        return ArgumentFacts(type=kind, varies=True)
    return ArgumentFacts(type=kind, specialised=True, one=value == 1, aligned=value % ALIGNMENT == 0)


def _outcome(future: Future[Compiled]) -> Compiled | CompileError:
    try:
        return future.result()
    except CompileError as error:
        return error


def _started(cache_folder: Path | None) -> ChildProcess:
    # A kernel that Triton is to compile must not be imported for its interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    if cache_folder is not None:
        environment["TRITON_CACHE_DIR"] = str(cache_folder)
    return ChildProcess("autotune.compile_worker", environment)


def _ask(worker: ChildProcess, request: Request, timeout_s: float) -> Reply:
    """A worker outlives a refused request, but neither a hang nor a crash of the compiler."""
    with worker.within(timeout_s) as late:
        reply = worker.exchange(request)
    if isinstance(reply, Reply):
        return reply
    what = f"{request.module}.{request.function} for sm_{request.architecture} ({_described(request)})"
    if isinstance(reply, Refusal):
        raise CompileError(f"Triton does not compile {what}: {reply.summary}", details=reply.details)
    ending = worker.ending()
    worker.kill()
    if late.is_set():
        raise CompileError(f"compiling {what} took longer than {timeout_s:g} s")
    raise CompileError(f"Triton's compiler died on {what}: {ending}")


def _described(request: Request) -> str:
    return " ".join(f"{name}={value}" for name, value in (dict(request.constants) | dict(request.options)).items())
