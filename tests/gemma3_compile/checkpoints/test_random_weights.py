"""Random weights: the same everywhere and in any order, and sane enough to compute with."""

from __future__ import annotations

import hashlib

import pytest
import torch

from gemma3_compile.checkpoints import check_tensors, load_eager, open_checkpoint
from gemma3_compile.checkpoints import random_weights as module
from gemma3_compile.checkpoints.base import Checkpoint
from gemma3_compile.presets import PRESETS
from runtimes.errors import CheckpointError

_UP = "decoder.layers.0.mlp.up_proj.weight"


def _open(size: str = "nano", seed: int = 0) -> Checkpoint:
    return open_checkpoint(None, size=size, random_seed=seed)


def test_order_of_reading_does_not_matter() -> None:
    first, second = _open(), _open()
    names = sorted(first.names())
    forwards = {name: first.read(name) for name in names}
    for name in reversed(names):
        assert torch.equal(second.read(name), forwards[name])


def test_seeds_and_names_differ() -> None:
    assert not torch.equal(_open(seed=0).read(_UP), _open(seed=1).read(_UP))
    assert not torch.equal(_open().read(_UP), _open().read(_UP.replace("layers.0", "layers.1")))
    assert _open(seed=5).source == "random weights, size nano, seed 5"


def test_values_are_frozen() -> None:
    """The bytes on every platform and numpy: a bundle built from a seed can be built again."""
    raw = _open(seed=7).read(_UP).view(torch.int16).numpy().astype("<i2").tobytes()
    assert hashlib.sha256(raw).hexdigest() == "60eb5498c70d99184f8704db65a2d6880ceff7470ee6ce2634f8b60465d7098d"


def test_rows_are_those_of_the_whole_across_runs() -> None:
    """1b's norm-sized and matrix-sized tensors: rows that begin inside one generator's run and end in the next."""
    checkpoint, name = _open("270m"), _UP
    whole = checkpoint.read(name)
    assert whole.numel() > 3 * module._RUN
    edge = module._RUN // whole.shape[1]
    assert module._RUN % whole.shape[1], "the run must end inside a row for this test to mean anything"
    for start, stop in ((edge - 2, edge + 3), (0, 1), (edge, 3 * edge), (whole.shape[0] - 1, whole.shape[0]), (9, 9)):
        assert torch.equal(checkpoint.read_rows(name, start, stop), whole[start:stop])


def test_a_large_embedding_is_read_in_pieces_without_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    real = module._near_normal

    def counting(key: str, run: int):
        runs.append(run)
        return real(key, run)

    monkeypatch.setattr(module, "_near_normal", counting)
    rows = _open("27b").read_rows("decoder.embed_tokens.weight", 200_000, 200_002)
    assert rows.shape == (2, 5376)
    assert len(runs) == 1


@pytest.mark.parametrize("size", PRESETS)
def test_every_size_has_the_models_tensors(size: str) -> None:
    checkpoint = _open(size)
    check_tensors(checkpoint)
    assert checkpoint.info("decoder.norm.weight").dtype == "bfloat16"
    assert (checkpoint.tokenizer() is None) == bool(checkpoint.warnings) == (size != "nano")
    assert checkpoint.grid_info(_UP) is None
    with pytest.raises(CheckpointError, match="there is no tensor `x`"):
        checkpoint.read("x")


def test_scales() -> None:
    checkpoint = _open("270m")
    up = checkpoint.read(_UP).float() * 640**0.5
    assert abs(up.mean()) < 0.01
    assert abs(up.std() - 1) < 0.01
    assert 3 < up.abs().max() < 3.6
    assert abs(checkpoint.read("decoder.norm.weight").float().std() - 0.1) < 0.02
    norm = _open("4b").read("vision.layers.3.layer_norm1.weight").float()
    assert abs(norm.mean() - 1) < 0.02


def test_neighbouring_weights_and_runs_are_independent() -> None:
    values = torch.cat([torch.from_numpy(module._near_normal("key", run)) for run in (0, 1)])
    for lag in (1, 2, 3, 4, module._RUN):
        assert abs((values[:-lag] * values[lag:]).mean()) < 0.01, lag
    assert abs((values**2).mean() - 1) < 0.01


def test_activations_stay_sane_in_the_whole_model() -> None:
    model = load_eager(_open(), torch.float32)
    ids = torch.arange(48)[None] * 7 % 500
    lengths = torch.tensor([48])
    caches = model.decoder.empty_caches(1, 64)
    logits, _ = model.decoder(ids, torch.tensor([0]), lengths, torch.arange(48)[None], caches)
    assert 0.3 < logits.std() < 3
    assert torch.isfinite(logits).all()
    assert model.vision is not None
    features = model.vision(torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0)))
    assert 0.3 < features.std() < 3


def test_nano_brings_its_tokenizer() -> None:
    import sentencepiece

    checkpoint = _open()
    model = sentencepiece.SentencePieceProcessor(model_proto=checkpoint.tokenizer())
    assert model.vocab_size() <= checkpoint.config.text.vocab_size
