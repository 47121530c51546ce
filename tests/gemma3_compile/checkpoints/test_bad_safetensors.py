"""Damaged, foreign and contradicting folders: an error of ours with a hint, never a traceback."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gemma3_compile.checkpoints import check_tensors, load_eager, open_checkpoint
from runtimes.errors import CheckpointError, ConfigError, Gemma3CompileError
from tests.gemma3_compile.checkpoints.hf_folders import edit_json, edit_tensors

_INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["v5"], tmp_path / "model"))


def _parts(folder: Path) -> tuple[dict, bytes]:
    """Header and data of the folder's one file."""
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _write(folder: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    count = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(count.to_bytes(8, "little") + header + data)


def _with_entry(folder: Path, **changes: object) -> None:
    """Changes one tensor's entry in the header."""
    header, data = _parts(folder)
    entry = header["language_model.model.norm.weight"]
    header["language_model.model.norm.weight"] = {k: v for k, v in {**entry, **changes}.items() if v is not None}
    _write(folder, json.dumps(header).encode(), data)


def _cut(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[: size if size >= 0 else len(raw) + size])


_DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty file": (lambda f: _cut(f, 0), "it has 0 bytes"),
    "seven bytes": (lambda f: _cut(f, 7), "it has 7 bytes"),
    "header cut": (lambda f: _cut(f, 1000), "its header is said to have"),
    "last byte gone": (lambda f: _cut(f, -1), "ends at byte"),
    "header longer than the file": (lambda f: _write(f, b"{}", b"", length=10**15), "its header is said to have"),
    "header no JSON": (lambda f: _write(f, b"{'a': 1}", b""), "its header is not JSON"),
    "header no UTF-8": (lambda f: _write(f, b"\xff\xfe\x00{}", b""), "its header is not JSON"),
    "header nested without end": (lambda f: _write(f, b"[" * 200_000, b""), "its header is not JSON"),
    "header a list": (lambda f: _write(f, b"[]", b""), "not a JSON object"),
    "no dtype": (lambda f: _with_entry(f, dtype=None), "lacks a dtype"),
    "negative shape": (lambda f: _with_entry(f, shape=[-64]), "lacks a dtype, a shape"),
    "shape of another size": (lambda f: _with_entry(f, shape=[63]), r"F32 \[63\] cannot have 256 bytes"),
    "huge shape": (lambda f: _with_entry(f, shape=[2**62, 2**62]), "cannot have 256 bytes"),
    "offsets turned round": (lambda f: _with_entry(f, data_offsets=[256, 0]), "cannot have -256 bytes"),
    "offsets past the end": (lambda f: _with_entry(f, data_offsets=[10**9, 10**9 + 256]), "ends at byte"),
    "three offsets": (lambda f: _with_entry(f, data_offsets=[0, 1, 2]), "two offsets"),
    "unknown dtype": (lambda f: _with_entry(f, dtype="F4"), "the dtype F4, which is not read"),
    "quantised by another tool": (lambda f: _with_entry(f, dtype="U8", shape=[256]), "is stored as u8"),
    "git lfs pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n") and None,
        "a Git LFS pointer",
    ),
    "pickle under another name": (
        lambda f: torch.save({"a": torch.zeros(1)}, f / "model.safetensors"),
        "a zip archive, as PyTorch's pickle files are",
    ),
    "config no JSON": (lambda f: (f / "config.json").write_text("{") and None, "config.json: not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]") and None, "a JSON object was expected"),
    "config of bitsandbytes": (lambda f: edit_json(f / "config.json", quantization_config={}), "quantised by another"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "mixed layouts": (
        lambda f: edit_tensors(f / "model.safetensors", {"model.norm.weight": torch.zeros(64)}),
        "both mean the tensor `decoder.norm.weight`",
    ),
}


@pytest.mark.parametrize("case", _DAMAGE)
def test_damage_is_refused_in_words(case: str, folder: Path) -> None:
    damage, message = _DAMAGE[case]
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        check_tensors(open_checkpoint(folder, size=None))
    assert caught.value.exit_code == 1


def test_a_config_of_another_model_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="llama")
    with pytest.raises(ConfigError, match="llama"):
        open_checkpoint(folder, size=None)


def test_random_damage_to_the_header_never_gives_a_traceback(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = bytearray(path.read_bytes())
    rng, refused = np.random.default_rng(0), 0
    for at in rng.integers(0, 8 + int.from_bytes(whole[:8], "little"), 100).tolist():
        damaged = whole.copy()
        damaged[at] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            check_tensors(open_checkpoint(folder, size=None))
        except Gemma3CompileError:
            refused += 1
    assert refused > 60, "most damage to a header must be noticed"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "weights.ckpt", "weights.pkl"])
def test_pickle_is_refused_without_being_loaded(name: str, folder: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Trap()))
    for source in (folder, folder / name):
        with pytest.raises(CheckpointError, match="pickle") as caught:
            open_checkpoint(source, size=None)
        assert "safetensors" in (caught.value.hint or "")
    assert not (tmp_path / "sprung").exists()


def test_missing_extra_and_misshapen_tensors_are_all_listed(folder: Path) -> None:
    path = folder / "model.safetensors"
    up = "language_model.model.layers.{}.mlp.up_proj.weight"
    edit_tensors(
        path,
        {
            up.format(2): None,
            "language_model.model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2),
            "adapter.weight": torch.zeros(2),
            up.format(0): torch.zeros(64, 128),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        load_eager(open_checkpoint(folder, size=None))
    message = caught.value.message
    assert "missing (1): decoder.layers.2.mlp.up_proj.weight" in message
    assert "extra (2): adapter.weight, decoder.layers.9.mlp.up_proj.weight" in message
    assert "of another shape (1): decoder.layers.0.mlp.up_proj.weight (expected [128, 64], got [64, 128])" in message


def test_long_lists_are_cut_with_a_count(folder: Path) -> None:
    path = folder / "model.safetensors"
    edit_tensors(path, {name: None for name in load_file(path) if "mlp" in name})
    with pytest.raises(CheckpointError) as caught:
        check_tensors(open_checkpoint(folder, size=None))
    assert "missing (26): " in caught.value.message
    assert "and 16 more" in caught.value.message


def test_config_with_absurdly_many_layers_is_refused_at_once(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"num_hidden_layers": 5000, "layer_types": None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="too few for 5000 layers"):
        check_tensors(open_checkpoint(folder, size=None))


# --- sharded ----------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["sharded"], tmp_path / "sharded"))


def test_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[3]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"1 of .* weight files are missing: {shard.name}"):
        open_checkpoint(sharded, size=None)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_index_must_not_leave_its_folder(sharded: Path, name: str) -> None:
    edit_json(sharded / _INDEX, weight_map={"a": name})
    with pytest.raises(CheckpointError, match="no plain file name"):
        open_checkpoint(sharded, size=None)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}])
def test_index_without_a_map_is_refused(sharded: Path, weight_map: object) -> None:
    edit_json(sharded / _INDEX, weight_map=weight_map)
    with pytest.raises(CheckpointError, match="`weight_map` must lead from tensors to files"):
        open_checkpoint(sharded, size=None)


def test_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    edit_tensors(second, {name: tensor})
    with pytest.raises(CheckpointError, match=f"`{name}` is in {first.name} and in {second.name}"):
        open_checkpoint(sharded, size=None)
