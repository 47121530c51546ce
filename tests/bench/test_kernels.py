"""bench.kernels without a GPU: the rows made of given times, and every peer on the CPU at the nano model's shapes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from autotune.gpu import GPUS
from autotune.kernel import Case, Config, Kernel, Tensors
from autotune.record_store import RecordStore
from bench import kernels
from bench.kernel_rows import attention
from bench.kernel_rows.subject import Figures, Peer, Side, Sizes, Subject, rows_of
from bench.kernel_rows.workbench import APART, Workbench
from bench.record import BAR, Row
from gemma3_compile.model_shapes import model_shapes
from gemma3_compile.presets import preset
from runtimes.errors import HostError
from tests.autotune.tiny import CASE, Double, Faulty

H100 = replace(GPUS["h100"], read_bytes_per_s=3e12, bf16_flops=800e12)
NANO = model_shapes(preset("nano"))
NANO_SIZES = Sizes(small=NANO, large=NANO, chunk=64, keys=(40,))
SUBJECTS = {
    f"{part} {at}": subject for part, made in kernels.PARTS.items() for at, subject in enumerate(made(NANO_SIZES))
}
ONLY_ON_A_GPU = (attention.CUDNN, attention.EFFICIENT, attention.WINDOW)


@dataclass
class GivenTimes:
    """A meter that runs what it is given once, on the CPU, and tells the times that it was made with, in turn."""

    times: Iterator[float]
    device: str = "cpu"

    def times_us(
        self, kernel: Kernel, case: Case, config: Config, inputs: Tensors, in_place: Collection[str]
    ) -> Iterator[float]:
        for launch in kernel.launches(case, config, inputs | kernel.outputs(case, config, device="cpu")):
            launch.run()
        yield next(self.times)


def bench(tmp_path: Path, *times_us: float) -> Workbench:
    return Workbench(H100, RecordStore(tmp_path), meter=GivenTimes(iter(times_us)), repeats=(1,))


def doubled_by(kernel: Kernel, *peers: Peer) -> Subject:
    return Subject(name="doubling", kernel=kernel, case=CASE, peers=peers, figures=Figures(read_share=0.5))


def times(factor: float) -> Callable[[Case, Tensors], Callable[[], Tensor]]:
    return lambda case, t: lambda: factor * t["x"]


def unlucky(case: Case, t: Tensors) -> Callable[[], Tensor]:
    raise HostError("the package is not installed", hint="install it")


def row(rows: list[Row], metric: str, peer: str | None) -> Row:
    return next(row for row in rows if row.metric == metric and row.peer == peer)


def test_figures_become_rows() -> None:
    subject = replace(
        SUBJECTS["attention 0"],
        peers=tuple(Peer(label=label, prepare=unlucky) for label in ("slow", "fast", "missing")),
        figures=Figures(most_us=8.0, read_share=0.9, speed=(1.4, ("slow", "fast", "missing")), rate=True),
    )
    cost = subject.kernel.cost(subject.case)
    peers = {"slow": Side(time_us=30.0), "fast": Side(time_us=20.0), "missing": Side(time_us=None, note="not there")}
    rows = rows_of(subject, Side(time_us=10.0, note="tuned"), peers, H100)
    assert row(rows, "time", "slow").ratio == 3.0
    assert row(rows, "time", "missing").ratio is None and row(rows, "time", "missing").note == "tuned; not there"
    assert row(rows, "time", BAR).ratio == pytest.approx(0.8)
    share = row(rows, "share of the read rate", BAR)
    assert share.value == pytest.approx(100 * cost.bytes / 3e12 / 10e-6) and share.peer_value == 90.0
    speed = row(rows, "speed over fast", BAR)
    assert speed.value == 2.0 and speed.ratio == pytest.approx(2.0 / 1.4)
    assert row(rows, "rate", None).value == pytest.approx(cost.flops / 10e-6 / 1e12)


def test_a_side_without_a_time_has_rows_that_say_why() -> None:
    subject = replace(
        SUBJECTS["attention 0"], figures=Figures(most_us=8.0, read_share=0.9, speed=(1.4, ("a",)), rate=True)
    )
    subject = replace(subject, peers=(Peer(label="a", prepare=unlucky),))
    rows = rows_of(subject, Side(time_us=None, note="wrong"), {"a": Side(time_us=5.0)}, H100)
    assert all(row.value is None and row.ratio is None and row.note == "wrong" for row in rows)
    rows = rows_of(subject, Side(time_us=5.0), {"a": Side(time_us=None, note="not there")}, H100)
    speed = row(rows, "speed over a", BAR)
    assert speed.value is None and speed.note == "a; not there"


def test_both_sides_are_checked_before_they_are_timed(tmp_path: Path) -> None:
    peers = (
        Peer(label="right", prepare=times(2.0), returns="y", remark="by torch"),
        Peer(label="wrong", prepare=times(2.0 + 3 * APART), returns="y"),
        Peer(label="other work", prepare=times(5.0)),
        Peer(label="missing", prepare=unlucky),
    )
    subject = doubled_by(Double(), *peers)
    ours, sides = bench(tmp_path, 4.0, 6.0, 7.0).measure(subject)
    assert ours.time_us == 4.0 and ours.note == f"heuristic: {subject.kernel.default(CASE, H100)}"
    assert sides["right"] == Side(time_us=6.0, note="by torch")
    assert sides["wrong"].time_us is None and "wrong computes something else" in (sides["wrong"].note or "")
    assert sides["other work"].time_us == 7.0
    assert sides["missing"] == Side(time_us=None, note="missing: the package is not installed")


@pytest.mark.parametrize(("fault", "words"), [(1, "does not compute what its oracle does"), (4, "ZeroDivisionError")])
def test_a_kernel_that_fails_leaves_the_peer_its_time(tmp_path: Path, fault: int, words: str) -> None:
    class Broken(Faulty):
        def default(self, case: Case, gpu: object) -> Config:
            return Config(constants={"BLOCK": 128, "WRONG": fault}, num_warps=1, num_stages=1)

    ours, sides = bench(tmp_path, 6.0).measure(doubled_by(Broken(), Peer(label="a", prepare=times(2.0), returns="y")))
    assert ours.time_us is None and words in (ours.note or "")
    assert sides["a"].time_us == 6.0


@pytest.mark.parametrize("at", SUBJECTS)
def test_peers_compute_what_the_oracle_does(monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """Those that need a GPU are built by the same code with another backend, but for cuDNN's window."""
    monkeypatch.setattr(attention, "compiled_flex", lambda: flex_attention)
    subject = SUBJECTS[at]
    inputs = subject.kernel.inputs(subject.case, device="cpu")
    expected = subject.kernel.oracle(subject.case, inputs)
    for peer in subject.peers:
        if peer.label in ONLY_ON_A_GPU:
            continue
        result = peer.prepare(subject.case, {name: tensor.clone() for name, tensor in inputs.items()})()
        assert result.isfinite().all()
        if peer.returns:
            wanted = expected[peer.returns].double()
            assert result.shape == wanted.shape
            apart = (result.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
            assert apart < APART, peer.label


@pytest.mark.parametrize("at", ["attention 0", "attention 2", "small 2"])
def test_a_subject_runs_through(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at: str) -> None:
    monkeypatch.setattr(attention, "compiled_flex", lambda: flex_attention)
    ours, sides = bench(tmp_path, *[5.0] * 9).measure(SUBJECTS[at])
    assert ours.time_us == 5.0, ours.note
    for label, side in sides.items():
        assert side.time_us == (None if label in ONLY_ON_A_GPU else 5.0), side.note
    assert rows_of(SUBJECTS[at], ours, sides, H100)


def test_the_shapes_are_those_of_the_figures_to_reach() -> None:
    names = [subject.name for part in kernels.PARTS.values() for subject in part(kernels.sizes())]
    for wanted in (
        "sliding-window prefill, S 8192, 16/8 heads, D 256, W 1024",
        "decode over 1024 keys, 16/8 heads, D 256",
        "decode over 32768 keys, 16/8 heads, D 256",
        "decode over 131072 keys, 16/8 heads, D 256",
        "SigLIP attention, 4096x4096, 16 heads, D 72",
        *(f"matvec {dtype} {shape}" for dtype in ("bf16", "int8", "int4") for shape in (
            "262208x2560 (4b head)", "30720x3840 (12b gate and up)", "8192x3840 (12b qkv)", "3840x15360 (12b down)")),
        "matmul bf16 8192 rows, 20480x2560 (4b gate and up)",
        "matmul bf16 8192 rows, 3840x15360 (12b down)",
    ):  # fmt: skip
        assert wanted in names
    assert len(set(names)) == len(names)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["kernels", "--quick"])
    with pytest.raises(SystemExit, match="error: no CUDA GPU is visible"):
        kernels.main()
