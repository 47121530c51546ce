"""Folders and files in safetensors: what transformers saved comes back to the bit, in every layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gemma3_compile.checkpoints import check_tensors, load_eager, open_checkpoint
from gemma3_compile.checkpoints import safetensors_reader as module
from gemma3_compile.model import Gemma3
from gemma3_compile.presets import preset
from runtimes.errors import CheckpointError
from tests.gemma3_compile.checkpoints.hf_folders import edit_json, edit_tensors

_GATE = "decoder.layers.0.mlp.gate_proj.weight"


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the version 5 folder that a test may write to."""
    return Path(shutil.copytree(folders["v5"], tmp_path / "model"))


@pytest.mark.parametrize("layout", ["v5", "v4", "sharded"])
def test_weights_come_back_to_the_bit(layout: str, folders: dict[str, Path], nano_model: Gemma3) -> None:
    checkpoint = open_checkpoint(folders[layout], size="nano")
    assert checkpoint.config == preset("nano")
    assert checkpoint.source == layout
    loaded = load_eager(checkpoint)
    assert not loaded.training
    wanted = nano_model.state_dict()
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, wanted.pop(name)), name
        assert not weight.requires_grad
    assert not wanted


def test_text_only_folder(folders: dict[str, Path], nano_model: Gemma3) -> None:
    checkpoint = open_checkpoint(folders["text"], size="nano")
    assert checkpoint.config.vision is None
    assert checkpoint.config.text == nano_model.config.text
    assert load_eager(checkpoint).vision is None
    assert all(name.startswith("decoder.") for name in checkpoint.names())


def test_the_sharded_folder_is_sharded(folders: dict[str, Path]) -> None:
    assert len(list(folders["sharded"].glob("*.safetensors"))) > 5


def test_names_of_memory_are_read_too(folder: Path, nano_model: Gemma3) -> None:
    """transformers 5 calls tensors ``model.language_model.…`` in memory; some files carry those names."""
    path = folder / "model.safetensors"
    changes = {}
    for name, tensor in load_file(path).items():
        in_memory = "model." + name.replace("language_model.model.", "language_model.")
        changes |= {name: None, in_memory: tensor}
    edit_tensors(path, changes)
    loaded = load_eager(open_checkpoint(folder, size=None))
    assert torch.equal(loaded.decoder.norm.weight, nano_model.decoder.norm.weight)


def test_one_file_finds_the_config_beside_it(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder / "model.safetensors"), size=None)
    assert checkpoint.config.name == "nano"
    check_tensors(checkpoint)


def test_stored_dtype_is_kept_and_cast_on_loading(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    edit_tensors(path, dict(tensors))
    checkpoint = open_checkpoint(folder, size=None)
    assert checkpoint.info(_GATE).dtype == "bfloat16"
    assert checkpoint.read(_GATE).dtype == torch.bfloat16
    assert {p.dtype for p in load_eager(checkpoint).parameters()} == {torch.float32}
    assert {p.dtype for p in load_eager(checkpoint, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_reading_a_tensor_opens_its_file_only_and_reads_its_bytes_only(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(folders["sharded"], size=None)
    index = json.loads((folders["sharded"] / "model.safetensors.index.json").read_text())["weight_map"]
    reads: list[tuple[str, int]] = []
    real = module.read_bytes

    def counting(path: Path, offset: int, count: int):
        reads.append((path.name, count))
        return real(path, offset, count)

    monkeypatch.setattr(module, "read_bytes", counting)
    checkpoint.read(_GATE)
    assert reads == [(index["language_model.model.layers.0.mlp.gate_proj.weight"], 128 * 64 * 4)]
    reads.clear()
    checkpoint.read_rows(_GATE, 10, 12)
    assert reads == [(index["language_model.model.layers.0.mlp.gate_proj.weight"], 2 * 64 * 4)]
    reads.clear()
    check_tensors(checkpoint)
    assert reads == [], "names and shapes come from headers"


def test_rows_are_those_of_the_whole(folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(folders["v4"], size=None)
    whole = checkpoint.read(_GATE)
    for start, stop in ((0, 1), (10, 12), (127, 128), (5, 5)):
        assert torch.equal(checkpoint.read_rows(_GATE, start, stop), whole[start:stop])
    patches = checkpoint.read_rows("vision.patch_embedding.weight", 40, 48)
    assert torch.equal(patches, checkpoint.read("vision.patch_embedding.weight")[40:])
    with pytest.raises(CheckpointError, match="rows 0 to 129"):
        checkpoint.read_rows(_GATE, 0, 129)


def test_what_is_read_belongs_to_the_reader(folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(folders["v5"], size=None)
    first = checkpoint.read(_GATE)
    before = first.clone()
    first.zero_()
    assert torch.equal(checkpoint.read(_GATE), before)


def test_side_files_are_read(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"a serialized tokenizer")
    edit_json(folder / "preprocessor_config.json", do_resize=True, image_mean=[0.5, 0.5, 0.5])
    edit_json(folder / "generation_config.json", eos_token_id=[1, 7])
    with open_checkpoint(folder, size=None) as checkpoint:
        assert checkpoint.tokenizer() == b"a serialized tokenizer"
        assert checkpoint.image_settings() == {"do_resize": True, "image_mean": [0.5, 0.5, 0.5]}
        assert checkpoint.config.tokens.end == (1, 7)
        assert checkpoint.warnings == ()


@pytest.mark.parametrize(
    ("present", "said"), [("tokenizer.json", "only tokenizer.json is"), ("x.txt", "no tokenizer is")]
)
def test_missing_tokenizer_is_said(folder: Path, present: str, said: str) -> None:
    (folder / present).write_text("{}")
    checkpoint = open_checkpoint(folder, size=None)
    assert checkpoint.tokenizer() is None
    assert checkpoint.image_settings() is None
    assert len(checkpoint.warnings) == 1
    assert "tokenizer.model is missing" in checkpoint.warnings[0]
    assert said in checkpoint.warnings[0]


def test_missing_config_is_replaced_by_the_size_that_was_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(folder, size=None)
    check_tensors(open_checkpoint(folder, size="nano"))


def test_untied_head_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    head = load_file(path)["language_model.model.embed_tokens.weight"].clone()
    edit_tensors(path, {"lm_head.weight": head})
    check_tensors(open_checkpoint(folder, size=None))
    head[500, 3] += 1
    edit_tensors(path, {"lm_head.weight": head})
    with pytest.raises(CheckpointError, match=r"`lm_head\.weight` differs from the embedding"):
        check_tensors(open_checkpoint(folder, size=None))
    edit_tensors(path, {"lm_head.weight": head[:100].clone()})
    with pytest.raises(CheckpointError, match=r"`lm_head.weight` has shape \[100, 64\]"):
        check_tensors(open_checkpoint(folder, size=None))


def test_pooling_head_of_siglip_is_ignored(folder: Path) -> None:
    edit_tensors(folder / "model.safetensors", {"vision_tower.head.probe": torch.zeros(1, 1, 48)})
    check_tensors(open_checkpoint(folder, size=None))


def test_folder_with_one_gguf_is_that_file(gguf_270m_path: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").symlink_to(gguf_270m_path)
    assert open_checkpoint(tmp_path, size="270m").config == preset("270m")
