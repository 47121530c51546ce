"""The tuned kernels of a TensorRT bundle: ``kernels.json`` and a cubin for each variant and architecture.

Dimensions in formulas: B sequences, S tokens of each in a chunk, N pictures. Parameters: ``scale`` of the scores, ``eps``.

Which configuration a variant has is looked up for every size that records tell apart, from the smallest to the
largest, and neighbours with the same configuration are one variant. Cubins carry no line numbers: those would hold the
paths of the host that built them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from autotune import record_file
from autotune.ahead_of_time import Compiled, CompilerPool, request_of
from autotune.gpu import GPUS, OLDEST, Gpu
from autotune.kernel import Case, Config, Kernel
from autotune.kernels.cache_write import CacheWrite
from autotune.kernels.decode_attention import LOG2_E
from autotune.kernels.pool_norm import EPS, PoolNorm
from autotune.kernels.window_decode import WindowDecode
from autotune.kernels.window_prefill import WindowPrefill
from autotune.launch import Launch
from autotune.launch_template import Dimension, Parameter, Piece, template
from autotune.model_shapes import ModelShapes
from autotune.record_file import GpuModel, Records
from autotune.record_store import Choice, RecordStore, triton_version
from runtimes.errors import UsageError
from runtimes.gpu.kernel_file import (
    KERNELS_NAME,
    KernelFacts,
    KernelFile,
    KernelVariant,
    TuningFacts,
    cubin_name,
    hash_of,
)
from runtimes.progress import SILENT, Progress
from runtimes.version import __version__

RECORDS_NAME = "tuning-records.json"
MOST_IMAGES = 16


@dataclass(frozen=True, kw_only=True)
class Need:
    """A kernel that a model needs.

    Args:
        steps: pairs of the condition up to which a configuration is looked up, and the case to look it up for; in
            ascending order, the last without a condition.
        dimensions, parameters: as :func:`autotune.launch_template.template` has them.
    """

    kernel: Kernel
    steps: tuple[tuple[str | None, Case], ...]
    dimensions: Mapping[str, Dimension]
    parameters: Mapping[str, Parameter]


@dataclass(frozen=True, kw_only=True)
class KernelsFacts:
    """What was written.

    Args:
        hash: sha256 of ``kernels.json``: what the plugin nodes carry.
        file: its name in the folder.
        tuning_records: names of files that hold the records used; none where all configurations are heuristics.
        cubins, cubin_bytes: how many files, and their size together.
        warnings: what is less than it could be, each once.
    """

    hash: str
    file: str
    tuning_records: tuple[str, ...]
    cubins: int
    cubin_bytes: int
    warnings: tuple[str, ...]


def write_kernels(
    folder: Path,
    model: ModelShapes,
    architectures: Sequence[int],
    *,
    max_batch: int,
    chunk: int,
    max_images: int = MOST_IMAGES,
    records: RecordStore | None = None,
    workers: int | None = None,
    progress: Progress = SILENT,
) -> KernelsFacts:
    """Compiles every kernel that the plugins launch and writes them into ``folder``. Equal calls write equal bytes.

    Args:
        architectures: 90 for sm_90.
        max_batch: the most sequences of a call.
        chunk: the most tokens of a sequence in a call.
        max_images: the most pictures of a call.
        records: None takes the user's and the shipped ones.
        workers: processes that compile; None takes one a core.

    Raises:
        UsageError: an architecture that the kernels do not run on.
        CompileError: Triton refuses a kernel.
    """
    records = records or RecordStore()
    gpus = [gpu_of(architecture, records) for architecture in sorted(set(architectures))]
    needs = needs_of(model, max_batch=max_batch, chunk=chunk, max_images=max_images)
    with _without_line_numbers(), CompilerPool(workers=workers) as pool:
        writer = _Writer(pool, records)
        plans = [(need, gpu, writer.planned(need, gpu)) for need in needs for gpu in gpus]
        with progress.task("compiling kernels", total=len(plans), unit="steps") as advance:
            variants: dict[str, list[KernelVariant]] = {need.kernel.name: [] for need in needs}
            for need, _, planned in plans:
                variants[need.kernel.name] += [writer.variant(each) for each in planned]
                advance(1)
    file = KernelFile(
        producer={"gemma3c": __version__, "triton": triton_version()},
        kernels={need.kernel.name: _facts(need, variants[need.kernel.name]) for need in needs},
    )
    return writer.write(folder, file)


def needs_of(model: ModelShapes, *, max_batch: int, chunk: int, max_images: int = MOST_IMAGES) -> tuple[Need, ...]:
    """The kernels of a model, and for which sizes."""
    batch = Dimension(name="B", low=1, high=max_batch)
    needs = [_prefill(model, batch, chunk), _cache_write(model, batch, chunk), _decode(model, batch)]
    if model.vision is not None:
        needs.append(_pool(model, Dimension(name="N", low=1, high=max_images)))
    return tuple(needs)


def _prefill(model: ModelShapes, batch: Dimension, chunk: int) -> Need:
    """A model with pictures reads each row's end from memory, which a chunk of text has too: the plan has one input."""
    dims = {"batch": 1, "chunk": chunk, "start": 0, "heads": model.heads, "kv_heads": model.kv_heads}
    dims |= {"head_dim": model.head_dim, "window": model.window, "images": int(model.vision is not None), "ragged": 0}
    steps = [(f"B * S <= {most}", dims | {"chunk": most}) for most in _powers(batch.high * chunk)]
    return Need(
        kernel=WindowPrefill(),
        steps=_steps(steps),
        dimensions={"batch": batch, "chunk": Dimension(name="S", low=1, high=chunk)},
        parameters={
            "scale": Parameter(name="scale", formula=f"scale * {LOG2_E!r}", value=model.head_dim**-0.5),
        },
    )


def _cache_write(model: ModelShapes, batch: Dimension, chunk: int) -> Need:
    dims = {"batch": 1, "tokens": chunk, "kv_heads": model.kv_heads, "head_dim": model.head_dim, "window": model.window}
    steps = []
    for most in _powers(batch.high * min(chunk, model.window)):
        tokens = min(most, model.window)
        rows = dims | {"batch": most // tokens, "tokens": tokens}
        steps.append((f"B * min(S, {model.window}) <= {most}", rows))
    return Need(
        kernel=CacheWrite(),
        steps=_steps(steps),
        dimensions={"batch": batch, "tokens": Dimension(name="S", low=1, high=chunk)},
        parameters={},
    )


def _decode(model: ModelShapes, batch: Dimension) -> Need:
    """For rings that are full, as they are for most of a long text."""
    dims = {"batch": 1, "heads": model.heads, "kv_heads": model.kv_heads, "head_dim": model.head_dim}
    dims |= {"slots": model.window, "keys": model.window, "scale_dim": model.query_pre_attn_scalar}
    scale = model.query_pre_attn_scalar**-0.5
    return Need(
        kernel=WindowDecode(),
        steps=_steps([(f"B <= {most}", dims | {"batch": most}) for most in _powers(batch.high)]),
        dimensions={"batch": batch},
        parameters={"scale_log2": Parameter(name="scale", formula=f"scale * {LOG2_E!r}", value=scale)},
    )


def _pool(model: ModelShapes, images: Dimension) -> Need:
    kernel = PoolNorm()
    (use,) = kernel.uses(model, "vision", batch=1, context=0, dtype="bfloat16")
    steps = [(f"N <= {most}", dict(use.case.dims) | {"images": most}) for most in _powers(images.high)]
    return Need(
        kernel=kernel,
        steps=_steps(steps),
        dimensions={"images": images},
        parameters={"eps": Parameter(name="eps", formula="eps", value=EPS)},
    )


def _powers(high: int) -> list[int]:
    """Powers of two up to the first that reaches ``high``."""
    return [2**n for n in range((high - 1).bit_length() + 1)]


def _steps(pairs: Sequence[tuple[str, Mapping[str, int]]]) -> tuple[tuple[str | None, Case], ...]:
    last = len(pairs) - 1
    return tuple(
        (None if number == last else when, Case(dtype="bfloat16", dims=dims))
        for number, (when, dims) in enumerate(pairs)
    )


def gpu_of(architecture: int, records: RecordStore) -> Gpu:
    """The GPU model that stands for an architecture: one that was tuned, the user's before a shipped one, or a known one.

    Raises:
        UsageError: the architecture is too old, or not known.
    """
    capability = divmod(architecture, 10)
    if capability < OLDEST:
        raise UsageError(
            f"sm_{architecture} has no bf16 products, which the kernels need: sm_{OLDEST[0]}{OLDEST[1]} is the oldest"
        )
    known = [gpu for gpu in GPUS.values() if gpu.compute_capability[0] == capability[0]]
    if not known:
        have = ", ".join(sorted({f"sm_{gpu.architecture}" for gpu in GPUS.values()}))
        raise UsageError(f"no kernels are known to run on sm_{architecture}", hint=f"known are {have} and their kin")
    near = min(known, key=lambda gpu: abs(gpu.compute_capability[1] - capability[1]))
    models = [model for origin in ("user", "shipped") for model in records.records(origin)]
    tuned = next((model for model in models if model.compute_capability == capability), None)
    if tuned is None:
        return near if near.compute_capability == capability else replace(near, compute_capability=capability)
    same = next((gpu for gpu in known if gpu.name == tuned.name), near)
    return replace(same, name=tuned.name, compute_capability=capability, multiprocessors=tuned.multiprocessors)


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """A variant whose cubins are being compiled."""

    when: tuple[str, ...]
    piece: Piece
    compiled: tuple[Future[Compiled], ...]
    tuning: TuningFacts


class _Writer:
    def __init__(self, pool: CompilerPool, records: RecordStore) -> None:
        self._pool = pool
        self._records = records
        self._pieces: dict[str, tuple[Piece, ...]] = {}
        self._compiled: dict[str, Future[Compiled]] = {}
        self._cubins: dict[str, bytes] = {}
        self._used: Records = {}
        self._warnings: dict[str, None] = {}

    def planned(self, need: Need, gpu: Gpu) -> list[_Planned]:
        """All variants of one kernel for one GPU; they begin to be compiled."""
        variants = []
        for when, choice in self._choices(need, gpu):
            for piece in self._template(need, choice.config):
                compiled = tuple(
                    self._compile(traced.launch, traced.varying, gpu.architecture) for traced in piece.launches
                )
                tuning = self._tuning(choice, gpu)
                variants.append(_Planned(when=when, piece=piece, compiled=compiled, tuning=tuning))
        return variants

    def variant(self, planned: _Planned) -> KernelVariant:
        """Waits for its cubins."""
        compiled = [future.result() for future in planned.compiled]
        self._cubins |= {hash_of(each.cubin): each.cubin for each in compiled}
        return planned.piece.variant(compiled, planned.tuning, when=planned.when)

    def write(self, folder: Path, file: KernelFile) -> KernelsFacts:
        """Writes the file, its cubins, and the records that its configurations came from."""
        text = file.dumps()
        (folder / KERNELS_NAME).write_bytes(text)
        for digest in file.cubins:
            path = folder / cubin_name(digest)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._cubins[digest])
        names: tuple[str, ...] = ()
        if self._used:
            ordered = sorted(self._used.items(), key=lambda item: item[0].name)
            record_file.write(folder / RECORDS_NAME, {model: dict(sorted(found.items())) for model, found in ordered})
            names = (RECORDS_NAME,)
        return KernelsFacts(
            hash=hash_of(text),
            file=KERNELS_NAME,
            tuning_records=names,
            cubins=len(file.cubins),
            cubin_bytes=sum(len(self._cubins[digest]) for digest in file.cubins),
            warnings=tuple(self._warnings),
        )

    def _choices(self, need: Need, gpu: Gpu) -> Iterator[tuple[tuple[str, ...], Choice]]:
        """Conditions and configurations; steps that follow each other and agree are one."""
        best = [(when, self._records.best(need.kernel, case, gpu)) for when, case in need.steps]
        for (when, choice), (_, following) in zip(best, [*best[1:], (None, None)], strict=True):
            self._warnings |= dict.fromkeys(choice.warnings)
            if following is None or following.config != choice.config:
                yield (() if when is None else (when,)), choice

    def _template(self, need: Need, config: Config) -> tuple[Piece, ...]:
        """The same for every GPU that runs the same configuration."""
        key = f"{need.kernel.name} {config}"
        if key not in self._pieces:
            case = need.steps[-1][1]
            self._pieces[key] = template(need.kernel, case, config, need.dimensions, need.parameters)
        return self._pieces[key]

    def _compile(self, launch: Launch, varying: frozenset[str], architecture: int) -> Future[Compiled]:
        key = repr(request_of(launch, architecture, varying=varying))
        if key not in self._compiled:
            self._compiled[key] = self._pool.submit(launch, architecture, varying=varying)
        return self._compiled[key]

    def _tuning(self, choice: Choice, gpu: Gpu) -> TuningFacts:
        config = dict(choice.config.constants)
        config |= {"num_warps": choice.config.num_warps, "num_stages": choice.config.num_stages}
        record = choice.record
        if record is None or choice.origin == "heuristic":
            return TuningFacts(config=config, origin="heuristic", gpu=gpu.name)
        model = self._model_of(choice)
        self._used.setdefault(model, {})[record.key] = record
        key = dict(zip(("kernel", "source_hash", "triton", "dtype", "bucket"), record.key, strict=True))
        return TuningFacts(config=config, origin=choice.origin, gpu=gpu.name, record=key | {"gpu": model.name})

    def _model_of(self, choice: Choice) -> GpuModel:
        assert choice.origin != "heuristic", "a heuristic has no record"
        for model, found in self._records.records(choice.origin).items():
            if any(record is choice.record for record in found.values()):
                return model
        raise AssertionError("a record that was chosen is one of the store")


def _facts(need: Need, variants: Sequence[KernelVariant]) -> KernelFacts:
    return KernelFacts(
        dimensions={dimension.name: (dimension.low, dimension.high) for dimension in need.dimensions.values()},
        parameters=tuple(parameter.name for parameter in need.parameters.values()),
        variants=tuple(variants),
    )


@contextmanager
def _without_line_numbers() -> Iterator[None]:
    """For processes that are started inside: their cubins are the same wherever the sources lie, and half as large."""
    name = "TRITON_DISABLE_LINE_INFO"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
