"""The session over interpreted networks keeps the contract of every session, held against the eager model.

Legend: S tokens, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gemma3_compile.checkpoints import open_checkpoint
from gemma3_compile.model import Gemma3
from gemma3_compile.presets import preset
from graphs.trt.interpreter import InterpretedBundle, InterpretedSession
from runtimes.bundle import Bundle
from runtimes.errors import BundleError, ContextError, UsageError
from runtimes.session import Chunk
from tests.gemma3_compile.validate.trt_bundles import SEED, build_trt
from tests.graphs.onnx_lowering.test_vision import pixels
from tests.graphs.trt.interpreter.stages import tensorrt
from tests.tolerances import check

SLOTS = 96


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_trt(tmp_path_factory.mktemp("session") / "nano")


@pytest.fixture(scope="module")
def interpreted(bundle: Path) -> InterpretedBundle:
    return InterpretedBundle.open(tensorrt(), Bundle.open(bundle))


@pytest.fixture
def session(interpreted: InterpretedBundle) -> InterpretedSession:
    return interpreted.session(wide=True)


@pytest.fixture(scope="module")
def eager() -> Gemma3:
    model = Gemma3(preset("nano")).eval().requires_grad_(False)
    with open_checkpoint(None, size="nano", random_seed=SEED) as checkpoint:
        model.load_state_dict({name: checkpoint.read(name).float() for name in checkpoint.names()})
    return model


def logits_of(eager: Gemma3, token_ids: list[int], chunk: Chunk | None = None) -> Tensor:
    """[S, V] of a whole passage at once; ``chunk`` says where its pictures are."""
    size = len(token_ids)
    rows = torch.arange(size)[None]
    caches = eager.decoder.empty_caches(1, SLOTS)
    images: tuple[Tensor, ...] = ()
    if chunk is not None and chunk.features is not None:
        assert chunk.feature_rows is not None and chunk.image_ids is not None
        arrays = (chunk.features, chunk.feature_rows[None], chunk.image_ids[None])
        images = tuple(torch.from_numpy(array) for array in arrays)
    given = (torch.tensor([token_ids]), torch.tensor([0]), torch.tensor([size]), rows, caches, *images)
    logits_1SV: Tensor = eager.decoder(*given)[0]
    return logits_1SV[0]


def ids(size: int, seed: int = 0) -> list[int]:
    drawn: list[int] = np.random.default_rng(seed).integers(4, 250, size).tolist()
    return drawn


def chunk_of(token_ids: list[int]) -> Chunk:
    return Chunk(token_ids=np.array(token_ids, dtype=np.int64))


def test_chunks_then_steps_past_the_window(session: InterpretedSession, eager: Gemma3) -> None:
    tokens = ids(40)
    expected = logits_of(eager, tokens)
    caches = session.open_caches(1, 64)
    first = session.extend(caches, 0, chunk_of(tokens[:20]), rows="all")
    check("ort.logits", first, expected[:20])
    check("ort.logits", session.extend(caches, 0, chunk_of(tokens[20:33])), expected[32:33])
    assert session.extend(caches, 0, chunk_of(tokens[33:34]), rows=None) is None
    for place in range(34, 40):
        check("ort.logits", session.step(caches, np.array([tokens[place]]))[0], expected[place])
    assert caches.lengths.tolist() == [40]


def test_a_batch_of_unequal_lengths_in_which_some_are_idle(session: InterpretedSession, eager: Gemma3) -> None:
    texts = [ids(30, seed=1), ids(9, seed=2), ids(22, seed=3)]
    expected = [logits_of(eager, text) for text in texts]
    caches = session.open_caches(3, 64)
    fed = [18, 3, 16]
    for sequence, text in enumerate(texts):
        session.extend(caches, sequence, chunk_of(text[: fed[sequence]]))
    while any(place < len(text) for place, text in zip(fed, texts, strict=True)):
        active = np.array([place < len(text) for place, text in zip(fed, texts, strict=True)])
        given = [text[min(place, len(text) - 1)] for place, text in zip(fed, texts, strict=True)]
        logits_BV = session.step(caches, np.array(given), active)
        for sequence in np.flatnonzero(active).tolist():
            check("ort.logits", logits_BV[sequence], expected[sequence][fed[sequence]])
            fed[sequence] += 1
    assert caches.lengths.tolist() == [30, 9, 22]


def test_a_full_sequence_may_idle_while_another_goes_on(session: InterpretedSession, eager: Gemma3) -> None:
    caches = session.open_caches(2, SLOTS)
    session.extend(caches, 0, chunk_of(ids(SLOTS)))
    text = ids(7, seed=4)
    session.extend(caches, 1, chunk_of(text[:6]))
    logits_BV = session.step(caches, np.array([0, text[6]]), np.array([False, True]))
    check("ort.logits", logits_BV[1], logits_of(eager, text)[6])
    with pytest.raises(ContextError, match="sequence 0 holds 96 tokens"):
        session.step(caches, np.array([5, 5]))


def test_pictures(session: InterpretedSession, eager: Gemma3) -> None:
    given = pixels(2)
    features_MH = session.encode_images(given.numpy())
    assert eager.vision is not None and features_MH.shape == (8, 64)
    check("ort.features", features_MH, eager.vision(given).flatten(0, 1))
    image_ids = np.full(20, -1)
    image_ids[3:7], image_ids[12:16] = 0, 1
    rows = np.where(image_ids >= 0, np.cumsum(image_ids >= 0) - 1, -1)
    tokens = np.where(image_ids >= 0, 511, ids(20))
    chunk = Chunk(token_ids=tokens, features=features_MH, feature_rows=rows, image_ids=image_ids)
    caches = session.open_caches(1, 64)
    check("ort.logits", session.extend(caches, 0, chunk, rows="all"), logits_of(eager, tokens.tolist(), chunk))


def test_caches_are_those_of_the_network(interpreted: InterpretedBundle) -> None:
    """In bfloat16: 5 rings of 16 slots and a linear cache of 96, two heads of 32 each, keys and values."""
    caches = interpreted.session().open_caches(2, 40)
    assert caches.bytes_allocated == 2 * 2 * (5 * 16 + SLOTS) * 2 * 32 * 2
    assert {buffer.dtype for buffer in caches.buffers.values()} == {torch.bfloat16}


def test_room(session: InterpretedSession) -> None:
    with pytest.raises(ContextError, match="97 tokens was asked for, but the model was made for at most 96"):
        session.open_caches(1, SLOTS + 1)
    with pytest.raises(UsageError, match="batch >= 1"):
        session.open_caches(0, 8)
    caches = session.open_caches(1, 8)
    with pytest.raises(ContextError, match="opened for a context of 8"):
        session.extend(caches, 0, chunk_of(ids(9)))
    assert session.grow_caches(caches, 20) and caches.context == 20
    session.extend(caches, 0, chunk_of(ids(9)))


def test_weights_that_are_not_there(bundle: Path, tmp_path: Path, interpreted: InterpretedBundle) -> None:
    from graphs.trt.interpreter import FileWeights, InterpreterError
    from graphs.trt.interpreter.rule import TensorFacts

    weights = FileWeights(bundle / "weights.safetensors")
    known = TensorFacts(name="decoder.norm.weight@2", dtype="FLOAT", shape=(64,))
    assert weights.read(known).shape == (64,)
    with pytest.raises(InterpreterError, match=r"`absent` is neither fed nor in weights.safetensors"):
        weights.read(TensorFacts(name="absent", dtype="FLOAT", shape=(64,)))
    with pytest.raises(
        InterpreterError, match=r"is BF16 \[64\], but its entry in weights.safetensors is torch.float32"
    ):
        weights.read(TensorFacts(name="decoder.norm.weight", dtype="BF16", shape=(64,)))
    with pytest.raises(BundleError, match="cannot be read"):
        FileWeights(tmp_path / "none.safetensors")
