"""The session's calls, over stand-ins for the GPU and for TensorRT's runtime that interpret the network: right results by
right calls in the right order. The oracle is the interpreted session over the same networks, which must give the same bits."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import runtimes
from graphs.trt.interpreter import InterpretedBundle, InterpretedSession
from runtimes.bundle import Bundle
from runtimes.errors import UsageError
from runtimes.progress import SILENT, Progress
from runtimes.sampling import SamplingOptions
from runtimes.session import Chunk, Session
from runtimes.trt import load as real_load
from runtimes.trt import session as module
from runtimes.trt import weights as weights_module
from runtimes.trt.registry import take_failure
from runtimes.trt.session import TrtSession
from tests.runtimes.trt.cuda_standin import CudaStandIn
from tests.runtimes.trt.tensorrt_standin import TrtStandIn

Opener = Callable[..., tuple[TrtSession, TrtStandIn]]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CudaStandIn:
    made = CudaStandIn()
    made.install(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    take_failure()
    return made


@pytest.fixture
def opened(
    trt_bundle: Bundle, networks: InterpretedBundle, cuda: CudaStandIn, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Opener]:
    """Opens sessions over stand-ins, and closes them."""
    sessions: list[TrtSession] = []

    def open_over(*, rtx: bool = True, progress: Progress = SILENT) -> tuple[TrtSession, TrtStandIn]:
        standin = TrtStandIn(trt_bundle, networks, cuda, rtx=rtx)
        monkeypatch.setattr(module, "load", lambda flavour: standin)
        # One registry serves all: the real one, in which the real creators may stand already.
        monkeypatch.setattr(module, "register_plugins", lambda trt, kernels: None)
        session = TrtSession(trt_bundle, progress=progress)
        sessions.append(session)
        return session, standin

    yield open_over
    for session in sessions:
        session.close()


@pytest.fixture
def oracle(networks: InterpretedBundle) -> InterpretedSession:
    return networks.session()


def tokens(count: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(4, 250, count)


def picture(session: Session, before: int, after: int, pixels: NDArray[np.float32]) -> Chunk:
    """A chunk of text around one picture."""
    features = session.encode_images(pixels)
    count = len(features)
    ids = np.full(before + count + after, -1)
    rows = ids.copy()
    ids[before : before + count], rows[before : before + count] = 0, np.arange(count)
    token_ids = tokens(len(ids))
    token_ids[ids >= 0] = 511
    return Chunk(token_ids=token_ids, features=features, feature_rows=rows, image_ids=ids)


def pixels(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 3, 56, 56)).astype(np.float32)


def same(ours: NDArray[np.float32] | None, theirs: NDArray[np.float32] | None) -> None:
    assert ours is not None and theirs is not None
    assert np.isfinite(ours).all()
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("rtx", [True, False], ids=["rtx", "full"])
def test_prefill_and_decode_past_the_wrap(opened: Opener, oracle: InterpretedSession, rtx: bool) -> None:
    session, trt = opened(rtx=rtx)
    assert (session.provider, session.max_context) == ("cuda", 96)
    ours, theirs = session.open_caches(1, 96), oracle.open_caches(1, 96)
    for size in (20, 1, 32):  # the window is of 16 slots
        chunk = Chunk(token_ids=tokens(size, size))
        same(session.extend(ours, 0, chunk), oracle.extend(theirs, 0, chunk))
    for token in tokens(43):  # up to the last slot
        same(session.step(ours, token[None]), oracle.step(theirs, token[None]))
    assert ours.lengths.tolist() == [96]
    runs = trt.recorded.of("run")
    assert runs[:3] == [(0, (1, 20)), (1, (1, 1)), (0, (1, 32))]
    assert runs[3:] == [(1, (1, 1))] and trt.recorded.of("captured run") == [(1, (1, 1))]
    assert [graph.launches for graph in trt.cuda.graphs] == [42]
    strategies = [("decoder", "LAZY"), ("decoder", "EAGER"), ("decoder", "EAGER")]
    assert trt.recorded.of("context") == (strategies if rtx else [("decoder", "")] * 3)


def test_a_long_prompt_is_cut_to_what_the_plan_takes(opened: Opener, oracle: InterpretedSession) -> None:
    session, trt = opened()
    ours, theirs = session.open_caches(1, 80), oracle.open_caches(1, 80)
    long = Chunk(token_ids=tokens(70))
    for begin, end in ((0, 32), (32, 64), (64, 70)):
        expected = oracle.extend(theirs, 0, Chunk(token_ids=long.token_ids[begin:end]))
    same(session.extend(ours, 0, long), expected)
    assert [shape for _, shape in trt.recorded.of("run")] == [(1, 32), (1, 32), (1, 6)]
    assert session.extend(ours, 0, Chunk(token_ids=tokens(3)), None) is None
    assert ours.lengths.tolist() == [73]


def test_logits_of_all_tokens_go_token_by_token(opened: Opener, oracle: InterpretedSession) -> None:
    session, trt = opened()
    ours, theirs = session.open_caches(1, 64), oracle.open_caches(1, 64)
    found = session.extend(ours, 0, Chunk(token_ids=tokens(20)), "all")
    singles = [oracle.extend(theirs, 0, Chunk(token_ids=token[None])) for token in tokens(20)]
    same(found, np.concatenate([one for one in singles if one is not None]))
    assert trt.recorded.of("run") == [(1, (1, 1))] * 20


def test_a_batch_with_idle_and_full_sequences(opened: Opener, oracle: InterpretedSession) -> None:
    session, trt = opened()
    ours, theirs = session.open_caches(2, 96), oracle.open_caches(2, 96)
    for caches, one in ((ours, session), (theirs, oracle)):
        one.extend(caches, 0, Chunk(token_ids=tokens(7)))
        for _ in range(3):
            one.extend(caches, 1, Chunk(token_ids=tokens(31, 1)))
    patterns = [[True, True], [True, False], [False, True], [True, True], [True, False], [True, False]]
    for number, pattern in enumerate(patterns):
        active, given = np.array(pattern), tokens(2, number)
        mine, their = session.step(ours, given, active), oracle.step(theirs, given, active)
        same(mine[active], their[active])
    assert ours.lengths.tolist() == theirs.lengths.tolist() == [12, 96]
    assert len(trt.cuda.graphs) == 1


def test_pictures(opened: Opener, oracle: InterpretedSession) -> None:
    session, trt = opened()
    assert ("engine", "vision") not in trt.recorded.events  # with the first picture
    np.testing.assert_array_equal(session.encode_images(pixels(6)), oracle.encode_images(pixels(6)))
    assert trt.recorded.of("run") == [(0, (4, 3, 56, 56)), (0, (2, 3, 56, 56))]  # the plan takes four at once
    ours, theirs = session.open_caches(1, 96), oracle.open_caches(1, 96)
    chunk = picture(oracle, 5, 9, pixels(1))
    same(session.extend(ours, 0, chunk), oracle.extend(theirs, 0, chunk))
    text = Chunk(token_ids=tokens(12))  # after a picture: its features are still where they were
    same(session.extend(ours, 0, text), oracle.extend(theirs, 0, text))
    same(session.step(ours, tokens(1)), oracle.step(theirs, tokens(1)))


def test_a_chunk_of_pictures_is_cut_between_them(opened: Opener, oracle: InterpretedSession) -> None:
    session, _ = opened()
    ours, theirs = session.open_caches(1, 96), oracle.open_caches(1, 96)
    one = picture(oracle, 14, 11, pixels(1))
    assert one.features is not None and one.feature_rows is not None and one.image_ids is not None
    # Two of them, whose rows of features lie the other way round, with one between that nothing reads.
    rows = np.concatenate([np.where(one.feature_rows >= 0, one.feature_rows + 5, -1), one.feature_rows])
    features = np.concatenate([one.features, one.features[:1] * 0, one.features * 0.5])
    ids = np.concatenate([one.image_ids, np.where(one.image_ids >= 0, 1, -1)])
    both = Chunk(token_ids=np.tile(one.token_ids, 2), features=features, feature_rows=rows, image_ids=ids)
    assert len(both) == 58
    parts = ((0, 32, one.features * 0.5), (32, 58, one.features))
    for begin, end, part in parts:
        place = np.where(ids[begin:end] >= 0, rows[begin:end] % 5, -1)
        piece = Chunk(token_ids=both.token_ids[begin:end], features=part, feature_rows=place, image_ids=ids[begin:end])
        expected = oracle.extend(theirs, 0, piece)
    same(session.extend(ours, 0, both), expected)


def test_buffers_that_are_given_back_serve_the_next(opened: Opener, oracle: InterpretedSession) -> None:
    session, trt = opened()
    first = session.open_caches(1, 40)
    address = first.buffers.memory.address
    session.extend(first, 0, Chunk(token_ids=tokens(30)))
    for token in tokens(4):
        session.step(first, token[None])
    trt.cuda.device_memory.at(address, first.buffers.bytes)[:] = 0xFF  # NaN, as after a failure
    del first
    gc.collect()
    second, theirs = session.open_caches(1, 50), oracle.open_caches(1, 50)
    assert second.buffers.memory.address == address and second.lengths.tolist() == [0]
    assert second.context == 50
    same(session.step(second, tokens(1)), oracle.step(theirs, tokens(1)))
    assert len(trt.cuda.graphs) == 1 and trt.cuda.graphs[0].launches == 4
    third = session.open_caches(1, 50)  # the second still lives
    assert third.buffers.memory.address != address
    del second
    gc.collect()
    session.open_caches(2, 50)  # of another size: what is idle makes room
    assert address not in trt.cuda.device_memory.blocks and not trt.cuda.graphs[0].open


def test_caches_grow_without_a_move(opened: Opener) -> None:
    session, _ = opened()
    caches = session.open_caches(1, 8)
    bytes_before = caches.bytes_allocated
    session.extend(caches, 0, Chunk(token_ids=tokens(8)))
    assert session.grow_caches(caches, 96)
    assert (caches.context, caches.bytes_allocated) == (96, bytes_before)
    session.step(caches, tokens(1))


def test_where_a_step_cannot_be_captured_it_is_called(opened: Opener, oracle: InterpretedSession) -> None:
    session, trt = opened()
    trt.can_capture = False
    ours, theirs = session.open_caches(1, 40), oracle.open_caches(1, 40)
    for token in tokens(5):
        same(session.step(ours, token[None]), oracle.step(theirs, token[None]))
    assert not trt.cuda.graphs and len(trt.recorded.of("run")) == 5


class Told(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.amounts: list[int] = []

    def task(self, label: str, *, total: int | None = None, unit: Any = "steps") -> Any:
        from contextlib import nullcontext

        assert (label, unit) == ("uploading weights", "bytes")
        self.total = total
        return nullcontext(self.amounts.append)

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_weights_go_through_few_pinned_buffers(
    opened: Opener, trt_bundle: Bundle, cuda: CudaStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_module, "STAGING_BYTES", 1000)  # most tensors of nano are larger
    told = Told()
    session, _ = opened(progress=told)
    assert sum(told.amounts) == told.total and max(told.amounts) == 1000
    stage = session._stages["decoder"]
    assert stage.weights is not None
    from safetensors.torch import load_file

    for name, tensor in load_file(trt_bundle.path("weights.safetensors")).items():
        if name in stage.weights.addresses:
            raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
            held = cuda.device_memory.at(stage.weights.addresses[name], raw.nbytes)
            np.testing.assert_array_equal(held, raw)
    assert len(stage.weights.addresses) > 60


def test_what_rtx_compiled_is_kept_beside_the_bundle(opened: Opener, trt_bundle: Bundle) -> None:
    folder = trt_bundle.root.parent / f"{trt_bundle.root.name}.trt-cache"
    for file in folder.glob("*") if folder.exists() else ():
        file.unlink()
    told = Told()
    session, trt = opened(progress=told)
    session.step(session.open_caches(1, 8), tokens(1))
    assert any("compiles decoder.plan for NVIDIA A100 now" in note for note in told.notes)
    (file,) = folder.iterdir()  # after the first step, not only at the end
    assert file.name.startswith("decoder-") and file.read_bytes() == b"compiled 2"
    session.close()
    told = Told()
    session, trt = opened(progress=told)
    assert trt.recorded.of("cache read") == [(True,)] and not told.notes
    session.close()
    file.write_bytes(b"of another GPU")
    session, trt = opened()
    assert trt.recorded.of("cache read") == [(False,)]
    session.close()
    assert file.read_bytes() == b"compiled 1"


def test_a_bundle_that_cannot_be_written_has_its_cache_in_the_users_folder(
    opened: Opener, trt_bundle: Bundle, tmp_path: Path
) -> None:
    folder = trt_bundle.root.parent / f"{trt_bundle.root.name}.trt-cache"
    for file in folder.glob("*") if folder.exists() else ():
        file.unlink()
    if folder.exists():
        folder.rmdir()
    folder.write_bytes(b"")  # in the way of the folder: root may write anywhere
    session, _ = opened()
    session.close()
    folder.unlink()
    (file,) = (tmp_path / "user" / "gemma3c" / "trt").rglob("*.bin")
    assert file.read_bytes() == b"compiled 1"


def test_closing_gives_everything_back(opened: Opener, cuda: CudaStandIn) -> None:
    session, _ = opened()
    caches = session.open_caches(2, 40)
    logits = session.step(caches, tokens(2))
    session.step(caches, tokens(2))
    session.encode_images(pixels(1))
    kept = logits.copy()
    session.close()
    session.close()
    assert not cuda.device_memory.blocks
    assert logits.shape == kept.shape and np.isfinite(logits).all()  # numpy's views keep pinned memory
    del caches, logits, session
    gc.collect()


def test_threads_take_turns(opened: Opener, oracle: InterpretedSession) -> None:
    session, _ = opened()
    found: dict[int, list[NDArray[np.float32]]] = {0: [], 1: []}
    caches = [session.open_caches(1, 40) for _ in found]

    def work(number: int) -> None:
        for token in tokens(6, number):
            found[number].append(session.step(caches[number], token[None]).copy())

    threads = [threading.Thread(target=work, args=(number,)) for number in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, steps in found.items():
        theirs = oracle.open_caches(1, 40)
        for token, logits in zip(tokens(6, number), steps, strict=True):
            same(logits, oracle.step(theirs, token[None]))


def test_generation_through_the_engine(
    opened: Opener, oracle: InterpretedSession, trt_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtimes import engine as engine_module
    from runtimes.engine import Engine

    session, trt = opened()
    monkeypatch.setattr(engine_module, "open_session", lambda bundle, **options: session)
    engine = runtimes.load(trt_bundle.root)
    other = Engine(oracle, engine.tokenizer)
    assert engine.context == 96 and engine.chunk == 32
    options: dict[str, Any] = {"max_tokens": 12, "sampling": SamplingOptions(temperature=0)}
    ours, theirs = (one.generate("a b c " * 6, raw=True, **options) for one in (engine, other))
    assert ours.token_ids == theirs.token_ids and len(ours.token_ids) > 1
    batch = [one.generate_batch(["a b c", "b"], raw=True, **options) for one in (engine, other)]
    assert [g.token_ids for g in batch[0]] == [g.token_ids for g in batch[1]]
    assert len(trt.cuda.graphs) == 2  # one a size of batch


def test_a_model_without_a_vision_tower(
    text_bundle: Bundle, cuda: CudaStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = InterpretedBundle.open(real_load("rtx"), text_bundle)
    standin, theirs = TrtStandIn(text_bundle, networks, cuda), networks.session()
    monkeypatch.setattr(module, "load", lambda flavour: standin)
    monkeypatch.setattr(module, "register_plugins", lambda trt, kernels: None)
    with TrtSession(text_bundle) as session:
        mine, other = session.open_caches(1, 40), theirs.open_caches(1, 40)
        same(session.extend(mine, 0, Chunk(token_ids=tokens(20))), theirs.extend(other, 0, Chunk(token_ids=tokens(20))))
        for token in tokens(3):
            same(session.step(mine, token[None]), theirs.step(other, token[None]))
        with pytest.raises(UsageError, match="text-only"):
            session.encode_images(pixels(1))
        with pytest.raises(UsageError, match=r"a chunk has a picture, but this bundle of .* is text-only"):
            rows = np.arange(4)
            features = np.zeros((4, 64), np.float32)
            picture = Chunk(token_ids=rows, features=features, feature_rows=rows, image_ids=rows * 0)
            session.extend(mine, 0, picture)
