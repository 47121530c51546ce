"""Lowered graphs in ONNX Runtime: saved with a real weights file, loaded, run, also with caches in place.

Legend: N rows, K columns, n blocks in a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemma3_compile.blocks import Blocks
from graphs.onnx_lowering.context import OrtOptions
from graphs.onnx_lowering.lower import LoweredStage, bind_weights, lower_for_ort
from graphs.program import Program
from graphs.weights import BlockFormat, StoredTensor, WeightsPlan
from graphs.weights_file import WeightsFile, WeightsLayout

Arrays = dict[str, NDArray[Any]]
WEIGHTS = "weights.safetensors"


def random_blocks(rows: int, columns: int, form: BlockFormat, seed: int = 0) -> Blocks:
    """Codes over the whole range, scales and zero points of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    top, blocks = 1 << form.bits, form.blocks(columns)
    scales = (0.5 + torch.rand((rows, blocks), generator=generator)) / (top / 4 * columns**0.5)
    zeros = torch.randint(top, (rows, blocks), generator=generator, dtype=torch.uint8)
    return Blocks(
        codes=torch.randint(top, (rows, columns), generator=generator, dtype=torch.uint8),
        scales=scales,
        zeros=zeros if form.zero_points == "integer" else None,
        minimums=torch.randn((rows, blocks), generator=generator) * scales if form.zero_points == "minimum" else None,
    )


def dequantized(blocks: Blocks, form: BlockFormat) -> Tensor:
    """The fp32 weight [N, K] that a format means, written out as its docstring says."""
    columns, middle = blocks.codes.shape[1], 1 << (form.bits - 1)

    def wide(per_block: Tensor) -> Tensor:
        return per_block.float().repeat_interleave(form.block_size, dim=1)[:, :columns]

    codes, scales = blocks.codes.float(), wide(blocks.scales)
    if form.zero_points == "integer":
        assert blocks.zeros is not None
        return (codes - wide(blocks.zeros)) * scales
    if form.zero_points == "minimum":
        assert blocks.minimums is not None
        return (codes - middle) * scales - wide(blocks.minimums)
    return (codes - middle) * scales


@dataclass(kw_only=True)
class Stored:
    """What the weights file is filled from: plain tensors, and blocks for the quantised ones."""

    plain: Mapping[str, Tensor]
    blocks: Mapping[str, Blocks] = field(default_factory=dict)

    def data(self, entry: StoredTensor) -> NDArray[np.generic]:
        """The bytes of one entry."""
        weight = entry.weight
        if weight.format is None:
            return (torch.cat([self.plain[source] for source in weight.sources]) + weight.offset).numpy()
        return np.concatenate([self.blocks[source].part(entry.part, weight.format) for source in weight.sources])


def save(folder: Path, lowered: Iterable[LoweredStage], stored: Stored) -> dict[str, Path]:
    """Writes the stages and their one weights file into ``folder``; stage to graph file."""
    stages = list(lowered)
    plan = WeightsPlan.merge(stage.stored for stage in stages)
    layout = WeightsLayout(plan)
    with WeightsFile(folder / WEIGHTS, layout) as file:
        for entry in plan.entries:
            file.write_rows(entry, 0, stored.data(entry))
    paths = {}
    for stage in stages:
        bind_weights(stage, file=WEIGHTS, offsets=layout.offsets, folder=folder)
        path = folder / f"{stage.model.graph.name}.onnx"
        path.write_bytes(ir.to_proto(stage.model).SerializeToString())
        paths[str(stage.model.graph.name)] = path
    return paths


def open_graph(path: Path) -> Any:
    """An ``onnxruntime.InferenceSession`` on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(graph: Any, inputs: Mapping[str, Tensor | NDArray[Any]]) -> Arrays:
    """Outputs by name."""
    names = [output.name for output in graph.get_outputs()]
    given = {key: value.numpy() if isinstance(value, Tensor) else value for key, value in inputs.items()}
    return dict(zip(names, graph.run(names, given), strict=True))


def run_in_place(graph: Any, inputs: Mapping[str, Tensor | NDArray[Any]], caches: Arrays) -> Arrays:
    """As ``run``, but every cache output is bound to its input's own buffer: ``caches`` holds the result."""
    binding = graph.io_binding()
    for name, value in inputs.items():
        array = value.numpy() if isinstance(value, Tensor) else value
        binding.bind_cpu_input(name, np.ascontiguousarray(array))
    for name, buffer in caches.items():
        arguments = ("cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
        binding.bind_input(name, *arguments)
        binding.bind_output(f"{name}.out", *arguments)
    others = [o.name for o in graph.get_outputs() if o.name.removesuffix(".out") not in caches]
    for name in others:
        binding.bind_output(name, "cpu")
    graph.run_with_iobinding(binding)
    order = [*(f"{name}.out" for name in caches), *others]  # as they were bound
    return dict(zip(order, binding.copy_outputs_to_cpu(), strict=True))


def lower_and_open(folder: Path, program: Program, stored: Stored, options: OrtOptions | None = None) -> Any:
    """One program as a session."""
    lowered = lower_for_ort(program, options or OrtOptions())
    return open_graph(save(folder, [lowered], stored)[program.stage.name])
