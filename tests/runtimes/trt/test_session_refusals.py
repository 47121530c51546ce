"""What each bundle, host and request that does not fit is told."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma3_compile.doctor import nvidia_gpus
from graphs.trt.interpreter import InterpretedBundle
from runtimes.bundle import Bundle
from runtimes.conversation import text_tokens
from runtimes.engine import Engine
from runtimes.errors import BundleError, ContextError, Gemma3CompileError, HostError, UsageError
from runtimes.gpu.device import GpuError
from runtimes.gpu.kernel_store import KernelStore
from runtimes.manifest import Manifest
from runtimes.session import Chunk, open_session
from runtimes.trt import binding, load, plugin_base, register_plugins
from runtimes.trt import session as module
from runtimes.trt.engine_file import open_plan
from runtimes.trt.log import logger_of
from runtimes.trt.registry import take_failure
from runtimes.trt.session import TrtSession
from tests.runtimes.trt.cuda_standin import CudaStandIn
from tests.runtimes.trt.tensorrt_standin import TrtStandIn


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CudaStandIn:
    made = CudaStandIn()
    made.install(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    take_failure()
    return made


@pytest.fixture
def trt(
    trt_bundle: Bundle, networks: InterpretedBundle, cuda: CudaStandIn, monkeypatch: pytest.MonkeyPatch
) -> TrtStandIn:
    standin = TrtStandIn(trt_bundle, networks, cuda)
    monkeypatch.setattr(module, "load", lambda flavour: standin)
    monkeypatch.setattr(module, "register_plugins", lambda trt, kernels: None)
    return standin


@pytest.fixture
def copied(trt_bundle: Bundle, tmp_path: Path) -> Callable[..., Bundle]:
    """A copy of the bundle with other files, or another manifest."""

    def copy(change: Callable[[Manifest], Manifest] = lambda m: m, **files: bytes) -> Bundle:
        root = tmp_path / "copy"
        shutil.copytree(trt_bundle.root, root)
        for name, data in files.items():
            (root / name.replace("__", "/").replace("_", ".")).write_bytes(data)
        return Bundle(root, change(trt_bundle.manifest))

    return copy


def settings(**changes: Any) -> Callable[[Manifest], Manifest]:
    return lambda manifest: replace(manifest, settings={**manifest.settings, **changes})


def refused(kind: type[Gemma3CompileError], bundle: Bundle, words: str, hint: str, **options: Any) -> None:
    with pytest.raises(kind, match=words) as caught:
        open_session(bundle, **options)
    assert hint in str(caught.value.hint), caught.value.hint


# --- the host ---


def test_a_cpu_cannot_run_a_plan(trt_bundle: Bundle) -> None:
    refused(
        UsageError, trt_bundle, "run on an NVIDIA GPU only, so it has no provider 'cpu'", "--target ort", provider="cpu"
    )


def test_the_flavour_is_not_installed(trt_bundle: Bundle, cuda: CudaStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "installed", lambda flavour: False)
    binding._load.cache_clear()
    try:
        refused(HostError, trt_bundle, "tensorrt_rtx is not installed", "pip install 'gemma3-compile[trt-rtx]'")
    finally:
        binding._load.cache_clear()


def test_no_driver(trt_bundle: Bundle) -> None:
    """With the real cuda-core, and the real bindings, on a host without a driver."""
    from runtimes.gpu.device import GpuDevice

    try:
        GpuDevice()
    except HostError:
        refused(HostError, trt_bundle, "no NVIDIA driver answers on this host", "the target `ort` runs on a CPU")
    else:
        pytest.skip("this host has a GPU")


def test_a_driver_that_is_too_old(trt: TrtStandIn, trt_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys.modules["cuda.bindings"].driver, "cuDriverGetVersion", lambda: (0, 12040))
    refused(HostError, trt_bundle, r"knows CUDA up to 12\.4", "update the NVIDIA driver")


@pytest.mark.parametrize(
    ("name", "capability", "words", "hint"),
    [
        (
            "NVIDIA H100", (9, 0), r"for sm_80, but NVIDIA H100 is sm_90, which TensorRT for RTX does not run on",
            "--size nano --flavour full --arch sm_90",
        ),
        ("NVIDIA L4", (8, 9), "for sm_80, but NVIDIA L4 is sm_89$", "gemma3c build --target trt --size nano --arch sm_89"),
    ],
)  # fmt: skip
def test_another_gpu(
    trt_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, trt: TrtStandIn,
    name: str, capability: tuple[int, int], words: str, hint: str,
) -> None:  # fmt: skip
    CudaStandIn(name=name, capability=capability).install(monkeypatch)
    refused(HostError, trt_bundle, words, hint)


def test_a_cubin_is_missing_or_changed(trt: TrtStandIn, copied: Callable[..., Bundle]) -> None:
    bundle = copied()
    cubin = next((bundle.root / "cubins").iterdir())
    cubin.write_bytes(b"")
    refused(BundleError, bundle, "cubin was changed", "build the bundle again")
    cubin.unlink()
    refused(BundleError, bundle, "cannot read .*cubin", "build the bundle again")


def test_too_little_memory(trt: TrtStandIn, trt_bundle: Bundle, cuda: CudaStandIn) -> None:
    cuda.limit_bytes = 300_000
    refused(GpuError, trt_bundle, r"has no 0\.00 GB left for the weights: 0\.00 of 0\.00 GB are free", "--dtype int4")


# --- the plan ---


@pytest.mark.parametrize(
    ("flag", "kind", "words", "hint"),
    [
        ("VERSION_MISMATCH", HostError, "was built by tensorrt-rtx 1.7.1", "pip install 'tensorrt-rtx==1.7.1"),
        ("UNSUPPORTED_CC", HostError, "was built for sm_80, and TensorRT finds another GPU", "--arch for this GPU"),
        ("OLD_CUDA_DRIVER", HostError, "driver is too old", "update the NVIDIA driver"),
        ("OLD_CUDA_RUNTIME", HostError, "CUDA runtime is too old", "update the NVIDIA driver"),
        ("INSUFFICIENT_GPU_MEMORY", HostError, "too little memory", "a smaller --context or --batch"),
        ("MALFORMED_ENGINE", BundleError, "is not a plan of TensorRT for RTX", "build the bundle again"),
    ],
)
def test_what_rtx_thinks_of_a_plans_header(
    trt: TrtStandIn, trt_bundle: Bundle, flag: str, kind: type[Gemma3CompileError], words: str, hint: str
) -> None:
    trt.validity = getattr(trt.EngineInvalidityDiagnostics, flag)
    refused(kind, trt_bundle, words, hint)


def test_a_plan_of_another_version_of_full_tensorrt(
    trt: TrtStandIn, trt_bundle: Bundle, networks: InterpretedBundle, cuda: CudaStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = TrtStandIn(trt_bundle, networks, cuda, rtx=False)
    full.__version__ = "11.9.0"
    monkeypatch.setattr(module, "load", lambda flavour: full)
    words = r"decoder.plan was built by tensorrt 1\.7\.1\.116, but 11\.9\.0 is installed"
    refused(HostError, trt_bundle, words, "pip install 'tensorrt==1.7.1.116'")


def test_a_damaged_plan(trt: TrtStandIn, copied: Callable[..., Bundle]) -> None:
    refused(
        HostError,
        copied(decoder_plan=b"x" * 100),
        r"does not load .*decoder\.plan: .*magic tag",
        "build the bundle again",
    )


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("logits", {"shape": (-1, -1, 7)}, r"its output logits is FLOAT \[-1, -1, 7\], not float32 \['B', 'R', 512\]"),
        ("cache.0.k", {"dtype": "HALF"}, r"its input cache\.0\.k is HALF"),
        ("token_ids", {"name": "ids"}, "it has no input token_ids"),
        ("logits", {"name": "more"}, "it has no output logits; it also gives more"),
        ("rows", {"location": "HOST"}, "wants rows in the host's memory"),
        ("cache.5.k.out", {"alias": "cache.5.v"}, r"writes cache\.5\.k\.out over cache\.5\.v"),
        ("profiles", {"count": 1}, "has 1 profiles of sizes, not 2"),
        (
            "token_ids",
            {"profile": [(1, 2), (1, 2), (2, 99)]},
            r"profile 0 .* goes up to \(2, 99\) tokens .* says \(2, 32\)",
        ),
    ],
)
def test_a_plan_that_is_not_the_manifests(
    trt: TrtStandIn, trt_bundle: Bundle, name: str, change: dict[str, Any], words: str
) -> None:
    trt.changes[name] = change
    refused(BundleError, trt_bundle, words, "build the bundle again")


def test_settings_that_say_nothing(trt: TrtStandIn, copied: Callable[..., Bundle]) -> None:
    refused(
        BundleError,
        copied(settings(flavour="rtc")),
        "settings.flavour must be one of rtx, full, but got 'rtc'",
        "build",
    )


def test_kernels_of_another_build_are_told_by_the_plugin(trt: TrtStandIn, trt_bundle: Bundle) -> None:
    """TensorRT itself only says that a plugin failed."""
    trt.refused["context"] = "IPluginRegistry: failed"
    plugin_base._failures.append(BundleError("the plan was built with the kernels 0123", hint="build the bundle again"))
    refused(BundleError, trt_bundle, "the plan was built with the kernels 0123", "build the bundle again")
    refused(HostError, trt_bundle, "makes no context of decoder.plan: IPluginRegistry: failed", "")


def test_a_profile_that_is_refused(trt: TrtStandIn, trt_bundle: Bundle) -> None:
    trt.refused["profile"] = ""
    refused(HostError, trt_bundle, "no context of decoder.plan for profile 0: TensorRT does not say why", "")


# --- the weights ---


def safetensors(entries: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    header, data = {}, b""
    for name, (dtype, shape, raw) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_weights_that_do_not_match_the_plan(trt: TrtStandIn, copied: Callable[..., Bundle]) -> None:
    name = next(
        n
        for n in trt.networks.programs["decoder"].inputs
        if n.dtype == "BF16" and "cache" not in n.name and n.name != "features"
    ).name
    bundle = copied(weights_safetensors=safetensors({name: ("F32", [2], bytes(8))}))
    with pytest.raises(BundleError, match=r"are not those that decoder\.plan takes: .*and \d+ more") as caught:
        open_session(bundle)
    assert "two builds" in str(caught.value.hint) and "there is no entry" in str(caught.value)
    bundle.path("weights.safetensors").write_bytes(
        safetensors({e: (v[0], v[1], v[2]) for e, v in all_but(trt, name).items()})
    )
    refused(BundleError, bundle, rf"{name} is BF16 .* but the entry is F32 \[2\] of 8", "two builds")


def all_but(trt: TrtStandIn, wrong: str) -> dict[str, tuple[str, list[int], bytes]]:
    """Zeros for every weight, but one that is too small."""
    given = {t.name for t in trt.bundle.manifest.stages["decoder"].inputs}
    kinds = {"BF16": ("BF16", 2), "FLOAT": ("F32", 4)}
    entries = {}
    for tensor in trt.networks.programs["decoder"].inputs:
        if tensor.name not in given:
            kind, size = kinds[tensor.dtype]
            entries[tensor.name] = (kind, list(tensor.shape), bytes(size * int(np.prod(tensor.shape))))
    return entries | {wrong: ("F32", [2], bytes(8))}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "cannot read"),
        (b"\xff" * 40, "its header would have"),
        (struct.pack("<Q", 2) + b"{]", "not a whole safetensors file"),
        (safetensors({"a": ("F32", [2], bytes(8))})[:-1], "a lies at"),
        (struct.pack("<Q", 2) + b"[]", "not a whole safetensors file"),
    ],
)
def test_a_damaged_weights_file(trt: TrtStandIn, copied: Callable[..., Bundle], data: bytes, words: str) -> None:
    refused(BundleError, copied(weights_safetensors=data), words, "build the bundle again")


# --- what is asked of a session ---


def test_more_than_the_bundle_was_built_for(trt: TrtStandIn, trt_bundle: Bundle) -> None:
    with TrtSession(trt_bundle) as session:
        with pytest.raises(ContextError, match=r"97 tokens was asked for, but .* was built for at most 96") as caught:
            session.open_caches(1, 97)
        assert "--context 97" in str(caught.value.hint)
        with pytest.raises(ContextError, match="the model was made for at most 512"):
            session.open_caches(1, 513)
        with pytest.raises(UsageError, match=r"a batch of 3 sequences .* at most 2") as usage:
            session.open_caches(3, 8)
        assert "--batch 3" in str(usage.value.hint)
        with pytest.raises(UsageError, match="batch >= 1"):
            session.open_caches(0, 8)
        caches = session.open_caches(1, 8)
        with pytest.raises(ContextError, match="sequence 0 holds 0 tokens and 9 more"):
            session.extend(caches, 0, Chunk(token_ids=np.arange(9)))
        session.extend(caches, 0, Chunk(token_ids=np.arange(8)))
        with pytest.raises(ContextError, match="sequence 0 holds 8 tokens"):
            session.step(caches, np.array([5]))
        with pytest.raises(ContextError, match="was built for at most 96"):
            session.grow_caches(caches, 100)


def test_pictures_that_a_plan_cannot_take(trt: TrtStandIn, trt_bundle: Bundle) -> None:
    features = np.zeros((40, 64), np.float32)
    with TrtSession(trt_bundle) as session:
        caches = session.open_caches(1, 96)

        def chunk(size: int) -> Chunk:
            rows = np.arange(size)
            return Chunk(token_ids=rows, features=features, feature_rows=rows, image_ids=rows * 0)

        with pytest.raises(UsageError, match=r"a chunk with a picture must not be cut"):
            session.extend(caches, 0, chunk(4), "all")
        with pytest.raises(UsageError, match=r"a picture of 40 tokens does not go into a chunk of 32") as caught:
            session.extend(caches, 0, chunk(40))
        assert "--chunk 40" in str(caught.value.hint) and caches.lengths.tolist() == [0]


def test_a_run_that_fails(trt: TrtStandIn, trt_bundle: Bundle, cuda: CudaStandIn) -> None:
    with TrtSession(trt_bundle) as session:
        caches = session.open_caches(1, 96)
        trt.refused["run"] = "Error Code 2: Internal Error"
        with pytest.raises(HostError, match=r"decoder\.plan was not run: Error Code 2"):
            session.extend(caches, 0, Chunk(token_ids=np.arange(9)))
        assert caches.lengths.tolist() == [0]
        trt.refused.clear()
        cuda.broken = "CUDA_ERROR_ILLEGAL_ADDRESS"
        with pytest.raises(GpuError, match="NVIDIA A100 stopped while it computed: CUDA_ERROR_ILLEGAL") as caught:
            session.step(caches, np.array([5]))
        assert "lost the GPU" in str(caught.value.hint)
        cuda.broken = ""


def test_a_step_whose_capture_fails_goes_on_as_calls(trt: TrtStandIn, trt_bundle: Bundle) -> None:
    with TrtSession(trt_bundle) as session:
        caches = session.open_caches(1, 96)
        session._gpu.capture = lambda calls: (_ for _ in ()).throw(GpuError("no"))  # type: ignore[method-assign]
        first = session.step(caches, np.array([5])).copy()
        second = session.step(caches, np.array([6]))
        assert np.isfinite(second).all() and not np.array_equal(first, second)
        assert len(trt.recorded.of("run")) == 2


# --- the real bindings, as far as they go without a driver ---


def real(bundle: Bundle) -> Any:
    """The plan of the decoder, opened by TensorRT itself, plugins registered."""
    trt = load("rtx")
    register_plugins(trt, KernelStore.open(bundle.root))
    made = logger_of(trt)
    return open_plan(bundle, "decoder", trt, trt.Runtime(made), made)


@pytest.mark.skipif(bool(nvidia_gpus()), reason="this host has a GPU")
def test_tensorrt_itself_refuses_without_a_driver(trt_bundle: Bundle) -> None:
    with pytest.raises(HostError, match=r"TensorRT does not load .*decoder\.plan: .*CUDA driver version") as caught:
        real(trt_bundle)
    assert caught.value.hint == "build the bundle again"


def test_tensorrt_itself_knows_what_is_no_plan(copied: Callable[..., Bundle]) -> None:
    with pytest.raises(BundleError, match=r"decoder\.plan is not a plan of TensorRT for RTX, or is damaged"):
        real(copied(decoder_plan=b"x" * 1000))


@pytest.mark.skipif(bool(nvidia_gpus()), reason="this host has a GPU")
def test_tensorrt_keeps_what_it_says_to_itself(trt_bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Gemma3CompileError):
        real(trt_bundle)
    assert "CUDA" not in "".join(capfd.readouterr())


# --- what the engine says of a bundle's own limit ---


def test_the_engine_knows_what_a_bundle_was_built_for(trt: TrtStandIn, trt_bundle: Bundle) -> None:
    with TrtSession(trt_bundle) as session:
        with pytest.raises(UsageError, match="1 <= context <= 96") as usage:
            Engine(session, None, context=97)
        assert usage.value.hint == "build the bundle again with --context 97"
        engine = Engine(session, None)
        with pytest.raises(ContextError, match="the prompt has 97 tokens, but the context holds 96") as caught:
            engine.generate(text_tokens(range(4, 101)), max_tokens=1)
        assert "or build the bundle again with a --context of up to 512" in str(caught.value.hint)
