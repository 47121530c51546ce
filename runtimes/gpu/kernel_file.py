"""``kernels.json``: which cubins a folder holds, and how each is launched, as frozen dataclasses.

A kernel is a function of named tensors. It has variants: each is compiled for one architecture and holds for some sizes
of a call (``when``), and the first that holds is the one to launch. What depends on the sizes is written as expressions
(:mod:`runtimes.gpu.expression`) over the kernel's dimensions and parameters: shapes, grids and arguments.

The cubin with the hash H is the file ``cubins/H.cubin`` beside ``kernels.json``. After the listed arguments every cubin
takes two more pointers, to memory for what the kernel itself sets up (global scratch) and for a profiler's (always null).

``schema/kernels.schema.json`` is the published JSON Schema of the same fields.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

from runtimes import records
from runtimes.errors import BundleError
from runtimes.gpu.expression import Values, condition, expression
from runtimes.version import __version__

SCHEMA_VERSION = 1
KERNELS_NAME = "kernels.json"
CUBIN_FOLDER = "cubins"
ALIGNMENT = 256
"""Of every tensor that is a workspace here, in bytes; the kernels ask for 16 of all their tensors."""

ITEM_BYTES: Mapping[str, int] = {
    "bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8, "i1": 1, "i8": 1, "u8": 1, "i16": 2, "i32": 4, "i64": 8,
}  # fmt: skip
Role = Literal["input", "output", "in_place", "workspace", "counter"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_REBUILD = "the file is damaged, or was made by hand: build the bundle again"


@dataclass(frozen=True, kw_only=True)
class KernelTensor:
    """A tensor that a variant reads or writes, contiguous and aligned to 16 bytes.

    A ``workspace`` may hold anything before and after. A ``counter`` is a workspace that holds zeros before the
    launches, and again after them.
    """

    name: str
    type: str
    shape: tuple[str, ...]
    role: Role

    def __post_init__(self) -> None:
        if self.type not in ITEM_BYTES:
            raise BundleError(f"the tensor {self.name} has the type {self.type!r}; known are {', '.join(ITEM_BYTES)}")

    def sizes(self, values: Values) -> tuple[int, ...]:
        """The shape in numbers."""
        return tuple(expression(side).whole(values) for side in self.shape)

    def bytes(self, values: Values) -> int:
        """How much memory it takes."""
        count = 1
        for size in self.sizes(values):
            count *= size
        return count * ITEM_BYTES[self.type]


@dataclass(frozen=True, kw_only=True)
class KernelArgument:
    """A run-time argument: the address of ``tensor`` plus ``offset`` bytes, or the value of an expression.

    ``type`` is Triton's: ``*bf16``, ``i32``, ``fp32``.
    """

    name: str
    type: str
    tensor: str | None = None
    offset: int = 0
    value: str | None = None

    def __post_init__(self) -> None:
        if (self.tensor is None) == (self.value is None):
            raise BundleError(f"the argument {self.name} must be a tensor or a value, and is both or neither")
        if self.type.startswith("*") != (self.tensor is not None):
            raise BundleError(f"the argument {self.name} is {self.type}, which does not go with what it is given")


@dataclass(frozen=True, kw_only=True)
class KernelLaunch:
    """One launch of a variant.

    Args:
        symbol: the function's name in the cubin.
        cubin: sha256 of the cubin.
        arguments: in the cubin's order.
        grid: programs along x, y and z; a program is a block of 32 x ``num_warps`` threads.
        shared_bytes: dynamic shared memory of a block.
        scratch_bytes: global scratch for each program of the grid, aligned to ``scratch_align``.
        dependent: launched so that it may begin before the launch ahead of it ends, for which it waits by itself.
        constants: what was compiled in, for whoever reads this.
    """

    symbol: str
    cubin: str
    arguments: tuple[KernelArgument, ...]
    grid: tuple[str, str, str]
    num_warps: int
    shared_bytes: int
    scratch_bytes: int
    scratch_align: int
    dependent: bool
    constants: Mapping[str, int | float | bool | str | None]

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.cubin):
            raise BundleError(f"`cubin` must be 64 lower-case hexadecimal digits, but is {self.cubin[:80]!r}")
        if not 1 <= self.num_warps <= 32:
            raise BundleError(f"`1 <= num_warps <= 32` must hold, but got {self.num_warps}")

    def programs(self, values: Values) -> tuple[int, int, int]:
        """The grid in numbers."""
        x, y, z = (expression(side).whole(values) for side in self.grid)
        return x, y, z

    def total_scratch_bytes(self, values: Values) -> int:
        """Global scratch of the whole grid."""
        x, y, z = self.programs(values) if self.scratch_bytes else (0, 0, 0)
        return x * y * z * self.scratch_bytes


@dataclass(frozen=True, kw_only=True)
class TuningFacts:
    """Where a variant's configuration came from.

    Args:
        config: constants, ``num_warps`` and ``num_stages``.
        origin: whose record it is, or the kernel's own heuristic.
        gpu: the model that the configuration was chosen for.
        record: the record's key: kernel, source_hash, triton, dtype, bucket, and the gpu that it was measured on.
    """

    config: Mapping[str, int]
    origin: Literal["user", "shipped", "heuristic"]
    gpu: str
    record: Mapping[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class KernelVariant:
    """A kernel compiled for one architecture (90 for sm_90), right for calls that meet all conditions of ``when``."""

    architecture: int
    when: tuple[str, ...]
    tensors: tuple[KernelTensor, ...]
    launches: tuple[KernelLaunch, ...]
    tuning: TuningFacts

    def __post_init__(self) -> None:
        names = [tensor.name for tensor in self.tensors]
        used = [a.tensor for launch in self.launches for a in launch.arguments if a.tensor is not None]
        for name in used:
            if names.count(name) != 1:
                raise BundleError(
                    f"an argument points to the tensor {name!r}, which is listed {names.count(name)} times"
                )

    def holds(self, values: Values) -> bool:
        """Whether it is right for a call of these sizes."""
        return all(condition(text)(values) for text in self.when)

    def workspace(self, values: Values) -> tuple[Mapping[str, int], tuple[int, ...], int]:
        """Where its workspaces begin, where each launch's global scratch does, and the bytes of all together."""
        begins, end = self._laid_out("workspace", values)
        scratch = []
        for launch in self.launches:
            end = _aligned(end, max(launch.scratch_align, ALIGNMENT))
            scratch.append(end)
            end += launch.total_scratch_bytes(values)
        return begins, tuple(scratch), _aligned(end, ALIGNMENT)

    def counters(self, values: Values) -> tuple[Mapping[str, int], int]:
        """Where its counters begin, and the bytes of all together."""
        return self._laid_out("counter", values)

    def _laid_out(self, role: Role, values: Values) -> tuple[dict[str, int], int]:
        end = 0
        begins: dict[str, int] = {}
        for tensor in self.tensors:
            if tensor.role == role:
                begins[tensor.name] = end
                end = _aligned(end + tensor.bytes(values), ALIGNMENT)
        return begins, end


@dataclass(frozen=True, kw_only=True)
class KernelFacts:
    """A kernel: the least and the largest value of each dimension, the parameters of a call, and all variants."""

    dimensions: Mapping[str, tuple[int, int]]
    parameters: tuple[str, ...]
    variants: tuple[KernelVariant, ...]

    def __post_init__(self) -> None:
        known = {*self.dimensions, *self.parameters}
        for low, high in self.dimensions.values():
            if not 1 <= low <= high:
                raise BundleError(f"`1 <= low <= high` must hold for a dimension, but got {low} and {high}")
        for text, names in self._texts():
            if not names <= known:
                raise BundleError(
                    f"`{text}` names {', '.join(sorted(names - known))}, which is no dimension of the kernel"
                )

    @property
    def largest(self) -> Values:
        """The largest value of each dimension."""
        return {name: high for name, (_, high) in self.dimensions.items()}

    def variant(self, architecture: int, values: Values) -> KernelVariant | None:
        """The one for a call; None where none of this architecture holds."""
        fitting = (v for v in self.variants if v.architecture == architecture and v.holds(values))
        return next(fitting, None)

    def _texts(self) -> Iterator[tuple[str, frozenset[str]]]:
        for variant in self.variants:
            yield from ((text, condition(text).names) for text in variant.when)
            texts = [side for tensor in variant.tensors for side in tensor.shape]
            for launch in variant.launches:
                texts += launch.grid
                texts += [a.value for a in launch.arguments if a.value is not None]
            yield from ((text, expression(text).names) for text in texts)


@dataclass(frozen=True, kw_only=True)
class KernelFile:
    """The whole file. ``producer`` maps gemma3c and triton to their versions."""

    producer: Mapping[str, str]
    kernels: Mapping[str, KernelFacts]
    schema_version: Literal[1] = 1

    @property
    def architectures(self) -> tuple[int, ...]:
        """Those that any variant is compiled for, ascending."""
        return tuple(sorted({v.architecture for facts in self.kernels.values() for v in facts.variants}))

    @property
    def cubins(self) -> tuple[str, ...]:
        """Hashes of all cubins, ascending."""
        every = (variant for facts in self.kernels.values() for variant in facts.variants)
        return tuple(sorted({launch.cubin for variant in every for launch in variant.launches}))

    def kernel(self, name: str) -> KernelFacts:
        """The kernel of that name; raises BundleError where there is none."""
        if name not in self.kernels:
            raise BundleError(f"{KERNELS_NAME} has no kernel {name!r}; it has {', '.join(self.kernels) or 'none'}")
        return self.kernels[name]

    def dumps(self) -> bytes:
        """The bytes of ``kernels.json``."""
        data = records.to_json(self)
        whole = {"schema_version": data.pop("schema_version"), **data}
        return (json.dumps(whole, indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def loads(cls, text: bytes, *, where: str = KERNELS_NAME) -> KernelFile:
        """Reads what ``dumps`` gave.

        Raises:
            BundleError: it is no JSON, of another schema version, or a field is missing, unknown, mistyped or wrong.
        """
        try:
            data = json.loads(text.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{where} is not valid JSON: {error}", hint=_REBUILD) from error
        _check_version(data, where)
        return records.from_json(cls, data, where=where)


def hash_of(text: bytes) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    return sha256(text).hexdigest()


def cubin_name(digest: str) -> str:
    """The file of a cubin, relative to the folder of ``kernels.json``."""
    return f"{CUBIN_FOLDER}/{digest}.cubin"


def _check_version(data: Any, where: str) -> None:
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{where} has schema version {version!r}, but gemma3c {__version__} reads version {SCHEMA_VERSION}",
            hint="build the bundle again, or install the gemma3-compile that made it",
        )


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
