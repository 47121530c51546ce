"""The ``trt`` dialect's stages of nano, and a way to run them in ONNX Runtime: plugin nodes through their functions.

ONNX Runtime computes nothing in bfloat16 on a CPU. A graph made for bfloat16 is run with every bfloat16 in it read as
float32: the same nodes, without the rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto
from torch import Tensor
from torch.export import ExportedProgram

from autotune.kernels.cache_layout import Layout
from gemma3_compile.blocks import Blocks, as_stored
from gemma3_compile.model import Gemma3
from gemma3_compile.presets import preset
from gemma3_compile.stage_graphs import NOT_FOR_TRT, trt_stages_of
from graphs.export import export_stage
from graphs.onnx_lowering.builder import DTYPES, WeightUse
from graphs.onnx_lowering.context import ComputeDtype, TrtOptions
from graphs.onnx_lowering.lower import LoweredStage, lower_for_trt
from graphs.passes import run_passes
from graphs.program import Program, program_from_export
from graphs.stages import Stage
from graphs.weights import BlockFormat, StoredTensor
from tests.graphs.decoders import Chunk, OrtDecoder
from tests.graphs.ort import Arrays, run

CONTEXT = 96
"""Slots of nano's global caches in these tests."""
STAGES = ("decoder", "vision")


def trt_stage(name: str, dtype: ComputeDtype = "bfloat16") -> Stage:
    """A stage's contract."""
    return {s.name: s for s in trt_stages_of(preset("nano"), TrtOptions(dtype=dtype, context=CONTEXT))}[name]


@cache
def _exported(name: str, dtype: ComputeDtype) -> ExportedProgram:
    with torch.device("meta"):
        model = Gemma3(preset("nano")).eval()
    return export_stage(getattr(model, name), trt_stage(name, dtype), dtype=getattr(torch, dtype))


def trt_program(
    name: str, dtype: ComputeDtype = "bfloat16", formats: Mapping[str, BlockFormat] | None = None
) -> Program:
    """A fresh program after the passes that this dialect takes."""
    program = program_from_export(
        _exported(name, dtype), trt_stage(name, dtype), prefix=f"{name}.", formats=formats or {}
    )
    run_passes(program, without=NOT_FOR_TRT)
    return program


def lowered_trt(
    name: str, options: TrtOptions | None = None, formats: Mapping[str, BlockFormat] | None = None
) -> LoweredStage:
    """A lowered stage of nano."""
    chosen = options or TrtOptions()
    return lower_for_trt(trt_program(name, chosen.dtype, formats), chosen)


@dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """What the weights file is filled from."""

    plain: Mapping[str, Tensor]
    blocks: Mapping[str, Blocks]

    def data(self, entry: StoredTensor) -> NDArray[Any]:
        """An entry as it lies in the file; bfloat16 as its bits."""
        weight = entry.weight
        if weight.format is None:
            return as_stored(torch.cat([self.plain[s] for s in weight.sources]).float() + weight.offset, entry.dtype)
        rows = np.concatenate([self.blocks[s].part(entry.part, weight.format) for s in weight.sources])
        return rows.T if entry.transposed else rows

    def file_data(self, entry: StoredTensor) -> NDArray[Any]:
        """As a reader of the file sees an entry."""
        kinds = {"bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn, "int8": np.int8}
        data = np.ascontiguousarray(self.data(entry))
        return data.view(kinds[entry.dtype]) if entry.dtype in kinds else data


def with_weights(lowered: LoweredStage, stored: StoredWeights) -> ModelProto:
    """The model with its weights inside, whether they were inputs or initializers."""
    uses = {str(use.value.name): use for use in lowered.weight_uses}
    for use in uses.values():
        if use.value.is_initializer():
            use.value.const_value = ir.TensorProtoTensor(_tensor(use, stored))
    model = ir.to_proto(lowered.model)
    inputs = [value for value in model.graph.input if value.name not in uses]
    given = {value.name for value in model.graph.input} & uses.keys()
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.graph.initializer.extend(_tensor(uses[name], stored) for name in sorted(given))
    return model


def _tensor(use: WeightUse, stored: StoredWeights) -> TensorProto:
    tensor = TensorProto(name=use.value.name, data_type=int(DTYPES[use.dtype]), dims=use.shape)
    tensor.raw_data = np.ascontiguousarray(stored.data(use.entry)).tobytes()
    return tensor


def in_float32(model: ModelProto) -> ModelProto:
    """A copy that computes in float32 wherever ``model`` says bfloat16."""
    wide = ModelProto()
    wide.CopyFrom(model)
    _widen_values(wide.graph)
    for tensor in wide.graph.initializer:
        _widen(tensor)
    _widen_nodes(wide.graph.node)
    for function in wide.functions:
        _widen_nodes(function.node)
    return wide


def _widen_values(graph: GraphProto) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT


def _widen_nodes(nodes: Iterable[NodeProto]) -> None:
    for node in nodes:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
            if attribute.type == onnx.AttributeProto.TENSOR:
                _widen(attribute.t)


def _widen(tensor: TensorProto) -> None:
    if tensor.data_type == TensorProto.BFLOAT16:
        values = np.frombuffer(tensor.raw_data, ml_dtypes.bfloat16).astype(np.float32)
        tensor.data_type, tensor.raw_data = TensorProto.FLOAT, values.tobytes()


def open_trt(model: ModelProto) -> Any:
    """An ``onnxruntime.InferenceSession`` on one thread. No plugin is known here: functions take their place.

    Optimisations are off: ONNX Runtime would round the activations that meet an int8 weight.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class TrtDecoder(OrtDecoder):
    """The one decoder graph over ring caches and linear ones of ``CONTEXT`` slots; text passes a dummy row of features."""

    layout: Layout = "ring"

    def __init__(self, graph: Any, batch: int, *, in_place: bool = False) -> None:
        self.graphs, self.in_place = {"decoder": graph}, in_place
        self.start_B = torch.zeros(batch, dtype=torch.int64)
        self.caches: Arrays = {
            spec.name: np.zeros([batch if d == "B" else d for d in spec.shape], dtype=np.float32)
            for spec in trt_stage("decoder").inputs
            if spec.name.startswith("cache.")
        }

    def __call__(self, chunk: Chunk) -> Arrays:
        """All outputs by name."""
        nothing = torch.full_like(chunk.token_ids_BS, -1)
        hidden = preset("nano").text.hidden_size
        images = chunk.images
        inputs = {
            "token_ids": chunk.token_ids_BS,
            "start": self.start_B,
            "length": chunk.length_B,
            "rows": chunk.rows_BR,
            "features": torch.zeros(1, hidden) if images is None else images.features_MH,
            "feature_rows": nothing if images is None else images.feature_rows_BS,
            "image_ids": nothing if images is None else images.image_ids_BS,
        }
        graph = self.graphs["decoder"]
        taken = {value.name for value in graph.get_inputs()}  # a model without a tower takes no images
        given = {name: value for name, value in {**inputs, **self.caches}.items() if name in taken}
        outputs = run(graph, given)
        self.caches = {name: outputs[f"{name}.out"] for name in self.caches}
        self.start_B = self.start_B + chunk.length_B
        return outputs
