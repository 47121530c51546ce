"""Where the interpreter takes weights from: the bundle's weights file, or the initializers of the ONNX file.

Both are mapped into memory: a tensor costs nothing until it is read, and nothing after it is let go.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from graphs.trt.interpreter.rule import DTYPES, InterpreterError, Layer, TensorFacts
from runtimes.errors import BundleError

_ONNX: Mapping[int, str] = MappingProxyType(
    {
        1: "FLOAT",
        2: "UINT8",
        3: "INT8",
        6: "INT32",
        7: "INT64",
        9: "BOOL",
        10: "HALF",
        16: "BF16",
        17: "FP8",
        22: "INT4",
    }
)
"""TensorRT's name for an ONNX type of elements."""


class FileWeights:
    """Weights that are inputs of a network: entries of a safetensors file, by name.

    Raises:
        BundleError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._path = path
        try:
            self._file: Any = safe_open(str(path), "pt")
        except (OSError, SafetensorError) as error:
            raise BundleError(f"{path}: the weights cannot be read: {error}") from error

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self._file.keys())

    def read(self, tensor: TensorFacts) -> Tensor:
        """The entry that an input of this name, type and shape takes.

        An input is named as its entry, perhaps with something after an ``@``. int4 comes out one number a byte.

        Raises:
            InterpreterError: there is no such entry, or it is of another type or size.
        """
        entry = tensor.name.partition("@")[0]
        if entry not in self._names:
            raise InterpreterError(f"the network's input `{tensor.name}` is neither fed nor in {self._path.name}")
        found: Tensor = self._file.get_tensor(entry)
        if tensor.dtype == "INT4" and found.dtype == torch.uint8:
            found = unpacked(found)
        if found.dtype != DTYPES[tensor.dtype] or found.numel() != torch.Size(tensor.shape).numel():
            raise InterpreterError(
                f"the network's input `{tensor.name}` is {tensor.dtype} {list(tensor.shape)}, but its entry in "
                f"{self._path.name} is {found.dtype} {list(found.shape)}"
            )
        return found.reshape(tensor.shape)


class InitializerWeights:
    """Constants that TensorRT does not show, from the ONNX file that the network was parsed from.

    Raises:
        BundleError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

        self._path = path
        try:
            model = onnx.load(str(path), load_external_data=False)
        except (OSError, DecodeError) as error:
            raise BundleError(f"{path} cannot be read: {error}") from error
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._maps: dict[str, memoryview] = {}

    def read(self, layer: Layer) -> Tensor:
        """The initializer of a constant layer's name, flat; int4 comes out one number a byte.

        Raises:
            InterpreterError: there is none, or it is of another type or size.
        """
        (output,) = layer.outputs
        tensor = self._tensors.get(layer.name)
        if tensor is None:
            raise layer.refuse(
                f"TensorRT shows no values of {output.dtype}, and {self._path.name} has none of its name"
            )
        name, count = _ONNX.get(tensor.data_type), torch.Size(tensor.dims).numel()
        if name != output.dtype or count != torch.Size(output.shape).numel():
            raise layer.refuse(f"it is {output.dtype} {list(output.shape)}, but its initializer {name} {tensor.dims}")
        data = self._bytes(tensor)
        if name == "INT4":
            return unpacked(torch.frombuffer(data, dtype=torch.uint8)).flatten()[:count]
        return torch.frombuffer(data, dtype=DTYPES[name], count=count)

    def _bytes(self, tensor: Any) -> memoryview:
        if not tensor.external_data:
            if not tensor.raw_data:
                raise InterpreterError(f"{self._path.name}: the initializer `{tensor.name}` does not hold raw data")
            return memoryview(bytearray(tensor.raw_data))
        where = {entry.key: entry.value for entry in tensor.external_data}
        begin = int(where.get("offset", 0))
        data = self._mapped(where["location"])[begin:]
        return data[: int(where["length"])] if "length" in where else data

    def _mapped(self, location: str) -> memoryview:
        if location not in self._maps:
            path = self._path.parent / location
            try:
                with path.open("rb") as file:
                    # Private pages that are never written: torch takes no memory that it may not write.
                    self._maps[location] = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
            except (OSError, ValueError) as error:
                raise BundleError(f"{path}: the weights cannot be read: {error}") from error
        return self._maps[location]


def unpacked(packed: Tensor) -> Tensor:
    """Signed int4, two in a byte, the low half first: one int8 a number, twice as many along the last dimension."""
    halves = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return (halves ^ 8).to(torch.int8) - 8
