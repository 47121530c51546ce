"""``inspect``, ``verify`` and ``doctor``."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import pytest

from gemma3_compile import doctor
from gemma3_compile.cli.inspect_command import cache_bytes
from runtimes.bundle_writer import BundleWriter
from runtimes.trt.binding import Flavour
from runtimes.units import in_words
from tests.gemma3_compile.cli.conftest import Gemma3c
from tests.runtimes.manifests import FILES, manifest, write

LEDGER = [
    {"name": "decoder.norm.weight", "dtype": "float32", "shape": [64], "sources": [], "steps": ["1 added"]},
    {"name": "x", "dtype": "uint8", "shape": [2, 3], "sources": [], "steps": []},
]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    with BundleWriter(tmp_path / "nano") as writer:
        for name, data in FILES.items():
            writer.path(name).write_bytes(data)
        writer.path("weights.json").write_text(json.dumps(LEDGER))
        return writer.finish(manifest()).root


def test_verify_says_that_all_is_as_written(gemma3c: Gemma3c, bundle: Path) -> None:
    result = gemma3c("verify", bundle)
    assert (result.code, result.err) == (0, "")
    assert "5 files" in result.out


def test_verify_names_a_changed_file_and_exits_1(gemma3c: Gemma3c, bundle: Path) -> None:
    (bundle / "vision.onnx").write_bytes(b"Vision")
    result = gemma3c("verify", bundle)
    assert (result.code, result.out) == (1, "")
    assert "vision.onnx: expected sha256" in result.err
    assert "hint: " in result.err


def test_verify_notes_files_that_are_not_of_the_bundle(gemma3c: Gemma3c, bundle: Path) -> None:
    (bundle / "notes.txt").write_text("x")
    result = gemma3c("verify", bundle)
    assert result.code == 0
    assert result.err == "note: notes.txt is not part of the bundle\n"


def test_inspect_for_people(gemma3c: Gemma3c, bundle: Path) -> None:
    result = gemma3c("inspect", bundle)
    assert result.code == 0
    for fact in (
        "nano: 6 layers",
        "5 local (window 16, 2 kv heads of 32); 1 global (whole context",
        "56x56, 4 tokens each, Pan & Scan off",
        "float32, in weights.safetensors",
        "gemma3c 0.1.0, torch 2.13.0",
        "not yet: gemma3c validate",
        "weights.safetensors",
    ):
        assert fact in result.out


def test_inspect_as_json_is_the_manifest(gemma3c: Gemma3c, bundle: Path) -> None:
    assert json.loads(gemma3c("inspect", bundle, "--json").out) == json.loads((bundle / "manifest.json").read_text())


def test_inspect_tensors(gemma3c: Gemma3c, bundle: Path) -> None:
    rows = [line.split() for line in gemma3c("inspect", bundle, "--tensors").out.splitlines()]
    assert rows == [
        ["decoder.norm.weight", "float32", "64", "1", "added"],
        ["x", "uint8", "2x3", "as", "it", "was"],
    ]
    assert json.loads(gemma3c("inspect", bundle, "--tensors", "--json").out) == LEDGER


@pytest.mark.parametrize("text", ["{", "{}", "[1]"])
def test_a_broken_ledger_is_a_clear_error(gemma3c: Gemma3c, tmp_path: Path, text: str) -> None:
    with BundleWriter(tmp_path / "broken") as writer:
        for name, data in FILES.items():
            writer.path(name).write_bytes(data)
        writer.path("weights.json").write_text(text)
        root = writer.finish(manifest()).root
    result = gemma3c("inspect", root, "--tensors")
    assert result.code == 1
    assert result.err.startswith("error: weights.json is not")


@pytest.mark.parametrize("command", ["inspect", "verify", "run", "chat"])
def test_a_missing_bundle_is_a_clear_error(gemma3c: Gemma3c, tmp_path: Path, command: str) -> None:
    arguments = [command, tmp_path / "none", *(["hello"] if command == "run" else [])]
    result = gemma3c(*arguments)
    assert (result.code, result.out) == (1, "")
    assert "no such folder" in result.err
    assert "hint: " in result.err


def test_cache_bytes_by_hand(tmp_path: Path) -> None:
    # Keys and values, 2 heads of 32, fp32: five local layers of 16 slots and a global one of 100.
    assert cache_bytes(write(tmp_path / "nano").manifest, 100) == 2 * 2 * 32 * 4 * (5 * 16 + 100)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (45_600_000, "45.6 MB"),
        (123_400_000, "123 MB"),
        (10**10, "10.0 GB"),
    ],
)
def test_sizes_in_words(size: int, text: str) -> None:
    assert in_words(size) == text


# --- doctor ---


def found(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], providers: list[str] | str = "absent") -> None:
    """A host with just these packages and no GPU."""
    monkeypatch.setattr(doctor, "version_of", versions.get)
    monkeypatch.setattr(doctor, "_ort_providers", lambda: providers)
    monkeypatch.setattr(doctor, "nvidia_gpus", lambda: ())


BUILD = dict.fromkeys(("onnx", "onnx-ir", "safetensors", "gguf", "huggingface-hub"), "9.0")
CPU = ["CPUExecutionProvider"]


def test_doctor_on_an_inference_host(gemma3c: Gemma3c, monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, {"onnxruntime": "1.32.0"}, CPU)
    result = gemma3c("doctor", "--json")
    data = json.loads(result.out)
    states = {finding["name"]: finding["state"] for finding in data["findings"]}
    assert states == {
        "build": "missing",
        "ort": "works",
        "ort-cuda": "missing",
        "trt": "missing",
        "trt-rtx": "missing",
        "cuda": "planned",
    }
    assert (result.code, data["lacking"]) == (0, [])
    assert gemma3c("doctor", "--need", "build").code == 1
    assert gemma3c("doctor", "--need", "cuda").code == 1


@pytest.mark.parametrize(
    ("versions", "providers", "message"),
    [
        ({}, "absent", "onnxruntime is not installed"),
        ({"onnxruntime": "1.31.9"}, CPU, "onnxruntime 1.31.9 has no window cache"),
        ({"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.32.0"}, CPU, "overwrite each other"),
        ({"onnxruntime": "1.32.0"}, "libfoo.so is missing", "does not load: libfoo.so is missing"),
        ({"onnxruntime-gpu": "1.20.0"}, CPU, "onnxruntime-gpu 1.20.0 is too old"),
    ],
)
def test_doctor_says_what_ort_lacks(
    gemma3c: Gemma3c,
    monkeypatch: pytest.MonkeyPatch,
    versions: dict[str, str],
    providers: list[str] | str,
    message: str,
) -> None:
    found(monkeypatch, versions, providers)
    result = gemma3c("doctor")
    assert result.code == 1
    assert message in result.out


@pytest.mark.parametrize(("torch", "state"), [("2.10.9", "missing"), ("2.11.0+cpu", "works"), ("2.15.0", "missing")])
def test_doctor_knows_the_range_of_torch(monkeypatch: pytest.MonkeyPatch, torch: str, state: str) -> None:
    found(monkeypatch, {**BUILD, "torch": torch})
    assert doctor.examine_build().state == state


HOPPER = doctor.Gpu(name="NVIDIA H100", capability=(9, 0), memory_bytes=80 * 10**9)
ADA = doctor.Gpu(name="NVIDIA L4", capability=(8, 9), memory_bytes=24 * 10**9)
TURING = doctor.Gpu(name="NVIDIA T4", capability=(7, 5), memory_bytes=16 * 10**9)
RTX = {"tensorrt-rtx-cu13": "1.7.1.116", "cuda-core": "1.2.2"}


def test_doctor_tells_which_gpu_a_flavour_of_tensorrt_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, {**RTX, "tensorrt-cu13": "11.4.0"})
    rtx = {gpu: doctor.examine_trt("rtx", (gpu,)).missing for gpu in (HOPPER, ADA, TURING)}
    assert rtx == {
        HOPPER: ("TensorRT for RTX refuses NVIDIA H100: full TensorRT is for that",),
        ADA: (),
        TURING: ("TensorRT for RTX refuses NVIDIA T4: the target ort is for that",),
    }
    assert doctor.examine_trt("rtx", (HOPPER, ADA)).state == "works"  # one of them is enough
    assert doctor.examine_trt("full", (HOPPER,)).state == "works"


@pytest.mark.parametrize(
    ("flavour", "versions", "message"),
    [
        ("rtx", {"cuda-core": "1.2"}, "tensorrt-rtx-cu13 is not installed: pip install 'gemma3-compile[trt-rtx]'"),
        ("full", {"cuda-core": "1.2"}, "tensorrt-cu13 is not installed: pip install 'gemma3-compile[trt]'"),
        ("rtx", {**RTX, "tensorrt-rtx-cu13": "1.5.0"}, "tensorrt-rtx-cu13 1.5.0 is too old"),
        ("rtx", {"tensorrt-rtx-cu13": "1.7.1"}, "cuda-core is not installed"),
    ],
)
def test_doctor_says_what_tensorrt_lacks(
    monkeypatch: pytest.MonkeyPatch, flavour: Flavour, versions: dict[str, str], message: str
) -> None:
    found(monkeypatch, versions)
    finding = doctor.examine_trt(flavour, (ADA,))
    assert finding.state == "missing"
    assert message in finding.missing[0]


def test_doctor_holds_a_bundle_against_the_gpu(
    gemma3c: Gemma3c, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = {"flavour": "rtx", "tensorrt_version": "1.7.1.116"}
    bundle = write(tmp_path / "nano", target="trt", settings=settings, gpu_architectures=("sm_80", "sm_89"))
    found(monkeypatch, RTX)
    assert doctor.examine_bundle(bundle, (ADA,)).missing == ()
    blackwell = doctor.Gpu(name="NVIDIA RTX 5090", capability=(12, 0), memory_bytes=32 * 10**9)
    (missing,) = doctor.examine_bundle(bundle, (blackwell,)).missing
    assert missing == "its plans are for sm_80, sm_89, and this host has sm_120: build again with --arch sm_120"
    found(monkeypatch, {**RTX, "tensorrt-rtx-cu13": "1.8.0.1"})
    (missing,) = doctor.examine_bundle(bundle, (ADA,)).missing
    assert missing.startswith("its plans were built by version 1.7.1.116, and 1.8.0.1 is installed")
    result = gemma3c("doctor", "--bundle", str(bundle.root), "--json")  # without a GPU
    assert (result.code, json.loads(result.out)["lacking"]) == (1, ["bundle"])


def test_doctor_looks_at_a_bundle_for_ort(gemma3c: Gemma3c, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found(monkeypatch, {"onnxruntime": "1.32.0"}, CPU)
    result = gemma3c("doctor", "--bundle", str(write(tmp_path / "nano").root))
    assert result.code == 0 and "built for ort (onnxruntime 1.32.0)" in result.out


def test_doctor_counts_the_tuning_records_of_the_gpu(
    gemma3c: Gemma3c, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def file(name: str, capability: list[int], count: int) -> str:
        gpu = {"name": name, "compute_capability": capability, "multiprocessors": 58, "records": [{}] * count}
        return json.dumps({"gpus": [gpu]})

    found(monkeypatch, {"onnxruntime": "1.32.0"}, CPU)
    monkeypatch.setenv("GEMMA3C_RECORDS", str(tmp_path))
    ada = doctor.Gpu(name="NVIDIA L4", capability=(8, 9), memory_bytes=24 * 10**9, multiprocessors=58)
    assert "tuning" not in json.loads(gemma3c("doctor", "--json").out)["host"]
    monkeypatch.setattr(doctor, "nvidia_gpus", lambda: (ada, ada))
    (tmp_path / "damaged.json").write_text("{")
    (tmp_path / "other.json").write_text(file("Toy", [3, 5], 9))
    line = "tuning    no records of NVIDIA L4 or a similar GPU; `gemma3c tune` makes some"
    assert line in gemma3c("doctor").out.splitlines()
    (tmp_path / "similar.json").write_text(file("NVIDIA L40", [8, 9], 1))
    line = "tuning    no records of NVIDIA L4, 1 record of NVIDIA L40 stand in; `gemma3c tune` makes some"
    assert line in gemma3c("doctor").out.splitlines()
    (tmp_path / "own.json").write_text(file("NVIDIA L4", [8, 9], 3))
    assert "tuning    3 records of NVIDIA L4 (0 shipped, 3 your own)" in gemma3c("doctor").out.splitlines()


def test_doctor_without_a_driver_or_with_a_driver_that_fails() -> None:
    def no_driver(name: str) -> ctypes.CDLL:
        raise OSError(name)

    class Failing:
        def cuInit(self, flags: int) -> int:
            return 100

    assert doctor.nvidia_gpus(no_driver) == ()
    assert doctor.nvidia_gpus(lambda name: Failing()) == ()  # type: ignore[arg-type,return-value]
