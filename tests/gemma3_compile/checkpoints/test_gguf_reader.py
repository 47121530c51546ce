"""GGUF files: small ones written here, and the real 270M."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Ggml

from gemma3_compile.checkpoints import check_tensors, load_eager, open_checkpoint
from gemma3_compile.checkpoints import gguf_reader as module
from gemma3_compile.checkpoints.gguf_header import read_header
from gemma3_compile.checkpoints.gguf_reader import GgufCheckpoint
from gemma3_compile.config import ModelConfig
from gemma3_compile.model import Gemma3
from gemma3_compile.presets import preset
from runtimes.errors import CheckpointError, Gemma3CompileError
from tests.gemma3_compile.checkpoints.gguf_files import PIECES, ggml_name, metadata_of, write_gguf

_EMBEDDING = "decoder.embed_tokens.weight"
_MIXED = {"q_proj": Ggml.Q4_0, "k_proj": Ggml.Q5_0, "v_proj": Ggml.Q8_0, "o_proj": Ggml.BF16, "gate": Ggml.Q4_1}


@pytest.fixture(scope="module")
def text_model(nano_model: Gemma3) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """nano without its vision tower, as a GGUF holds it: norms as 1 + w."""
    config = replace(nano_model.config, vision=None)
    arrays = {
        name: (weight + 1 if "norm" in name else weight).numpy().astype(np.float32)
        for name, weight in nano_model.named_parameters()
        if name.startswith("decoder.")
    }
    return config, arrays


def _kind(name: str, array: np.ndarray) -> Ggml:
    if array.ndim == 1:
        return Ggml.F32
    return next((kind for part, kind in _MIXED.items() if part in name), Ggml.F16)


@pytest.fixture(scope="module")
def mixed_gguf(text_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every linear layer in another format."""
    config, arrays = text_model
    tensors = {ggml_name(name): (array, _kind(name, array)) for name, array in arrays.items()}
    return write_gguf(tmp_path_factory.mktemp("gguf") / "mixed.gguf", metadata_of(config), tensors)


def test_every_tensor_equals_ggufs_reader(mixed_gguf: Path) -> None:
    checkpoint = open_checkpoint(mixed_gguf, size=None)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(mixed_gguf).tensors}
    assert len(checkpoint.names()) == len(theirs)
    for name in checkpoint.names():
        tensor = theirs[ggml_name(name)]
        want = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        got = checkpoint.read(name)
        assert got.dtype == torch.float32
        assert torch.equal(got, want - 1 if "norm" in name else want), name
        assert checkpoint.info(name).shape == tuple(want.shape)


def test_small_file_has_the_configuration_it_was_written_from(mixed_gguf: Path, text_model) -> None:
    config, _ = text_model
    checkpoint = open_checkpoint(mixed_gguf, size=None)
    assert checkpoint.config.text == config.text
    assert checkpoint.config.vision is None
    assert checkpoint.config.tokens.end == (1, 8), "the eos of the file and the piece <eos>"
    check_tensors(checkpoint)


def test_dtypes_and_grids_are_named_as_ggml_names_them(mixed_gguf: Path) -> None:
    checkpoint = open_checkpoint(mixed_gguf, size=None)
    stored = {part: checkpoint.info(f"decoder.layers.0.self_attn.{part}_proj.weight").dtype for part in "qkvo"}
    assert stored == {"q": "q4_0", "k": "q5_0", "v": "q8_0", "o": "bfloat16"}
    grid = checkpoint.grid_info("decoder.layers.0.self_attn.q_proj.weight")
    assert grid is not None
    assert (grid.kind, grid.bits, grid.block_size, grid.integer_zero) == ("q4_0", 4, 32, True)
    for floats in ("self_attn.o_proj", "mlp.gate_proj", "input_layernorm"):
        name = f"decoder.layers.0.{floats}.weight"
        assert checkpoint.grid_info(name) is None
        with pytest.raises(CheckpointError, match="not a grid that is kept"):
            checkpoint.read_grid(name)


@pytest.mark.parametrize("step", [1, 100, 1 << 22])
def test_rows_do_not_depend_on_how_many_are_unpacked_at_a_time(
    mixed_gguf: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", step)
    checkpoint = open_checkpoint(mixed_gguf, size=None)
    name = "decoder.layers.2.self_attn.v_proj.weight"
    whole, grid = checkpoint.read(name), checkpoint.read_grid(name)
    assert torch.equal(grid.dequantize(), whole)
    assert torch.equal(checkpoint.read_rows(name, 5, 9), whole[5:9])
    assert torch.equal(checkpoint.read_grid_rows(name, 5, 9).codes, grid.codes[5:9])
    assert checkpoint.read_rows(name, 3, 3).shape == (0, 64)
    norm = "decoder.layers.2.input_layernorm.weight"
    assert torch.equal(checkpoint.read_rows(norm, 5, 9), checkpoint.read(norm)[5:9])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 65)])
def test_rows_outside_a_tensor_are_refused(mixed_gguf: Path, start: int, stop: int) -> None:
    with pytest.raises(CheckpointError, match=r"rows .* `decoder.layers.0.self_attn.v_proj.weight`"):
        open_checkpoint(mixed_gguf, size=None).read_rows("decoder.layers.0.self_attn.v_proj.weight", start, stop)


def test_tokenizer_is_rebuilt_with_the_right_kinds_of_pieces(mixed_gguf: Path) -> None:
    import sentencepiece

    serialized = open_checkpoint(mixed_gguf, size=None).tokenizer()
    model = sentencepiece.SentencePieceProcessor(model_proto=serialized)
    assert model.vocab_size() == len(PIECES)
    assert [i for i in range(len(PIECES)) if model.is_control(i)] == [0, 1, 2]
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (3, 2, 1, 0)
    assert model.encode("<start_of_turn>a A[multi part]") == [7, 4, 5, 10 + ord("A"), 9]
    assert model.id_to_piece(9) == "[multi▁part]"


# --- files that are refused -------------------------------------------------------------------------------------


def _write(path: Path, text_model, *, metadata=None, tensors=None, architecture: str = "gemma3") -> Path:
    config, arrays = text_model
    stored = {ggml_name(name): (array, Ggml.F32) for name, array in arrays.items()}
    merged = {key: value for key, value in {**metadata_of(config), **(metadata or {})}.items() if value is not None}
    kept = {name: pair for name, pair in {**stored, **(tensors or {})}.items() if pair is not None}
    return write_gguf(path, merged, kept, architecture)


_EYE = np.eye(64, dtype=np.float32)
_REFUSED = {
    "another architecture": ({"architecture": "gemma2"}, "`general.architecture` must be 'gemma3', but is 'gemma2'"),
    "no embedding": ({"tensors": {"token_embd.weight": None}}, "`token_embd.weight` is missing"),
    "no window": (
        {"metadata": {"gemma3.attention.sliding_window": None}},
        "`gemma3.attention.sliding_window` must be a number, but is missing",
    ),
    "text for a number": ({"metadata": {"gemma3.block_count": "six"}}, "`gemma3.block_count` must be a number"),
    "no key-value heads": ({"metadata": {"gemma3.attention.head_count_kv": 0}}, "must be 1 or more, but is 0"),
    "yarn": ({"metadata": {"gemma3.rope.scaling.type": "yarn"}}, "must be 'none' or 'linear', but is 'yarn'"),
    "a part of a split": ({"metadata": {"split.count": 3}}, "split into 3 files"),
    "scores cut short": ({"metadata": {"tokenizer.ggml.scores": [0.0]}}, "266 pieces, 1 scores and 266 types"),
    "a number with a fraction": ({"metadata": {"gemma3.block_count": 6.5}}, "must be an integer, but is 6.5"),
    "a million layers": ({"metadata": {"gemma3.block_count": 10**6}}, "is 1000000, but the file holds 80 tensors"),
    "a special id without a piece": (
        {"metadata": {"tokenizer.ggml.padding_token_id": 999}},
        "a special id is 999, but the tokenizer has 266 pieces",
    ),
    "a piece of no type": ({"metadata": {"tokenizer.ggml.token_type": [9] * 266}}, "a piece is of type 9"),
    "types that are text": ({"metadata": {"tokenizer.ggml.token_type": ["x"]}}, "266 scores and 0 types"),
    "a missing tensor": ({"tensors": {"blk.3.ffn_up.weight": None}}, r"missing \(1\): decoder.layers.3.mlp.up_proj"),
    "an extra tensor": ({"tensors": {"blk.0.lora_a": (_EYE, Ggml.F32)}}, r"extra \(1\): blk.0.lora_a"),
    "another shape": (
        {"tensors": {"blk.0.attn_k.weight": (_EYE[:32], Ggml.F32)}},
        r"k_proj.weight \(expected \[64, 64\], got \[32, 64\]\)",
    ),
    "integers for weights": (
        {"tensors": {"blk.0.attn_k.weight": (np.eye(64, dtype=np.int32), Ggml.I32)}},
        "stored as I32, which cannot be dequantised",
    ),
    "a head of another shape": ({"tensors": {"output.weight": (_EYE, Ggml.F32)}}, "`output.weight` has shape"),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_faulty_gguf_is_refused(case: str, text_model, tmp_path: Path) -> None:
    changes, message = _REFUSED[case]
    path = _write(tmp_path / "faulty.gguf", text_model, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint = open_checkpoint(path, size=None)
        checkpoint.tokenizer()
        load_eager(checkpoint)
    assert "faulty.gguf" in caught.value.message
    assert caught.value.hint


def test_file_without_a_tokenizer_says_so(text_model, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(
        _write(tmp_path / "a.gguf", text_model, metadata={"tokenizer.ggml.model": "gpt2"}), size=None
    )
    assert checkpoint.tokenizer() is None
    assert len(checkpoint.warnings) == 1


def _cuts(size: int, data_start: int) -> Iterator[int]:
    """File sizes to try: every one near the start, some in the header, some in the data."""
    yield from range(64)
    yield from range(64, data_start, 997)
    yield from (data_start, (data_start + size) // 2, size - 1)


def test_truncated_gguf_is_refused_wherever_it_ends(mixed_gguf: Path, tmp_path: Path) -> None:
    whole = mixed_gguf.read_bytes()
    data_start = min(tensor.offset for tensor in read_header(mixed_gguf).tensors.values())
    path = tmp_path / "cut.gguf"
    for size in _cuts(len(whole), data_start):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf") as caught:
            open_checkpoint(path, size=None)
        assert caught.value.hint


def test_file_cut_after_it_was_opened_is_an_error_of_ours(mixed_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(mixed_gguf.read_bytes())
    checkpoint = open_checkpoint(path, size=None)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="bytes were expected at byte"):
        for name in checkpoint.names():
            checkpoint.read(name)


def test_random_damage_to_the_header_never_gives_a_traceback(mixed_gguf: Path, tmp_path: Path) -> None:
    whole = bytearray(mixed_gguf.read_bytes())
    data_start = min(tensor.offset for tensor in read_header(mixed_gguf).tensors.values())
    rng, path, refused = np.random.default_rng(0), tmp_path / "damaged.gguf", 0
    for at in rng.integers(0, data_start, 300).tolist():
        damaged = whole.copy()
        damaged[at] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(path, size=None)
            check_tensors(checkpoint)
            checkpoint.tokenizer()
        except Gemma3CompileError:
            refused += 1
    assert refused > 100, "most damage to a header must be noticed"


def test_no_gguf_at_all(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no weights here")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        open_checkpoint(tmp_path / "text.gguf", size=None)


# --- the real 270M ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(gguf_270m_path: Path) -> GgufCheckpoint:
    checkpoint = open_checkpoint(gguf_270m_path, size="270m")
    assert isinstance(checkpoint, GgufCheckpoint)
    return checkpoint


def test_real_270m_is_the_preset(real: GgufCheckpoint) -> None:
    assert real.config == preset("270m")
    check_tensors(real)
    kinds = {info.kind for name in real.names() if (info := real.grid_info(name))}
    assert kinds == {"q4_K", "q5_0", "q6_K", "q8_0"}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("decoder.layers.0.self_attn.o_proj.weight", "q4_K"),
        ("decoder.layers.0.self_attn.q_proj.weight", "q5_0"),
        ("decoder.layers.0.self_attn.v_proj.weight", "q8_0"),
        ("decoder.layers.0.mlp.down_proj.weight", "q6_K"),
        ("decoder.layers.17.self_attn.k_norm.weight", "float32"),
    ],
)
def test_real_tensor_equals_ggufs_dequantisation_to_the_bit(
    real: GgufCheckpoint, gguf_270m_path: Path, name: str, dtype: str
) -> None:
    assert real.info(name).dtype == dtype
    stored = read_header(gguf_270m_path).tensors[ggml_name(name)]
    rows = stored.shape[0] if len(stored.shape) == 2 else 1
    raw = np.fromfile(gguf_270m_path, np.uint8, rows * stored.row_bytes, offset=stored.offset)
    want = torch.from_numpy(np.array(gguf.dequantize(raw.reshape(rows, -1), stored.ggml_type))).view(stored.shape)
    got = real.read(name)
    assert torch.equal(got, want - 1 if "norm" in name else want)
    if real.grid_info(name):
        assert torch.equal(real.read_grid(name).dequantize(), want)


def test_real_embedding_is_read_row_by_row(real: GgufCheckpoint) -> None:
    assert real.info(_EMBEDDING).shape == (262_144, 640)
    rows = real.read_rows(_EMBEDDING, 262_140, 262_144)
    assert rows.shape == (4, 640)
    assert torch.equal(rows, real.read_grid_rows(_EMBEDDING, 262_140, 262_144).dequantize())
    assert 0.01 < real.read_rows(_EMBEDDING, 100, 200).std() < 1


def test_real_tokenizer_splits_words(real: GgufCheckpoint) -> None:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=real.tokenizer())
    assert model.vocab_size() == 262_144
    assert model.encode("The capital of France is", out_type=str) == ["The", "▁capital", "▁of", "▁France", "▁is"]
    assert model.decode(model.encode("naïve 12 <start_of_turn>")) == "naïve 12 <start_of_turn>"
