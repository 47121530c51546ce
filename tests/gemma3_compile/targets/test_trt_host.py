"""Which flavour of TensorRT builds for which GPUs, and what is said where none can."""

from __future__ import annotations

from typing import Any

import pytest

from gemma3_compile.formats import TrtDtype
from gemma3_compile.targets.trt_host import Choice, Host, PresentGpu, choose
from runtimes.errors import HostError
from runtimes.trt.binding import Flavour

RTX, FULL, BOTH = ("rtx",), ("full",), ("rtx", "full")
H100 = PresentGpu(name="NVIDIA H100 80GB HBM3", architecture=90)
L4 = PresentGpu(name="NVIDIA L4", architecture=89)
ALL = (80, 86, 89, 120, 121)


def chosen(
    installed: tuple[Any, ...],
    *gpus: PresentGpu,
    flavour: Flavour | None = None,
    architectures: tuple[int, ...] = (),
    dtype: TrtDtype = "auto",
) -> Choice:
    host = Host(installed=installed, gpus=gpus)
    return choose(host, flavour=flavour, architectures=architectures, dtype=dtype)


@pytest.mark.parametrize(
    ("choice", "flavour", "architectures", "why"),
    [
        (lambda: chosen(RTX), "rtx", ALL, "this host has no NVIDIA GPU, so all that TensorRT for RTX serves"),
        (lambda: chosen(BOTH), "rtx", ALL, "TensorRT for RTX builds without a GPU"),
        (lambda: chosen(RTX, dtype="fp8"), "rtx", (89, 120, 121), "serves in fp8"),
        (lambda: chosen(RTX, L4), "rtx", (89,), "that of this host's GPU: NVIDIA L4"),
        (lambda: chosen(BOTH, L4), "rtx", (89,), "TensorRT for RTX serves sm_89"),
        (lambda: chosen(FULL, L4), "full", (89,), "only full TensorRT is installed"),
        (lambda: chosen(BOTH, H100), "full", (90,), "full TensorRT serves sm_90, TensorRT for RTX does not"),
        (lambda: chosen(BOTH, H100, architectures=(120, 80, 120)), "rtx", (80, 120), "asked for"),
        (lambda: chosen(BOTH, L4, flavour="full"), "full", (89,), "asked for"),
        (lambda: chosen(RTX, H100, architectures=(89,), dtype="fp8"), "rtx", (89,), "asked for"),
    ],
)
def test_what_is_chosen(choice: Any, flavour: str, architectures: tuple[int, ...], why: str) -> None:
    made = choice()
    assert (made.flavour, made.architectures) == (flavour, architectures)
    assert any(why in decision.reason for decision in made.decisions), made.decisions
    assert [decision.name for decision in made.decisions] == ["flavour", "architectures"]


REFUSED: dict[str, tuple[Any, str, str]] = {
    "neither flavour": (
        lambda: chosen(()),
        "neither flavour of TensorRT is installed",
        "for sm_80, sm_86, sm_89, sm_120, sm_121, or pip install 'gemma3-compile[trt]' on a host with the GPU, for sm_90",
    ),
    "the flavour asked for": (
        lambda: chosen(RTX, H100, flavour="full"),
        "full TensorRT is not installed",
        "pip install 'gemma3-compile[trt]'",
    ),
    "Hopper with RTX only": (
        lambda: chosen(RTX, H100),
        "TensorRT for RTX serves sm_80, sm_86, sm_89, sm_120, sm_121; it makes no plans for sm_90, and refuses to run there",
        "pip install 'gemma3-compile[trt]'; or name an --arch of sm_80",
    ),
    "Hopper from afar": (
        lambda: chosen(RTX, architectures=(90,)),
        "makes no plans for sm_90",
        "pip install 'gemma3-compile[trt]' on a host with sm_90",
    ),
    "Hopper with RTX asked for": (lambda: chosen(BOTH, H100, flavour="rtx"), "makes no plans for sm_90", "[trt]'"),
    "Hopper from afar with both": (
        lambda: chosen(BOTH, architectures=(90,)),
        "full TensorRT builds sm_90 on the GPU that it is for, and this host has no NVIDIA GPU",
        "on a host with sm_90",
    ),
    "full TensorRT without a GPU": (
        lambda: chosen(FULL),
        "full TensorRT builds a plan on the GPU that it is for, and this host has no NVIDIA GPU",
        "[trt-rtx]', which builds without a GPU",
    ),
    "full TensorRT for another GPU": (
        lambda: chosen(FULL, H100, architectures=(89,)),
        "full TensorRT builds sm_89 on the GPU that it is for, and this host has sm_90",
        "[trt-rtx]'",
    ),
    "full TensorRT for two GPUs": (
        lambda: chosen(FULL, H100, L4),
        "builds for one GPU at a time, not for sm_89, sm_90 together",
        "build twice: TensorRT for RTX for sm_89",
    ),
    "a mixture": (lambda: chosen(RTX, architectures=(80, 90)), "makes no plans for sm_90", "build twice"),
    "an architecture of nobody": (lambda: chosen(RTX, architectures=(130,)), "makes no plans for sm_130", "name an --arch"),
    "fp8 on sm_80": (
        lambda: chosen(RTX, architectures=(80, 89), dtype="fp8"),
        "sm_80 has no fp8 products; sm_89 is the oldest that has them",
        "--dtype int4 or bfloat16",
    ),
    "fp8 on the GPU that is there": (
        lambda: chosen(RTX, PresentGpu(name="NVIDIA A10", architecture=86), dtype="fp8"),
        "sm_86 has no fp8 products",
        "--dtype int4 or bfloat16",
    ),
    "bfloat16 on sm_75": (
        lambda: chosen(RTX, architectures=(75,)),
        "sm_75 has no bfloat16, in which every plan computes; sm_80 is the oldest that has it",
        "the target `ort` runs on such a host",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    choice, message, hint = REFUSED[name]
    with pytest.raises(HostError) as caught:
        choice()
    assert message in caught.value.message
    assert caught.value.hint is not None and hint in caught.value.hint
    assert caught.value.exit_code == 1
