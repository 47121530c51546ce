"""``manifest.json``: what a runtime must know of a bundle, as frozen dataclasses.

The runtime learns everything from here (layer pattern, cache shapes, window, end tokens), never from
the model's configuration. ``schema/manifest.schema.json`` is the published JSON Schema of the same
fields; docs/bundle-format.md explains them. A change of any field raises ``SCHEMA_VERSION``; all versions up to it are
read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

from runtimes import records
from runtimes.errors import BundleError
from runtimes.version import __version__

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"

Target = Literal["ort", "trt", "cuda"]
Scalar = bool | int | float | str

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class TokenFacts:
    """Token ids with a meaning of their own. The image ids are None in a text-only bundle."""

    bos: int
    pad: int
    unk: int
    end: tuple[int, ...]
    start_of_image: int | None = None
    end_of_image: int | None = None
    image: int | None = None

    def __post_init__(self) -> None:
        if not self.end:
            raise BundleError("`tokens.end` must name at least one token that ends a text, but it is empty")


@dataclass(frozen=True, kw_only=True)
class PanAndScanFacts:
    """When and how a picture is cut into crops; the three thresholds have transformers' names.

    ``enabled`` is the default of this bundle; a caller may switch it.
    """

    enabled: bool = False
    min_crop_size: int = 256
    max_num_crops: int = 4
    min_ratio_to_activate: float = 1.2

    def __post_init__(self) -> None:
        _at_least(self, 1, "min_crop_size", "max_num_crops")


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """How a picture becomes pixels: (value * rescale - mean) / std at ``size`` x ``size``."""

    size: int
    tokens_per_image: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float
    resample: Literal["bilinear", "bicubic"]
    pan_and_scan: PanAndScanFacts

    def __post_init__(self) -> None:
        _at_least(self, 1, "size", "tokens_per_image")
        if min(self.std) <= 0:
            raise BundleError(f"`min(std) > 0` must hold, but got {self.std}")


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """One layer's cache: [B, kv_heads, slots, head_dim] for keys and for values.

    A local layer holds ``window`` slots (the window counts the query itself); a global layer holds as
    many as the context that the session asks for, and its ``window`` is None.
    """

    kind: Literal["local", "global"]
    kv_heads: int
    head_dim: int
    window: int | None

    def __post_init__(self) -> None:
        _at_least(self, 1, "kv_heads", "head_dim")
        if (self.window is None) != (self.kind == "global"):
            raise BundleError(f"a local layer has a window and a global one has none, but got {self}")
        if self.window is not None and self.window < 1:
            raise BundleError(f"`window >= 1` must hold, but got {self.window}")


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The model, as far as a runtime must know it. ``image`` is None for a text-only bundle."""

    name: str
    vocab_size: int
    hidden_size: int
    max_context: int
    layers: tuple[LayerFacts, ...]
    tokens: TokenFacts
    image: ImageFacts | None

    def __post_init__(self) -> None:
        _at_least(self, 1, "vocab_size", "hidden_size", "max_context")
        if not self.layers:
            raise BundleError("`len(layers) >= 1` must hold, but there is no layer")
        image_ids = (self.tokens.start_of_image, self.tokens.end_of_image, self.tokens.image)
        if self.image is not None and None in image_ids:
            raise BundleError(f"a bundle that takes pictures needs the three image token ids, but got {image_ids}")
        for token in (*self.tokens.end, self.tokens.bos, self.tokens.pad, self.tokens.unk, *image_ids):
            if token is not None and not 0 <= token < self.vocab_size:
                raise BundleError(f"`0 <= token < {self.vocab_size}` must hold for special tokens, but got {token}")


@dataclass(frozen=True, kw_only=True)
class CacheFacts:
    """How keys and values lie in memory.

    ``compact``: row i holds position T - L + i, as GroupQueryAttention keeps its window. ``ring``: position
    p lies in slot p mod W. ``linear``: position p lies in slot p.
    """

    dtype: Literal["float32", "bfloat16"]
    local_layout: Literal["compact", "ring"]
    global_layout: Literal["linear"] = "linear"


@dataclass(frozen=True, kw_only=True)
class TensorFacts:
    """An input or output of a stage. A string in ``shape`` names a dimension that may vary."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class StageFacts:
    """One compiled stage: the file that holds its graph, its signature in order, and for ``trt`` the plan made from it."""

    graph: str
    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]
    plan: str | None = None


@dataclass(frozen=True, kw_only=True)
class WeightFacts:
    """The one file of weights, and the ledger that says for each tensor what was done to it.

    ``dtype`` is how the linear layers were stored; ``kept`` means on the checkpoint's own grid.
    """

    file: str
    dtype: Literal["float32", "bfloat16", "int8", "int4", "fp8", "kept"]
    ledger: str


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """The tokenizer's file, and the chat template's name."""

    file: str
    kind: Literal["sentencepiece"] = "sentencepiece"
    template: Literal["gemma3"] = "gemma3"


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """What a file of the bundle must be."""

    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.sha256):
            raise BundleError(f"`sha256` must be 64 lower-case hexadecimal digits, but got {self.sha256[:80]!r}")
        if self.bytes < 0:
            raise BundleError(f"`bytes >= 0` must hold, but got {self.bytes}")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A whole bundle. ``files`` names every file but ``manifest.json``; the writer fills it in.

    ``producer`` maps ``gemma3c`` and the packages that took part to their versions, and ``checkpoint`` to what
    the bundle was built from. ``created`` is None
    unless SOURCE_DATE_EPOCH was set, so that equal builds are equal bytes. ``probes`` names, for a stage,
    the values that validation may ask for. ``settings`` holds scalars that only this target reads.
    """

    producer: Mapping[str, str]
    target: Target
    model: ModelFacts
    caches: CacheFacts
    stages: Mapping[str, StageFacts]
    weights: WeightFacts
    tokenizer: TokenizerFacts | None
    created: str | None = None
    probes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    gpu_architectures: tuple[str, ...] = ()
    tuning_records: tuple[str, ...] = ()
    receipt: str | None = None
    files: Mapping[str, FileFacts] = field(default_factory=dict)
    schema_version: Literal[1, 2] = 2

    def __post_init__(self) -> None:
        if "gemma3c" not in self.producer:
            raise BundleError("`producer` must name the version of gemma3c, but it does not")
        if "decoder" not in self.stages:
            raise BundleError(f"a bundle needs the stage 'decoder', but has {sorted(self.stages) or 'none'}")
        for stage in self.probes:
            if stage not in self.stages:
                raise BundleError(f"`probes` names the stage {stage!r}, but the stages are {sorted(self.stages)}")
        for place, name in self.references():
            check_name(name, place=place)
        for name in self.files:
            check_name(name, place="files")
            if name == MANIFEST_NAME:
                raise BundleError(f"`files` must not name {MANIFEST_NAME}, which cannot hold its own hash")

    def references(self) -> Iterator[tuple[str, str]]:
        """Every (field, file name) at which the manifest points to a file."""
        for stage, facts in self.stages.items():
            yield f"stages[{stage!r}].graph", facts.graph
            if facts.plan is not None:
                yield f"stages[{stage!r}].plan", facts.plan
        yield "weights.file", self.weights.file
        yield "weights.ledger", self.weights.ledger
        if self.tokenizer is not None:
            yield "tokenizer.file", self.tokenizer.file
        if self.receipt is not None:
            yield "receipt", self.receipt
        for i, record in enumerate(self.tuning_records):
            yield f"tuning_records[{i}]", record

    def check_references(self) -> None:
        """Raises BundleError where the manifest points to a file that ``files`` does not list."""
        for place, name in self.references():
            if name not in self.files:
                raise BundleError(f"`{place}` names the file {name!r}, but `files` does not list it")

    def to_json(self) -> dict[str, Any]:
        """As ``json.dumps`` takes it, ``schema_version`` first."""
        data = records.to_json(self)
        return {"schema_version": data.pop("schema_version"), **data}

    def dumps(self) -> bytes:
        """The bytes of ``manifest.json``."""
        return (json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_json(cls, data: Any, *, where: str = MANIFEST_NAME) -> Manifest:
        """Reads what ``to_json`` gave.

        Raises:
            BundleError: written for a newer schema (the message names the version that made it); a field is
                missing, unknown or mistyped; or a file's name leaves the bundle.
        """
        check_schema_version(data, where=where)
        return records.from_json(cls, data, where=where)

    @classmethod
    def loads(cls, text: bytes, *, where: str = MANIFEST_NAME) -> Manifest:
        """Reads the bytes of a ``manifest.json``; raises BundleError as ``from_json`` does, or where it is no JSON."""
        try:
            data = json.loads(text.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_pairs)
        except (ValueError, RecursionError) as error:
            raise BundleError(
                f"{where} is not valid JSON: {error}", hint="the file is damaged: build the bundle again"
            ) from error
        return cls.from_json(data, where=where)


def check_schema_version(data: Any, *, where: str) -> None:
    """Raises BundleError unless ``data`` is a manifest of a schema that this version reads."""
    if not isinstance(data, dict):
        raise BundleError(f"{where}: expected an object, but got a {type(data).__name__}")
    version = data.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(f"{where}: `schema_version` must be a whole number from 1 up, but got {version!r}")
    if version > SCHEMA_VERSION:
        producer = data.get("producer")
        maker = producer.get("gemma3c") if isinstance(producer, dict) else None
        raise BundleError(
            f"{where} has schema version {version}, written by gemma3c {maker or '(unnamed)'}, "
            f"but gemma3c {__version__} reads versions up to {SCHEMA_VERSION}",
            hint=f"pip install --upgrade 'gemma3-compile{f'>={maker}' if maker else ''}', or build the bundle again",
        )


def check_name(name: str, *, place: str) -> None:
    """Raises BundleError unless ``name`` is a relative path that stays inside the bundle, written with ``/``."""
    parts = name.split("/")
    inside = all(part not in ("", ".", "..") for part in parts) and not PurePosixPath(name).is_absolute()
    if not inside or "\\" in name or ":" in name or any(ord(c) < 32 for c in name):
        raise BundleError(
            f"`{place}` names the file {name!r}, which is not a plain path inside the bundle",
            hint="do not load this bundle: it was damaged, or made to reach other files",
        )


def _at_least(facts: object, low: int, *names: str) -> None:
    for name in names:
        value = getattr(facts, name)
        if value < low:
            raise BundleError(f"`{name} >= {low}` must hold, but got {value}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r} stands twice in one object")
    return data
