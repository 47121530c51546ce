"""The comparisons of this folder can fail: a fault planted in the graph lies far beyond their tolerance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma3_compile.model import Gemma3
from graphs.onnx_lowering.context import OrtOptions
from graphs.onnx_lowering.lower import lower_for_ort
from graphs.ops import gemma3c
from graphs.program import Program
from tests.graphs.decoders import EagerDecoder, OrtDecoder, image_chunk, text_chunk, worst_error
from tests.graphs.nano import WINDOW, nano_program
from tests.graphs.ort import Stored, open_graph, save
from tests.tolerances import TOLERANCES

FAR = 100
"""A fault must err this many times the tolerance."""
TEXT = [text_chunk([n], seed=n) for n in (14, 9, 1, 1)]


def set_argument(target: object, index: int, value: object, only: object = None) -> Callable[[Program], None]:
    """Writes ``value`` into an argument of every node of ``target`` (where the argument is ``only``, if given)."""

    def plant(program: Program) -> None:
        nodes = [node for node in program.graph.nodes if node.target is target]
        nodes = [node for node in nodes if only is None or node.args[index] == only]
        assert nodes, "nothing to plant the fault in"
        for node in nodes:
            node.args = (*node.args[:index], value, *node.args[index + 1 :])

    return plant


def without_offset(program: Program) -> None:
    """One norm scales by w instead of 1 + w."""
    name, weight = next(
        (n, w) for n, w in program.weights.items() if w.name.endswith("3.pre_feedforward_layernorm.weight")
    )
    program.weights[name] = replace(weight, offset=0.0)


def swapped_rows(program: Program) -> None:
    """Keys and values change places in the stacked product."""
    name, weight = next((n, w) for n, w in program.weights.items() if "q_proj+k_proj+v_proj" in w.name)
    q, k, v = weight.sources
    program.weights[name] = replace(weight, sources=(q, v, k))


WINDOW_OP = gemma3c.sliding_window_attention.default
FAULTS: dict[str, Callable[[Program], None]] = {
    "window one too short": set_argument(WINDOW_OP, 8, WINDOW - 1),
    "window one too long": set_argument(WINDOW_OP, 8, WINDOW + 1),
    "rope factor 1": set_argument(gemma3c.rotary_table.default, 3, 1.0),
    "local base of the global layers": set_argument(gemma3c.rotary_table.default, 2, 1_000_000.0, only=10_000.0),
    "scale of local layers": set_argument(WINDOW_OP, 9, 0.2),
    "scale of global layers": set_argument(gemma3c.global_attention.default, 8, 0.2),
    "norm without +1": without_offset,
    "epsilon 1e-1": set_argument(gemma3c.add_rms_norm.default, 3, 1e-1),
    "keys for values": swapped_rows,
}


def error_of(program: Program, model: Gemma3, folder: Path) -> float:
    """A window that is too long needs a slot more; the others take it as slack."""
    path = save(folder, [lower_for_ort(program, OrtOptions())], Stored(plain=model.state_dict()))["decoder"]
    ours = OrtDecoder({"decoder": open_graph(path)}, 1, 64, slots=WINDOW + 1)
    return worst_error(EagerDecoder(model, 1, 64), ours, TEXT)


def test_without_a_fault_the_comparison_passes(nano_model: Gemma3, tmp_path: Path) -> None:
    assert error_of(nano_program("decoder"), nano_model, tmp_path) <= TOLERANCES["ort.logits"].relative


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught(nano_model: Gemma3, tmp_path: Path, name: str) -> None:
    program = nano_program("decoder")
    FAULTS[name](program)
    error = error_of(program, nano_model, tmp_path)
    assert error > FAR * TOLERANCES["ort.logits"].relative, f"{name} errs by {error:.3g} only"


def test_causal_images_are_caught(graphs: Mapping[str, Any], nano_model: Gemma3) -> None:
    """The graph is told of no image; eager is."""
    chunk = image_chunk(12, [3], seed=2)
    assert chunk.images is not None
    blind = replace(chunk, images=replace(chunk.images, image_ids_BS=torch.full_like(chunk.images.image_ids_BS, -1)))
    eager, ours = EagerDecoder(nano_model, 1, 32), OrtDecoder(graphs, 1, 32)
    expected, given = eager(chunk), torch.from_numpy(ours(blind)["logits"])
    error = float((given - expected).abs().max() / expected.abs().max())
    assert error > FAR * TOLERANCES["ort.logits"].relative


def test_features_at_the_wrong_rows_are_caught(graphs: Mapping[str, Any], nano_model: Gemma3) -> None:
    chunk = image_chunk(12, [3], seed=2)
    assert chunk.images is not None
    rows = chunk.images.feature_rows_BS
    turned = replace(chunk, images=replace(chunk.images, feature_rows_BS=torch.where(rows >= 0, 3 - rows, rows)))
    eager, ours = EagerDecoder(nano_model, 1, 32), OrtDecoder(graphs, 1, 32)
    expected, given = eager(chunk), torch.from_numpy(ours(turned)["logits"])
    error = float((given - expected).abs().max() / expected.abs().max())
    assert error > FAR * TOLERANCES["ort.logits"].relative
