"""Nano's networks as TensorRT's parser reads them, interpreted: beside the eager model, as the ONNX graphs are elsewhere.

Legend: B batch, S tokens in the chunk, W window.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType

import onnx
import torch
from onnx import ModelProto
from torch import Tensor

from gemma3_compile.model import Gemma3
from graphs.trt.interpreter import InitializerWeights, Interpreter, Program
from graphs.trt.network import ParsedNetwork, parse
from runtimes.trt import load, register_plugins
from tests.graphs.decoders import Chunk, EagerDecoder
from tests.graphs.ort import Arrays
from tests.graphs.trt_nano import TrtDecoder
from tests.tolerances import relative_error


@cache
def tensorrt() -> ModuleType:
    """TensorRT with our plugins."""
    trt = load("rtx")
    register_plugins(trt, None)
    return trt


def parsed(model: ModelProto, folder: Path) -> ParsedNetwork:
    """The network that a build would make a plan from."""
    trt = tensorrt()
    path = folder / "graph.onnx"
    onnx.save(model, path)
    return parse(trt, path, logger=trt.Logger(trt.Logger.ERROR))


def interpreted(model: ModelProto, folder: Path, *, wide: bool) -> Interpreter:
    """A graph that holds its weights."""
    program = Program.read(parsed(model, folder))
    return Interpreter(program, constants=InitializerWeights(folder / "graph.onnx"), wide=wide)


class InterpretedDecoder(TrtDecoder):
    """A network over its caches. ``caches`` shows them in fp32."""

    def __init__(self, network: Interpreter, batch: int) -> None:
        self.network, self.dtype = network, torch.float32 if network.wide else torch.bfloat16
        self.start_B = torch.zeros(batch, dtype=torch.int64)
        self.buffers = {
            tensor.name: torch.zeros([batch, *tensor.shape[1:]], dtype=self.dtype)
            for tensor in network.program.inputs
            if tensor.name.startswith("cache.")
        }

    @property
    def caches(self) -> Arrays:  # type: ignore[override]
        return {name: buffer.float().numpy() for name, buffer in self.buffers.items()}

    def __call__(self, chunk: Chunk) -> Arrays:
        """All outputs by name, in fp32."""
        nothing, images = torch.full_like(chunk.token_ids_BS, -1), chunk.images
        feeds: dict[str, Tensor] = {
            "token_ids": chunk.token_ids_BS,
            "start": self.start_B,
            "length": chunk.length_B,
            "rows": chunk.rows_BR,
            "features": torch.zeros(1, 64, dtype=self.dtype) if images is None else images.features_MH.to(self.dtype),
            "feature_rows": nothing if images is None else images.feature_rows_BS,
            "image_ids": nothing if images is None else images.image_ids_BS,
        }
        outputs = self.network.run(feeds | self.buffers)
        assert all(outputs[f"{name}.out"].data_ptr() == buffer.data_ptr() for name, buffer in self.buffers.items())
        self.start_B = self.start_B + chunk.length_B
        return {name: value.float().numpy() for name, value in outputs.items()}


def in_bfloat16(model: Gemma3) -> Gemma3:
    """The eager model in bfloat16, but for the factors of RMSNorm."""
    copy = Gemma3(model.config).eval().requires_grad_(False)
    copy.load_state_dict(model.state_dict())
    for name, parameter in copy.named_parameters():
        if not ((name.startswith("decoder.") and parameter.dim() == 1) or name == "vision.soft_emb_norm.weight"):
            parameter.data = parameter.data.bfloat16()
    return copy


class Margins:
    """How far a network in bfloat16 and the eager model in bfloat16 lie from the eager model in fp32, chunk by chunk."""

    def __init__(self, exact: EagerDecoder, short: EagerDecoder, ours: InterpretedDecoder) -> None:
        self.exact, self.short, self.ours = exact, short, ours
        self.eager_error = self.our_error = 0.0

    def feed(self, chunk: Chunk) -> None:
        """Gives a chunk to all three."""
        running = chunk.length_B > 0
        expected = self.exact(chunk)[running]
        self.eager_error = max(self.eager_error, relative_error(self.short(chunk)[running], expected))
        ours = torch.from_numpy(self.ours(chunk)["logits"])[running]
        self.our_error = max(self.our_error, relative_error(ours, expected))


def outputs_of(interpreter: Interpreter, feeds: Mapping[str, Tensor]) -> Tensor:
    """The one output of a network."""
    (output,) = interpreter.run(feeds).values()
    return output
