"""Compiling without a GPU: what the cubin takes, what may be assumed of it, and how failures end."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from autotune.ahead_of_time import Compiled, CompileError, CompilerPool, request_of
from autotune.compile_worker import Request, specialised
from autotune.gpu import GPUS, present
from autotune.kernel import Case
from autotune.kernels.rms_norm import RmsNorm
from autotune.launch import Launch
from tests.autotune import jit_functions
from tests.autotune.checked import DEVICE

ARCHITECTURES = (80, 86, 89, 90, 100, 120)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CompilerPool]:
    with CompilerPool(workers=1, cache_folder=tmp_path_factory.mktemp("cache")) as made:
        yield made


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch(
    function: Any = jit_functions.scaled_copy, constants: dict[str, Any] | None = None, **changes: Any
) -> Launch:
    arguments: dict[str, Any] = {
        "x_ptr": meta(256, dtype=torch.bfloat16),
        "y_ptr": meta(256),
        "n": 100,
        "stride": 1,
        "factor": 2.0,
        "wide": 16,
    }
    return Launch(function=function, grid=(4, 1, 1), arguments=arguments | changes, constants=constants or {})


def only(function: Any, **arguments: Any) -> Launch:
    return Launch(function=function, grid=(1, 1, 1), arguments=arguments)


def assert_elf(compiled: Compiled) -> None:
    assert compiled.cubin[:4] == b"\x7fELF"
    assert compiled.name.encode() in compiled.cubin


def test_a_cubin_takes_what_is_no_constant(pool: CompilerPool) -> None:
    compiled = pool.submit(launch(), 90).result()
    assert_elf(compiled)
    assert compiled.name == "scaled_copy"
    types = {parameter.name: parameter.type for parameter in compiled.parameters}
    assert types == {"x_ptr": "*bf16", "y_ptr": "*fp32", "n": "i32", "factor": "fp32", "wide": "i64"}
    assert compiled.aligned == ("x_ptr", "y_ptr", "wide")
    assert (compiled.num_warps, compiled.num_ctas, compiled.spill_bytes) == (4, 1, 0)
    assert 8 <= compiled.registers <= 255
    assert (compiled.global_scratch_bytes, compiled.profile_scratch_bytes) == (0, 0)


def test_the_cubins_own_parameters_are_these_and_two_more(pool: CompilerPool, tmp_path: Path) -> None:
    compiled = pool.submit(launch(stride=3), 80).result()
    file = tmp_path / "x.cubin"
    file.write_bytes(compiled.cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    text = subprocess.run([tool, "-elf", str(file)], capture_output=True, text=True, check=True).stdout
    assert len({line for line in text.splitlines() if "Ordinal" in line}) == len(compiled.parameters) + 2


def test_varying_integers_are_assumed_nothing_of(pool: CompilerPool) -> None:
    compiled = pool.submit(launch(n=128), 90, varying=("n", "stride", "wide")).result()
    assert [parameter.name for parameter in compiled.parameters] == ["x_ptr", "y_ptr", "n", "stride", "factor", "wide"]
    assert compiled.aligned == ("x_ptr", "y_ptr")
    assert request_of(launch(n=128), 90, varying=["n"]) == request_of(launch(n=7), 90, varying=["n"])


def test_do_not_specialize_is_heeded(pool: CompilerPool) -> None:
    compiled = pool.submit(only(jit_functions.unspecialised, x_ptr=meta(4), free=1), 80).result()
    assert [parameter.type for parameter in compiled.parameters] == ["*fp32", "i32"]


def test_alignment_follows_the_offset_of_a_view() -> None:
    def aligned(tensor: torch.Tensor) -> bool:
        return request_of(launch(x_ptr=tensor), 90).arguments["x_ptr"].aligned

    for base in (meta(256, dtype=torch.bfloat16), torch.zeros(256, dtype=torch.bfloat16, device=DEVICE)):
        assert (aligned(base), aligned(base[8:]), aligned(base[4:])) == (True, True, False)


@pytest.mark.parametrize("value", [0, 1, 2, 16, -16, 2**31 - 1, 2**31, -(2**31), 2**63, 2.0, True])
@pytest.mark.parametrize("offset", [0, 4])
@pytest.mark.parametrize("name", ["scaled_copy", "unspecialised", "unaligned"])
def test_what_is_compiled_is_what_tritons_launcher_looks_for(name: str, offset: int, value: Any) -> None:
    """Signature, constants and attributes are in the key of Triton's cache: as its own launcher makes them of real tensors."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    decorated = getattr(jit_functions, name)
    options = {"do_not_specialize": ["free"]} if name == "unspecialised" else {}
    options |= {"do_not_specialize_on_alignment": ["free"]} if name == "unaligned" else {}
    function = JITFunction(decorated.fn, **options)
    tensors = {"x_ptr": torch.zeros(256, dtype=torch.bfloat16)[offset:]}
    described = launch(stride=value, **tensors, y_ptr=torch.zeros(256))
    if name != "scaled_copy":
        described = only(decorated, **tensors, free=value)
    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    bound, found, _ = create_function_from_signature(function.signature, function.params, backend)(
        **described.arguments, **described.constants
    )
    _, signature, constants, attributes = function._pack_args(backend, {}, bound, found, {})
    made = specialised(function.params, request_of(described, 90))
    assert made == (signature, constants, attributes)
    assert list(made[0]) == list(signature)


def test_other_shapes_of_one_cubin_are_compiled_once(pool: CompilerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request] = []
    compile_ = pool._compile
    monkeypatch.setattr(pool, "_compile", lambda request: (asked.append(request), compile_(request))[1])
    results = pool.compile_all([(launch(n=100), 90), (launch(n=99), 90), (launch(n=112), 90), (launch(n=100), 80)])
    assert len(asked) == 3
    assert [result.architecture for result in results if isinstance(result, Compiled)] == [90, 90, 90, 80]
    assert results[0] == results[1] != results[2]


def test_spills_are_counted(pool: CompilerPool) -> None:
    narrow, wide = (
        Launch(
            function=jit_functions.hungry,
            grid=(1, 1, 1),
            arguments={"x_ptr": meta(4096), "y_ptr": meta(4096)},
            constants={"N": 2048},
            num_warps=4,
            max_registers=limit,
        )
        for limit in (24, None)
    )
    results = [result for result in pool.compile_all([(narrow, 90), (wide, 90)]) if isinstance(result, Compiled)]
    assert results[0].registers <= 24 < results[1].registers
    assert results[0].spill_bytes > 0 == results[1].spill_bytes
    assert results[0].shared_bytes > 0


def test_what_triton_refuses_is_told_and_the_worker_lives_on(pool: CompilerPool) -> None:
    refused = pool.compile_all([(only(jit_functions.wrong, x_ptr=meta(4), y_ptr=meta(4)), 90), (launch(), 90)])
    assert isinstance(refused[0], CompileError) and isinstance(refused[1], Compiled)
    assert "tests.autotune.jit_functions.wrong for sm_90" in refused[0].message
    assert refused[0].message.endswith("NameError('no_such_name is not defined')")
    assert "tl.load(x_ptr) + no_such_name" in refused[0].details


def test_a_function_in_gluon_compiles_too(pool: CompilerPool) -> None:
    described = only(jit_functions.in_gluon, x_ptr=meta(128), y_ptr=meta(128))
    compiled = pool.submit(dataclasses.replace(described, constants={"N": 128}), 90).result()
    assert_elf(compiled)
    assert [parameter.type for parameter in compiled.parameters] == ["*fp32", "*fp32"]


def test_a_missing_argument_is_named(pool: CompilerPool) -> None:
    with pytest.raises(CompileError, match="gives nothing for the parameter `y_ptr` of wrong"):
        pool.submit(only(jit_functions.wrong, x_ptr=meta(4)), 90).result()


def test_a_function_inside_of_a_function_is_refused() -> None:
    @triton.jit
    def inner(x_ptr):  # type: ignore[no-untyped-def]
        tl.store(x_ptr, 1)

    with pytest.raises(CompileError, match="inner cannot be compiled in another process"):
        request_of(only(inner, x_ptr=meta(4)), 90)


def test_a_hang_ends_at_the_time_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sleepy_kernel.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.syspath_prepend(tmp_path)
    began = time.monotonic()
    with CompilerPool(workers=1, timeout_s=4) as small, pytest.raises(CompileError, match="took longer than 4 s"):
        small._compile(
            Request(module="sleepy_kernel", function="f", arguments={}, constants={}, options={}, architecture=90)
        )
    assert time.monotonic() - began < 30


def test_a_compiler_that_dies_is_told_and_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "deadly_kernel.py").write_text(
        "import os, sys\nprint('LLVM ERROR: out of ideas', file=sys.stderr, flush=True)\nos.abort()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    deadly = Request(module="deadly_kernel", function="f", arguments={}, constants={}, options={}, architecture=90)
    with CompilerPool(workers=1, cache_folder=tmp_path / "cache") as small:
        with pytest.raises(
            CompileError, match=r"compiler died on deadly_kernel\.f.*: SIGABRT, LLVM ERROR: out of ideas"
        ):
            small._compile(deadly)
        assert_elf(small._compile(request_of(launch(), 80)))


def test_closing_ends_the_processes() -> None:
    small = CompilerPool(workers=1)
    future = small.submit(launch(), 120)
    while not small._started:
        time.sleep(0.01)
    small.close()
    assert not small._started[0].alive
    assert isinstance(future.exception(), CompileError)


def test_one_launch_alone_compiles_under_the_interpreter_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = (
        "from autotune.ahead_of_time import compile_launch\nfrom tests.autotune.test_ahead_of_time import launch\n"
        "print('cubin' if compile_launch(launch(), 80).cubin.startswith(b'\\x7fELF') else 'none')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.stdout == "cubin\n", done.stderr


def test_rms_norm_compiles_everywhere(pool: CompilerPool) -> None:
    kernel = RmsNorm()
    case = Case(dtype="bfloat16", dims={"rows": 16, "hidden": 640, "residual": 1})
    described = []
    for architecture in ARCHITECTURES:
        config = kernel.default(case, next(gpu for gpu in GPUS.values() if gpu.architecture == architecture))
        tensors = kernel.inputs(case, device="meta") | kernel.outputs(case, config, device="meta")
        described += [(launch, architecture) for launch in kernel.launches(case, config, tensors)]
    for compiled in pool.compile_all(described):
        assert isinstance(compiled, Compiled), compiled
        assert_elf(compiled)
        assert [parameter.name for parameter in compiled.parameters][-3:] == ["rows", "hidden", "eps"]


@pytest.mark.gpu
def test_a_launch_finds_what_was_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tensors = {"x_ptr": torch.ones(256, dtype=torch.bfloat16, device="cuda"), "y_ptr": torch.zeros(256, device="cuda")}
    hits: list[bool] = []
    with CompilerPool(workers=1) as small:
        for changes in ({"n": 99, "stride": 1}, {"n": 112, "stride": 2}):
            small.submit(launch(**changes), present().architecture).result()  # from meta tensors
            with monkeypatch.context() as patched:
                listen = lambda *arguments, cache_hit, **facts: hits.append(cache_hit)  # noqa: E731
                patched.setattr(triton.knobs.compilation, "listener", listen)
                launch(**tensors, **changes).run()
    assert hits == [True, True]
    assert tensors["y_ptr"][:112].tolist() == [20.0] * 112  # (1 + 1) x 2 + 16
