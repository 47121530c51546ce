"""Formulas from launches: what comes out, that every kernel gives some, and that wrong ones are found."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from autotune.gpu import GPUS
from autotune.kernel import Case, Config, Kernel, Tensors
from autotune.kernels.cache_write import CacheWrite
from autotune.kernels.siglip_attention import SiglipAttention
from autotune.kernels.window_decode import WindowDecode
from autotune.launch import Launch
from autotune.launch_template import Dimension, Parameter, Piece, TemplateError, template
from autotune.registry import KERNELS
from gemma3_compile.model_shapes import model_shapes
from gemma3_compile.presets import preset
from tests.autotune import jit_functions

B = Dimension(name="B", low=1, high=8)
S = Dimension(name="S", low=1, high=2048)
VARYING = {"batch": B, "chunk": S, "tokens": S, "rows": S, "images": dataclasses.replace(B, name="N")}
MODEL = model_shapes(preset("4b"))


def cache_write(**dimensions: Dimension) -> tuple[Piece, ...]:
    kernel = CacheWrite()
    dims = {"batch": 1, "tokens": 9, "kv_heads": 4, "head_dim": 256, "window": 512}
    case = Case(dtype="bfloat16", dims=dims)
    return template(kernel, case, kernel.default(case, GPUS["a100"]), dimensions)


def test_a_decision_by_a_size_makes_two_pieces() -> None:
    short, long = cache_write(batch=B, tokens=S)
    assert short.when == ("S <= 512",) and long.when == ("S > 512",)
    assert short.launches[0].grid == ("(S + 15) // 16", "4", "B")
    assert long.launches[0].grid == ("32", "4", "B")
    assert short.launches[0].varying == long.launches[0].varying == {"tokens"}
    assert [(t.name, t.role) for t in short.tensors if t.role != "input"] == [
        ("k_cache", "in_place"),
        ("v_cache", "in_place"),
    ]
    assert next(t for t in short.tensors if t.name == "k").shape == ("B", "S", "4", "256")


def test_a_range_that_needs_one_piece_has_one() -> None:
    (piece,) = cache_write(batch=B, tokens=dataclasses.replace(S, high=512))
    assert piece.launches[0].grid == ("(S + 15) // 16", "4", "B")


def decode(**parameters: Parameter) -> tuple[Piece, ...]:
    kernel = WindowDecode()
    dims = {"batch": 1, "heads": 8, "kv_heads": 4, "head_dim": 256, "slots": 512, "keys": 512, "scale_dim": 256}
    case = Case(dtype="bfloat16", dims=dims)
    return template(kernel, case, kernel.default(case, GPUS["a100"]), {"batch": B}, parameters)


def test_workspaces_and_counters_are_told_apart() -> None:
    (piece,) = decode()
    roles = {tensor.name: tensor.role for tensor in piece.tensors}
    assert (roles["_partial"], roles["_zero_arrived"], roles["out"]) == ("workspace", "counter", "output")
    assert next(t for t in piece.tensors if t.name == "_zero_arrived").shape == ("B", "4")


def test_a_parameter_takes_the_place_of_a_number() -> None:
    (piece,) = decode(scale_log2=Parameter(name="scale", formula="scale * 1.4426950408889634", value=0.0625))
    assert piece.launches[0].values["scale_log2"] == "scale * 1.4426950408889634"
    with pytest.raises(
        TemplateError, match=r"the formulas give 0: scale_log2 = 0\.0625, but the kernel launches 0\.09"
    ):
        decode(scale_log2=Parameter(name="scale", formula="scale", value=0.0625))


def test_views_are_a_tensor_and_an_offset() -> None:
    kernel = SiglipAttention()
    case = Case(dtype="bfloat16", dims={"images": 1, "patches": 64, "heads": 4, "head_dim": 72})
    (piece,) = template(kernel, case, kernel.default(case, GPUS["a100"]), {"images": VARYING["images"]})
    tensors = piece.launches[0].tensors
    assert [tensors[name] for name in ("q_ptr", "k_ptr", "v_ptr")] == [("qkv", 0), ("qkv", 576), ("qkv", 1152)]


@pytest.mark.parametrize("gpu", ["a100", "h100"])
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_gives_formulas(name: str, gpu: str) -> None:
    """Checked at a table of sizes by ``template`` itself."""
    kernel = KERNELS[name]
    for stage in kernel.stages:
        dtype = "int4" if "int4" in kernel.dtypes else kernel.dtypes[0]
        for use in kernel.uses(MODEL, stage, batch=2, context=64, dtype=dtype)[:1]:
            dimensions = {key: VARYING[key] for key in use.case.dims if key in VARYING and use.case.dims[key] > 1}
            if stage == "decode":
                dimensions = {key: dataclasses.replace(each, high=2, low=2) for key, each in dimensions.items()}
            pieces = template(kernel, use.case, kernel.default(use.case, GPUS[gpu]), dimensions)
            assert pieces and all(piece.launches for piece in pieces)


class Odd(Kernel):
    """A kernel whose launches depend on the size as ``grid`` and ``more`` say."""

    name = "odd"
    dtypes = ("float32",)
    stages = ("prefill",)
    source = ()

    def __init__(self, grid: Any = None, more: Any = None) -> None:
        self.grid = grid or (lambda n: (n, 1, 1))
        self.more: Any = more or (lambda n: {})

    def inputs(self, case: Case, *, device: torch.device | str, seed: int = 0) -> Tensors:
        return {"x": torch.empty(case.dims["n"], device=device)}

    def outputs(self, case: Case, config: Config, *, device: torch.device | str) -> Tensors:
        return {"y": torch.empty(case.dims["n"], device=device)}

    def launches(self, case: Case, config: Config, tensors: Tensors) -> tuple[Launch, ...]:
        n = tensors["x"].shape[0]
        arguments = {"x_ptr": tensors["x"], "y_ptr": tensors["y"], "n": n}
        fields = {"grid": self.grid(n), "arguments": arguments, "constants": {}} | self.more(n)
        return (Launch(function=jit_functions.scaled_copy, **fields),)

    def oracle(self, case: Case, inputs: Tensors) -> Tensors:
        return {"y": inputs["x"]}

    def uses(self, *arguments: Any, **named: Any) -> Any: ...
    def bucket(self, case: Case) -> Any: ...
    def space(self, case: Case) -> Any: ...
    def refusal(self, *arguments: Any) -> Any: ...
    def default(self, *arguments: Any) -> Any: ...
    def cost(self, case: Case) -> Any: ...


def odd(kernel: Kernel, high: int = 100) -> tuple[Piece, ...]:
    case, config = Case(dtype="float32", dims={"n": 5}), Config(constants={}, num_warps=4, num_stages=1)
    return template(kernel, case, config, {"n": Dimension(name="n", low=1, high=high)})


def test_every_way_through_is_found() -> None:
    pieces = odd(Odd(lambda n: (1, 1, 1) if n == 1 else (2, 1, 1) if n < 33 else (n % 7 + 3, max(n, 50), 1)))
    assert {piece.launches[0].grid[0] for piece in pieces} == {"1", "2", "n % 7 + 3"}
    assert len(pieces) == 4


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (Odd(more=lambda n: {"num_warps": 4 if type(n) is not int or n < 64 else 8}), "options"),
        (Odd(lambda n: (hash(str(n)) % 5, 1, 1)), "the formulas give 0: grid"),
        (Odd(lambda n: (round(n**0.5), 1, 1)), "lacks|depends|formula"),
    ],
)
def test_what_no_formula_says_is_refused(kernel: Odd, words: str) -> None:
    with pytest.raises(Exception, match=words):
        odd(kernel)


def test_a_constant_that_is_a_size_makes_a_piece_of_each() -> None:
    pieces = odd(Odd(more=lambda n: {"constants": {"N": 2 * n}}), high=5)
    assert {piece.when: piece.launches[0].launch.constants["N"] for piece in pieces} == {
        (f"2 * n == {2 * n}",): 2 * n for n in range(1, 6)
    }


def test_an_integer_that_outgrows_its_type_is_refused() -> None:
    with pytest.raises(TemplateError, match="wide integers"):
        odd(Odd(more=lambda n: {"arguments": {"n": n * 2**20}}), high=4096)
