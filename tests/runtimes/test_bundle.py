"""Opening, verifying and writing bundles, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from runtimes import bundle_writer
from runtimes.bundle import Bundle
from runtimes.bundle_writer import BundleWriter, replace_file, source_date
from runtimes.errors import BundleError, UsageError
from runtimes.progress import Progress
from tests.runtimes.manifests import FILES, manifest, write


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    return tmp_path / "nano"


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def edit_manifest(root: Path, change: object) -> None:
    path = root / "manifest.json"
    data = json.loads(path.read_text())
    change(data)  # type: ignore[operator]
    path.write_text(json.dumps(data))


# --- opening ---


def test_written_bundle_opens_and_verifies(dest: Path) -> None:
    written = write(dest)
    bundle = Bundle.open(dest)
    assert bundle.manifest == written.manifest
    assert set(bundle.manifest.files) == set(FILES)
    assert bundle.path("weights.json").read_bytes() == b"{}"
    assert bundle.verify().files == len(FILES)
    assert bundle.verify().unlisted == ()


def test_a_path_that_the_manifest_does_not_list_is_refused(dest: Path) -> None:
    write(dest)
    (dest / "more.txt").write_text("x")
    with pytest.raises(BundleError, match=r"no file 'more\.txt'"):
        Bundle.open(dest).path("more.txt")
    assert Bundle.open(dest).verify().unlisted == ("more.txt",)


def test_no_folder_a_file_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        Bundle.open(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="is a file, but a bundle is a folder"):
        Bundle.open(tmp_path / "file")
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        Bundle.open(tmp_path)


def test_each_missing_or_resized_file_is_named_at_opening(dest: Path) -> None:
    write(dest)
    (dest / "vision.onnx").unlink()
    (dest / "weights.safetensors").write_bytes(b"short")
    with pytest.raises(
        BundleError, match=r"vision\.onnx is missing; weights\.safetensors: expected 700 bytes, but got 5"
    ):
        Bundle.open(dest)


def test_a_folder_in_the_place_of_a_file_is_refused(dest: Path) -> None:
    write(dest)
    (dest / "weights.json").unlink()
    (dest / "weights.json").mkdir()
    with pytest.raises(BundleError, match=r"weights\.json must be a plain file, but is a folder"):
        Bundle.open(dest)


def test_a_changed_byte_is_found_by_verify(dest: Path) -> None:
    write(dest)
    data = bytearray(FILES["weights.safetensors"])
    data[350] ^= 1
    (dest / "weights.safetensors").write_bytes(data)
    bundle = Bundle.open(dest)
    with pytest.raises(BundleError, match=r"was changed: weights\.safetensors: expected sha256"):
        bundle.verify()


@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors"])
def test_symbolic_links_are_refused(dest: Path, tmp_path: Path, name: str) -> None:
    write(dest)
    (dest / name).rename(tmp_path / "elsewhere")
    (dest / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="symbolic link"):
        Bundle.open(dest)


def test_a_linked_folder_inside_is_refused(dest: Path, tmp_path: Path) -> None:
    with BundleWriter(dest) as writer:
        for name, data in FILES.items():
            writer.path(name).write_bytes(data)
        writer.path("deep/file.bin").write_bytes(b"x")
        writer.finish(manifest())
    (dest / "deep").rename(tmp_path / "deep")
    (dest / "deep").symlink_to(tmp_path / "deep")
    with pytest.raises(BundleError, match=r"deep/file\.bin: deep is a symbolic link"):
        Bundle.open(dest)


def test_a_bundle_may_be_reached_through_a_link(dest: Path, tmp_path: Path) -> None:
    write(dest)
    (tmp_path / "link").symlink_to(dest)
    Bundle.open(tmp_path / "link").verify()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..", ""])
def test_a_path_that_leaves_the_bundle_is_refused(dest: Path, tmp_path: Path, name: str) -> None:
    write(dest)
    (tmp_path / "secret").write_text("x")
    edit_manifest(dest, lambda data: data["files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    with pytest.raises(BundleError, match="not a plain path inside the bundle"):
        Bundle.open(dest)


def test_a_stage_whose_file_is_not_listed_is_refused(dest: Path) -> None:
    write(dest)
    edit_manifest(dest, lambda data: data["files"].pop("vision.onnx"))
    with pytest.raises(BundleError, match=r"names the file 'vision\.onnx', but `files` does not list it"):
        Bundle.open(dest)


def test_a_newer_manifest_is_refused_before_its_files_are_looked_at(dest: Path) -> None:
    write(dest)
    edit_manifest(dest, lambda data: data.update(schema_version=9, producer={"gemma3c": "4.0.0"}, files=[]))
    with pytest.raises(BundleError, match=r"written by gemma3c 4\.0\.0"):
        Bundle.open(dest)


# --- writing ---


def test_two_equal_builds_are_equal_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "b/manifest.json").read_bytes()


def test_a_registered_hash_is_taken_and_its_size_is_checked(dest: Path) -> None:
    with BundleWriter(dest) as writer:
        for name, data in FILES.items():
            writer.path(name).write_bytes(data)
        writer.register("weights.json", "1" * 64, 2)
        assert writer.finish(manifest()).manifest.files["weights.json"].sha256 == "1" * 64
    with (
        pytest.raises(BundleError, match="registered with 3 bytes, but has 2"),
        BundleWriter(dest, overwrite=True) as w,
    ):
        for name, data in FILES.items():
            w.path(name).write_bytes(data)
        w.register("weights.json", "1" * 64, 3)
        w.finish(manifest())
    assert Bundle.open(dest).manifest.files["weights.json"].bytes == 2


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1)])
def test_an_interrupted_build_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), BundleWriter(tmp_path / "new/folders/nano") as writer:
        writer.path("weights.safetensors").write_bytes(b"x")
        raise error
    assert names_in(tmp_path) == set()


def test_leaving_without_finish_leaves_nothing(dest: Path) -> None:
    with BundleWriter(dest) as writer:
        writer.path("x").write_bytes(b"x")
    assert names_in(dest.parent) == set()


def test_an_existing_bundle_is_kept_without_overwrite_and_replaced_with_it(dest: Path) -> None:
    write(dest)
    with pytest.raises(UsageError, match="exists already") as caught, BundleWriter(dest):
        pass
    assert caught.value.hint is not None
    assert "--overwrite" in caught.value.hint
    with BundleWriter(dest, overwrite=True) as writer:
        for name in FILES:
            writer.path(name).write_bytes(b"new")
        assert Bundle.open(dest).path("decoder.onnx").read_bytes() == b"decoder"
        writer.finish(manifest())
    assert Bundle.open(dest).path("decoder.onnx").read_bytes() == b"new"
    assert names_in(dest.parent) == {"nano"}


def test_a_failed_overwrite_keeps_the_old_bundle(dest: Path) -> None:
    write(dest)
    with pytest.raises(ValueError, match="boom"), BundleWriter(dest, overwrite=True) as writer:
        writer.path("decoder.onnx").write_bytes(b"new")
        raise ValueError("boom")
    Bundle.open(dest).verify()


def test_two_step_exchange_where_the_kernel_has_none(dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(dest)
    monkeypatch.setattr(bundle_writer.ctypes, "CDLL", lambda *args, **kwargs: object())
    with BundleWriter(dest, overwrite=True) as writer:
        for name in FILES:
            writer.path(name).write_bytes(b"new")
        writer.finish(manifest())
    assert Bundle.open(dest).path("decoder.onnx").read_bytes() == b"new"
    assert names_in(dest.parent) == {"nano"}


def test_overwrite_never_removes_what_is_no_bundle(dest: Path) -> None:
    dest.mkdir()
    (dest / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not a bundle"), BundleWriter(dest, overwrite=True):
        pass
    assert (dest / "thesis.txt").read_text() == "years of work"
    dest.with_name("file").write_text("x")
    with pytest.raises(UsageError, match="not a folder"), BundleWriter(dest.with_name("file"), overwrite=True):
        pass


def test_an_unwritten_file_is_named_and_nothing_is_left(dest: Path) -> None:
    with pytest.raises(BundleError, match=r"names the file 'weights\.safetensors'"), BundleWriter(dest) as writer:
        for name in set(FILES) - {"weights.safetensors"}:
            writer.path(name).write_bytes(b"x")
        writer.finish(manifest())
    assert names_in(dest.parent) == set()


def test_a_link_is_not_written_into_a_bundle(dest: Path) -> None:
    with pytest.raises(BundleError, match="symbolic link"), BundleWriter(dest) as writer:
        writer.path("decoder.onnx").symlink_to("/etc/hostname")
        writer.finish(manifest())


def test_no_disk_space_is_said_beforehand(dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(bundle_writer.shutil, "disk_usage", lambda path: usage(0, 0, 10**9))
    with pytest.raises(BundleError, match=r"needs 2\.00 GB, but 1\.00 GB are free"), BundleWriter(dest) as writer:
        writer.reserve(10**9)
        writer.reserve(2 * 10**9)
    assert names_in(dest.parent) == set()


def test_a_disk_that_fills_up_is_a_clear_error(dest: Path) -> None:
    with pytest.raises(BundleError, match="no disk space left"), BundleWriter(dest) as writer:
        writer.path("x").write_bytes(b"x")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names_in(dest.parent) == set()


def test_a_second_writer_to_the_same_place_is_refused_at_once(dest: Path) -> None:
    with BundleWriter(dest) as first:
        with pytest.raises(BundleError, match="another process is writing"), BundleWriter(dest):
            pass
        for name, data in FILES.items():
            first.path(name).write_bytes(data)
        first.finish(manifest())
    Bundle.open(dest).verify()
    assert names_in(dest.parent) == {"nano"}


def test_a_bundle_that_appeared_meanwhile_is_kept(dest: Path) -> None:
    with pytest.raises(UsageError, match="exists already"), BundleWriter(dest) as writer:
        for name, data in FILES.items():
            writer.path(name).write_bytes(data)
        dest.mkdir()
        (dest / "manifest.json").write_text("{}")
        writer.finish(manifest())
    assert (dest / "manifest.json").read_text() == "{}"


KILLED = """
import os, sys, time
from runtimes.bundle_writer import BundleWriter
with BundleWriter(sys.argv[1]) as writer:
    writer.path("weights.safetensors").write_bytes(b"x" * 1000)
    print("ready", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_writer_left_is_swept_by_the_next(dest: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, str(dest)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert len(names_in(dest.parent)) == 1
        process.send_signal(signal.SIGKILL)
    assert len(names_in(dest.parent)) == 1
    write(dest)
    assert names_in(dest.parent) == {"nano"}


def test_an_unlocked_partial_folder_is_swept_once_it_is_old(dest: Path) -> None:
    folder = dest.with_name(".nano.partial-00000000")
    folder.mkdir()
    bundle_writer.sweep(dest)
    assert folder.exists()
    os.utime(folder, (time.time() - 3600,) * 2)
    bundle_writer.sweep(dest)
    assert not folder.exists()


def test_permissions_follow_the_umask(dest: Path) -> None:
    umask = os.umask(0o022)
    try:
        write(dest)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(dest.stat().st_mode) == 0o755


def test_source_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    assert source_date() is None
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert source_date() == "1970-01-01T00:00:00Z"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH"):
        source_date()


# --- replacing ---


def test_a_receipt_is_added_and_replaced(dest: Path) -> None:
    bundle = write(dest)
    assert bundle.manifest.receipt is None
    for data in (b'{"first": 1}', b'{"second": 22}'):
        bundle = replace_file(bundle, "receipt.json", data)
        opened = Bundle.open(dest)
        assert opened.manifest == bundle.manifest
        assert opened.manifest.receipt == "receipt.json"
        assert opened.path("receipt.json").read_bytes() == data
        opened.verify()
    assert names_in(dest) == {*FILES, "manifest.json", "receipt.json"}


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_crash_while_replacing_leaves_a_bundle_that_verifies(
    dest: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    bundle = replace_file(write(dest), "receipt.json", b"old")
    original, calls = bundle_writer._write_through, []

    def crash(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) == step:
            raise KeyboardInterrupt
        original(path, data)

    monkeypatch.setattr(bundle_writer, "_write_through", crash)
    with pytest.raises(KeyboardInterrupt):
        replace_file(bundle, "receipt.json", b"newer")
    Bundle.open(dest).verify()


@pytest.mark.parametrize("name", ["weights.safetensors", "decoder.onnx", "tokenizer.model", "manifest.json", "../x"])
def test_what_a_bundle_cannot_lack_is_not_replaced(dest: Path, name: str) -> None:
    bundle = write(dest)
    with pytest.raises(BundleError):
        replace_file(bundle, name, b"x")
    Bundle.open(dest).verify()


# --- progress ---


def test_verify_reports_every_byte(dest: Path) -> None:
    told: list[int] = []

    class Counting(Progress):
        def task(self, label, *, total=None, unit="steps"):  # type: ignore[no-untyped-def]
            from contextlib import nullcontext

            assert total == sum(map(len, FILES.values()))
            return nullcontext(told.append)

    write(dest).verify(Counting())
    assert sum(told) == sum(map(len, FILES.values()))
