"""Every registered kernel becomes a cubin that fits, on each architecture: as the heuristic has it, and as recorded.

What a kernel does not refuse must run, so this holds :meth:`Kernel.refusal` to its word too. A record is compiled for the
architectures that it can be handed to; ``python -m tests.autotune.compilations`` compiles each for all six.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from autotune.ahead_of_time import Compiled, CompilerPool
from autotune.gpu import GPUS, Gpu
from autotune.kernel import Kernel
from autotune.record_file import GpuModel, Records
from autotune.record_store import RecordStore
from autotune.registry import KERNELS
from gemma3_compile.model_shapes import model_shapes
from gemma3_compile.presets import PRESETS
from tests.autotune.compilations import FAMILIES, SIZES, Compilation, default_compilations, recorded_compilations

MODELS = [model_shapes(PRESETS[size]) for size in SIZES]
REGISTERS = 65536
"""What one block may have, on every architecture from SM 80."""


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CompilerPool]:
    with CompilerPool(cache_folder=tmp_path_factory.mktemp("cache")) as made:
        yield made


@pytest.fixture(scope="module")
def shipped() -> Records:
    return RecordStore().records("shipped")


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
def test_heuristics_compile_and_fit(pool: CompilerPool, kernel: Kernel) -> None:
    compilations = default_compilations(kernel, MODELS)
    assert compilations, f"no model uses {kernel.name}"
    check(pool, compilations)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
def test_recorded_configurations_compile_and_fit(pool: CompilerPool, shipped: Records, kernel: Kernel) -> None:
    check(pool, recorded_compilations(kernel, shipped))


def test_cubins_of_80_need_as_much_shared_memory_as_those_of_86_and_89(pool: CompilerPool) -> None:
    """Why recorded configurations are compiled once for the three."""
    launches = [
        made.launch
        for name in ("window_decode", "siglip_attention", "rms_norm")
        for made in default_compilations(KERNELS[name], MODELS)
        if made.architecture == 80
    ]
    for launch in launches:
        first, *others = (r for r in pool.compile_all([(launch, a) for a in FAMILIES[0]]) if isinstance(r, Compiled))
        assert [other.shared_bytes for other in others] == [first.shared_bytes] * 2


def test_recorded_configurations_run_where_they_were_recorded(
    shipped: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # which runs no Gluon, and so refuses it
    for model, records in shipped.items():
        for record in records.values():
            kernel = KERNELS.get(record.kernel)
            assert kernel is not None, f"{model.name} has a record of {record.kernel}, which is no kernel"
            refused = kernel.refusal(record.case, record.config, _gpu_of(model))
            assert refused is None, f"{model.name}, {record.kernel}, {record.config}: {refused}"


def check(pool: CompilerPool, compilations: Sequence[Compilation]) -> None:
    """Fails with all that do not compile or do not fit, in one list."""
    results = pool.compile_all([(made.launch, made.architecture) for made in compilations])
    faults = []
    for made, result in zip(compilations, results, strict=True):
        if not isinstance(result, Compiled):
            faults.append(f"{made}: {result.message}")
            continue
        if result.shared_bytes > made.shared_bytes:
            faults.append(f"{made}: {result.shared_bytes} bytes of shared memory, of {made.shared_bytes}")
        if (registers := result.registers * 32 * result.num_warps) > REGISTERS:
            faults.append(f"{made}: {registers} registers in a block, of {REGISTERS}")
    assert not faults, "\n".join(faults)


def _gpu_of(model: GpuModel) -> Gpu:
    return next(gpu for gpu in GPUS.values() if gpu.name == model.name)
