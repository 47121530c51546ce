"""The ONNX Runtime session over a toy bundle: caches in place, batches, pictures, and hosts that lack things."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runtimes import ort_options, ort_session
from runtimes.bundle import Bundle
from runtimes.cores import usable_cores
from runtimes.errors import BundleError, ContextError, HostError, UsageError
from runtimes.manifest import CacheFacts
from runtimes.ort_caches import OrtCaches, aligned_zeros
from runtimes.ort_session import OrtSession
from runtimes.session import Chunk, open_session
from tests.runtimes.toy_graphs import CONTEXT, EMBEDDING, D, W, reference, write_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture(scope="module")
def session(bundle: Bundle) -> Iterator[OrtSession]:
    with OrtSession(bundle, provider="cpu", threads=1) as session:
        yield session


def text(*tokens: int) -> Chunk:
    return Chunk(token_ids=np.array(tokens))


def rows_of(*tokens: int) -> list[np.ndarray]:
    return [EMBEDDING[token] for token in tokens]


def test_chunks_and_steps_give_the_references_logits(session: OrtSession) -> None:
    caches = session.open_caches(1, CONTEXT)
    history: list[np.ndarray] = []
    for tokens in ((3, 9, 200), (7,), (40, 41, 42, 43, 44)):
        history += rows_of(*tokens)
        logits = session.extend(caches, 0, text(*tokens))
        assert logits is not None and logits.shape == (1, 512)
        np.testing.assert_allclose(logits[0], reference(history, len(history) - 1), rtol=1e-5)
    for token in (5, 6, 400, 17):
        history += rows_of(token)
        logits = session.step(caches, np.array([token]))
        np.testing.assert_allclose(logits[0], reference(history, len(history) - 1), rtol=1e-5)
    assert caches.lengths.tolist() == [13]


def test_all_rows_or_none(session: OrtSession) -> None:
    caches = session.open_caches(1, CONTEXT)
    logits = session.extend(caches, 0, text(3, 9, 200), "all")
    assert logits is not None and logits.shape == (3, 512)
    for row in range(3):
        np.testing.assert_allclose(logits[row], reference(rows_of(3, 9, 200), row), rtol=1e-5)
    assert session.extend(caches, 0, text(1, 2), None) is None
    assert caches.lengths.tolist() == [5]


def test_caches_stay_where_they_are(session: OrtSession) -> None:
    caches = session.open_caches(1, CONTEXT)
    addresses = {name: buffer.address for name, buffer in caches.buffers.items()}
    session.extend(caches, 0, text(3, 9))
    session.step(caches, np.array([5]))
    session.step(caches, np.array([6]))
    assert {name: buffer.address for name, buffer in caches.buffers.items()} == addresses
    keys = caches.buffers["cache.1.k"].host
    assert keys is not None
    np.testing.assert_array_equal(keys[0, 0, :5], [*rows_of(3, 9, 5, 6), np.zeros(D)])
    assert caches.bytes_allocated == 2 * 4 * D * (W + CONTEXT)


def test_a_batch_of_unequal_lengths(session: OrtSession) -> None:
    caches = session.open_caches(3, CONTEXT)
    prompts = [(3, 9, 200), (7,), (40, 41, 42, 43, 44)]
    histories = [rows_of(*tokens) for tokens in prompts]
    for sequence in (2, 0, 1):
        logits = session.extend(caches, sequence, text(*prompts[sequence]))
        assert logits is not None
        expected = reference(histories[sequence], len(histories[sequence]) - 1)
        np.testing.assert_allclose(logits[0], expected, rtol=1e-5)
    for tokens in ((11, 12, 13), (21, 22, 23)):
        logits = session.step(caches, np.array(tokens))
        for sequence, token in enumerate(tokens):
            histories[sequence] += rows_of(token)
            expected = reference(histories[sequence], len(histories[sequence]) - 1)
            np.testing.assert_allclose(logits[sequence], expected, rtol=1e-5)
    assert caches.lengths.tolist() == [5, 3, 7]


def test_an_idle_sequence_is_left_alone(session: OrtSession) -> None:
    caches = session.open_caches(2, CONTEXT)
    session.extend(caches, 0, text(3, 9))
    session.extend(caches, 1, text(7, 8, 9))
    before = {name: buffer.host[1].copy() for name, buffer in caches.buffers.items() if buffer.host is not None}
    session.step(caches, np.array([5, 10**6]), np.array([True, False]))
    assert caches.lengths.tolist() == [3, 3]
    for name, rows in before.items():
        host = caches.buffers[name].host
        assert host is not None
        np.testing.assert_array_equal(host[1], rows)
    logits = session.step(caches, np.array([6, 11]))
    np.testing.assert_allclose(logits[0], reference(rows_of(3, 9, 5, 6), 3), rtol=1e-5)
    np.testing.assert_allclose(logits[1], reference(rows_of(7, 8, 9, 11), 3), rtol=1e-5)


def test_a_full_sequence_may_idle_while_another_goes_on(session: OrtSession) -> None:
    caches = session.open_caches(2, 4)
    session.extend(caches, 0, text(1, 2, 3, 4))
    session.extend(caches, 1, text(7))
    session.step(caches, np.array([0, 8]), np.array([False, True]))
    with pytest.raises(ContextError, match=r"sequence 0 holds 4 tokens and 1 more make 5, .* context of 4"):
        session.step(caches, np.array([5, 6]))
    assert caches.lengths.tolist() == [4, 2], "a refused step feeds nothing"


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_pictures_go_through_their_own_graph(tmp_path: Path, in_place: bool, batch: int) -> None:
    with OrtSession(write_bundle(tmp_path / "bundle", settings={"image_in_place": in_place}), threads=1) as session:
        pixels = np.zeros((2, 3, 8, 8), np.float32)
        pixels[0, :, :4, :4], pixels[1] = 1.0, 0.5
        features = session.encode_images(pixels)
        assert features.shape == (8, D)
        np.testing.assert_allclose(features[:, 0], [1, 0, 0, 0, 0.5, 0.5, 0.5, 0.5])
        caches = session.open_caches(batch, CONTEXT)
        sequence = batch - 1
        session.extend(caches, sequence, text(3))
        session.step(caches, np.full(batch, 9), np.arange(batch) == sequence)
        chunk = Chunk(
            token_ids=np.array([255, 511, 511, 256]),
            features=features[:2],
            feature_rows=np.array([-1, 0, 1, -1]),
            image_ids=np.array([-1, 0, 0, -1]),
        )
        logits = session.extend(caches, sequence, chunk)
        history = [*rows_of(3, 9, 255), features[0], features[1], *rows_of(256)]
        assert logits is not None
        np.testing.assert_allclose(logits[0], reference(history, 5), rtol=1e-5)
        logits = session.step(caches, np.full(batch, 17), np.arange(batch) == sequence)
        np.testing.assert_allclose(logits[sequence], reference([*history, *rows_of(17)], 6), rtol=1e-5)
        assert caches.lengths.tolist() == [0] * (batch - 1) + [7]


def test_graphs_for_pictures_load_with_the_first_picture(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    original = ort_session.open_graph
    monkeypatch.setattr(
        ort_session, "open_graph", lambda path, *rest: (opened.append(path.name), original(path, *rest))[1]
    )
    with OrtSession(bundle, threads=1) as session:
        session.extend(session.open_caches(1, 8), 0, text(1))
        assert opened == ["decoder.onnx"]
        session.encode_images(np.zeros((1, 3, 8, 8), np.float32))
        assert opened == ["decoder.onnx", "vision.onnx"]


def test_caches_grow_and_keep_what_they_hold(session: OrtSession) -> None:
    caches = session.open_caches(2, 4)
    session.extend(caches, 1, text(3, 9, 200))
    session.step(caches, np.array([0, 5]), np.array([False, True]))
    assert session.grow_caches(caches, 16)
    assert (caches.context, caches.bytes_allocated) == (16, 2 * 2 * 4 * D * (W + 16))
    logits = session.step(caches, np.array([0, 6]), np.array([False, True]))
    np.testing.assert_allclose(logits[1], reference(rows_of(3, 9, 200, 5, 6), 4), rtol=1e-5)
    assert session.grow_caches(caches, 8) and caches.context == 16, "caches never shrink"


def test_a_context_that_does_not_fit_names_both_numbers(session: OrtSession) -> None:
    with pytest.raises(ContextError, match=f"a context of {CONTEXT + 1} tokens .* at most {CONTEXT}"):
        session.open_caches(1, CONTEXT + 1)
    with pytest.raises(ContextError, match=f"a context of {CONTEXT + 1} tokens"):
        session.grow_caches(session.open_caches(1, 8), CONTEXT + 1)
    caches = session.open_caches(1, 4)
    session.extend(caches, 0, text(1, 2, 3))
    with pytest.raises(ContextError, match="holds 3 tokens and 2 more make 5"):
        session.extend(caches, 0, text(4, 5))
    for batch, context in ((0, 4), (1, 0)):
        with pytest.raises(UsageError, match=">= 1` must hold"):
            session.open_caches(batch, context)


def test_a_text_only_bundle_refuses_pictures(bundle: Bundle, tmp_path: Path) -> None:
    stages = {"decoder": bundle.manifest.stages["decoder"]}
    bundle = write_bundle(tmp_path / "text-only", stages=stages)
    with OrtSession(bundle, threads=1) as session, pytest.raises(UsageError, match="text-only"):
        session.encode_images(np.zeros((1, 3, 8, 8), np.float32))


def test_a_step_costs_little_beside_the_graph(session: OrtSession) -> None:
    caches = session.open_caches(1, CONTEXT)
    token = np.array([5])
    session.step(caches, token)
    binding, graph = caches.decode._binding, session._graph("decoder")

    def quickest(call: object, count: int = 40) -> float:
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            call()  # type: ignore[operator]
            times.append(time.perf_counter() - begin)
        return min(times)

    def step() -> None:
        caches.lengths[0] = 1
        session.step(caches, token)

    bare = quickest(lambda: graph.run_with_iobinding(binding))
    assert quickest(step) - bare < 100e-6


def test_a_damaged_graph_is_a_bundle_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"decoder\.onnx cannot be loaded by ONNX Runtime"):
        OrtSession(write_bundle(tmp_path / "bundle", broken=True))


def test_a_graph_that_an_old_onnxruntime_refuses_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_bundle(tmp_path / "bundle", broken=True)
    for version, says in (("1.31.1", True), ("1.32.0", False), ("2.0.0.dev1", False)):
        monkeypatch.setattr(ort_options.onnxruntime(), "__version__", version)
        with pytest.raises(BundleError, match=version) as caught:
            OrtSession(bundle)
        assert ("need ONNX Runtime 1.32 or newer" in str(caught.value.hint)) is says


def test_long_reasons_are_cut_in_the_middle() -> None:
    ort_options.onnxruntime()
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail

    with pytest.raises(HostError) as caught, ort_options.translated(HostError, "it failed"):
        raise Fail("place " + "x" * 2000 + " reason\nmore")
    assert caught.value.message.startswith("it failed: Fail: place x")
    assert caught.value.message.endswith("x reason")
    assert len(caught.value.message) < 500


def test_settings_reach_the_session(bundle: Bundle, tmp_path: Path) -> None:
    options = ort_options.session_options(
        {"graph_optimization": "basic", "config.session.disable_prepacking": "1", "block_size": 32}, threads=3
    )
    ort = ort_options.onnxruntime()
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert options.get_session_config_entry("session.disable_prepacking") == "1"
    assert options.intra_op_num_threads == 3
    spinning = ort_options.session_options({"config.session.intra_op.spin_duration_us": "900"}, threads=1)
    assert spinning.get_session_config_entry("session.intra_op.spin_duration_us") == "900"
    assert ort_options.session_options({}, None).intra_op_num_threads == usable_cores()
    with pytest.raises(BundleError, match="must be one of disable, basic, extended, all, but got 'fast'"):
        OrtSession(write_bundle(tmp_path / "bundle", settings={"graph_optimization": "fast"}))


def test_cuda_that_is_absent_is_named_with_its_extra(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_options.onnxruntime(), "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(HostError, match="'cuda' was asked for") as caught:
        OrtSession(bundle, provider="cuda")
    assert "gemma3-compile[ort-gpu]" in str(caught.value.hint)
    assert OrtSession(bundle, provider="auto", threads=1).provider == "cpu"


def test_cuda_that_does_not_start_is_an_error_and_not_the_cpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    ort = ort_options.onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    original = ort.InferenceSession
    monkeypatch.setattr(
        ort, "InferenceSession", lambda path, options, providers: original(path, options, providers=providers[-1:])
    )
    with pytest.raises(HostError, match="did not start"):
        OrtSession(bundle, provider="cuda")


def test_bfloat16_needs_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_options.onnxruntime(), "get_available_providers", lambda: ["CPUExecutionProvider"])
    bundle = write_bundle(tmp_path / "bundle", caches=CacheFacts(dtype="bfloat16", local_layout="ring"))
    with pytest.raises(HostError, match="bfloat16") as caught:
        OrtSession(bundle)
    assert "ort-gpu" in str(caught.value.hint)


def test_a_host_without_onnxruntime_is_told_what_to_install(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    ort_options.onnxruntime.cache_clear()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    try:
        with pytest.raises(HostError, match="cannot be imported") as caught:
            OrtSession(bundle)
    finally:
        ort_options.onnxruntime.cache_clear()
    assert "gemma3-compile[ort]" in str(caught.value.hint)


def test_opening_refuses_what_it_does_not_know(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one of auto, cpu, cuda, but got 'tpu'"):
        open_session(bundle, provider="tpu")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="threads >= 1"):
        open_session(bundle, threads=0)
    with pytest.raises(UsageError, match="target 'cuda'"):
        open_session(write_bundle(tmp_path / "bundle", target="cuda"))


def test_zeros_are_aligned() -> None:
    for size in (1, 3, 1000):
        array = aligned_zeros((2, size))
        assert array.ctypes.data % 64 == 0 and array.shape == (2, size) and not array.any()


def test_caches_say_what_they_allocate_for_every_size(session: OrtSession) -> None:
    caches = OrtCaches(session.manifest, batch=3, context=20, provider="cpu")
    assert caches.bytes_allocated == sum(b.host.nbytes for b in caches.buffers.values() if b.host is not None)


def test_local_layers_get_the_slack_that_the_bundle_asks_for(session: OrtSession) -> None:
    slack = replace(session.manifest, settings={"window_slack": 3})
    caches = OrtCaches(slack, batch=2, context=20, provider="cpu")
    assert [buffer.shape[2] for buffer in caches.buffers.values()] == [W + 3, W + 3, 20, 20]
    assert caches.bytes_allocated == 2 * 2 * 4 * D * (W + 3 + 20)


def test_cores_are_counted_once_and_within_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    for cpu in range(4):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text("0\n")
        (folder / "core_id").write_text(f"{cpu // 2}\n")
    quota = tmp_path / "cpu.max"
    assert usable_cores(tmp_path, quota) == 2
    assert usable_cores(tmp_path / "nothing", quota) == 4
    for text_of_quota, cores in (("max 100000\n", 2), ("150000 100000\n", 1), ("50000 100000\n", 1), ("nonsense", 2)):
        quota.write_text(text_of_quota)
        assert usable_cores(tmp_path, quota) == cores
