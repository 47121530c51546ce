"""The weights file: a layout that safetensors reads, pages, alignment, holes, and errors while writing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from graphs.weights import BlockFormat, StoredTensor, Weight, WeightsPlan
from graphs.weights_file import PAGE_BYTES, WeightsFile, WeightsLayout

INT4 = BlockFormat(bits=4, block_size=32, zero_points="integer")
WEIGHTS = (
    Weight(sources=("decoder.norm.weight",), shape=(64,), dtype="float32", offset=1.0),
    Weight(sources=("decoder.layers.0.mlp.up_proj.weight",), shape=(6, 96), dtype="float32", format=INT4),
    Weight(sources=("decoder.half.weight",), shape=(3, 5), dtype="bfloat16"),
    Weight(sources=("decoder.table.weight",), shape=(32, 16), dtype="float32"),
)


def plan_of(*weights: Weight) -> WeightsPlan:
    return WeightsPlan.merge(weight.stored() for weight in weights)


def data_of(entry: StoredTensor) -> np.ndarray:
    generator = np.random.default_rng(len(entry.name))
    if entry.dtype == "uint8":
        return generator.integers(0, 256, entry.shape, dtype=np.uint8)
    if entry.dtype == "bfloat16":
        return generator.integers(0, 2**14, entry.shape, dtype=np.int16)
    return generator.standard_normal(entry.shape).astype(np.float32)


def written(folder: Path) -> tuple[Path, WeightsPlan, WeightsLayout]:
    plan = plan_of(*WEIGHTS)
    layout, path = WeightsLayout(plan), folder / "weights.safetensors"
    with WeightsFile(path, layout) as file:
        for entry in reversed(plan.entries):  # any order will do
            assert file.write_rows(entry, 0, data_of(entry)) == entry.size_bytes
    return path, plan, layout


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    path, plan, _ = written(tmp_path)
    tensors = load_file(path)
    assert sorted(tensors) == sorted(entry.name for entry in plan.entries)
    for entry in plan.entries:
        found = tensors[entry.name]
        assert tuple(found.shape) == entry.shape and str(found.dtype) == f"torch.{entry.dtype}"
        raw = found.view(torch.int16) if entry.dtype == "bfloat16" else found
        assert np.array_equal(raw.numpy(), data_of(entry)), entry.name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "producer": "gemma3c"}


def test_the_data_starts_on_a_page_and_has_no_gaps(tmp_path: Path) -> None:
    path, plan, layout = written(tmp_path)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert (8 + length) % PAGE_BYTES == 0 and len(layout.header) == 8 + length
    header = json.loads(raw[8 : 8 + length])
    del header["__metadata__"]
    position = 0
    for entry in plan.entries:
        assert header[entry.name]["data_offsets"] == [position, position + entry.size_bytes]
        assert layout.offsets[entry.name] == 8 + length + position
        position += entry.size_bytes
    assert len(raw) == layout.size_bytes == 8 + length + position


def test_offsets_point_at_the_data(tmp_path: Path) -> None:
    """Where ONNX Runtime maps an entry from."""
    path, plan, layout = written(tmp_path)
    raw = path.read_bytes()
    for entry in plan.entries:
        begin = layout.offsets[entry.name]
        assert raw[begin : begin + entry.size_bytes] == data_of(entry).tobytes(), entry.name
        assert begin % {"float32": 4, "bfloat16": 2, "uint8": 1}[entry.dtype] == 0


def test_a_header_of_many_tensors_takes_more_pages() -> None:
    names = [f"decoder.layers.{i}.self_attn.q_proj.weight" for i in range(200)]
    layout = WeightsLayout(plan_of(*(Weight(sources=(n,), shape=(16,), dtype="float32") for n in names)))
    assert len(layout.header) > PAGE_BYTES and len(layout.header) % PAGE_BYTES == 0


def test_rows_come_piece_by_piece(tmp_path: Path) -> None:
    plan = plan_of(WEIGHTS[3])
    (entry,), layout = plan.entries, WeightsLayout(plan)
    data, path = data_of(entry), tmp_path / "w.safetensors"
    with WeightsFile(path, layout) as file:
        assert file.write_rows(entry, 20, data[20:]) == 12 * 64
        assert file.write_rows(entry, 0, data[:7]) == 7 * 64
        assert file.write_rows(entry, 7, data[7:20]) == 13 * 64
    assert np.array_equal(load_file(path)[entry.name].numpy(), data)


def test_data_that_is_not_contiguous(tmp_path: Path) -> None:
    plan = plan_of(WEIGHTS[3])
    (entry,) = plan.entries
    wide = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)
    with WeightsFile(tmp_path / "w.safetensors", WeightsLayout(plan)) as file:
        file.write_rows(entry, 0, wide.T)
    assert np.array_equal(load_file(tmp_path / "w.safetensors")[entry.name].numpy(), wide.T)


def test_what_is_never_written_is_a_hole(tmp_path: Path) -> None:
    big = Weight(sources=("decoder.big.weight",), shape=(4096, 4096), dtype="float32")
    plan = plan_of(big)
    path = tmp_path / "w.safetensors"
    with WeightsFile(path, WeightsLayout(plan)):
        pass
    facts = path.stat()
    assert facts.st_size > 64 * 2**20 and facts.st_blocks * 512 < 2**20
    with safe_open(path, "np") as file:
        assert not file.get_slice("decoder.big.weight")[100:102].any()


def test_rows_beyond_the_end_and_parts_of_rows_are_our_own_faults(tmp_path: Path) -> None:
    plan = plan_of(WEIGHTS[3])
    (entry,) = plan.entries
    with WeightsFile(tmp_path / "w.safetensors", WeightsLayout(plan)) as file:
        with pytest.raises(AssertionError, match="rows beyond its end"):
            file.write_rows(entry, 31, np.zeros((2, 16), dtype=np.float32))
        with pytest.raises(AssertionError, match="no whole rows"):
            file.write_rows(entry, 0, np.zeros(15, dtype=np.float32))


def test_a_file_that_cannot_be_laid_out_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    opened: list[int] = []
    real = os.open
    monkeypatch.setattr(os, "truncate", refuse)
    monkeypatch.setattr(os, "open", lambda *a, **k: opened.append(real(*a, **k)) or opened[-1])
    with pytest.raises(OSError, match="No space left"), WeightsFile(tmp_path / "w", WeightsLayout(plan_of(WEIGHTS[0]))):
        pass
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])
