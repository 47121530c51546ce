"""Each rule over a network of one or two layers, made through TensorRT's own API, against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from autotune.kernels.sliding_window_attention import sliding_window_attention
from graphs.trt.interpreter import Interpreter, InterpreterError, Program
from graphs.trt.interpreter.rule import Rule, merge_rules
from graphs.trt.interpreter.rules import RULES
from graphs.trt.interpreter.rules_plugins import cache_write, window_decode, window_prefill
from graphs.trt.network import ParsedNetwork
from tests.graphs.trt.interpreter.stages import tensorrt

Build = Callable[[Any, Any], Any]
"""From TensorRT's module and a network to the layer whose outputs are asked for."""


def network_of(build: Build) -> ParsedNetwork:
    trt = tensorrt()
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    layer = build(trt, network)
    for index in range(layer.num_outputs):
        layer.get_output(index).name = f"out{index}"
        network.mark_output(layer.get_output(index))
    return ParsedNetwork(trt=trt, logger=logger, builder=builder, network=network, parser=None)


def run(build: Build, feeds: Mapping[str, Tensor]) -> Tensor:
    return Interpreter(Program.read(network_of(build))).run(feeds)["out0"]


X = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)


def x(trt: Any, network: Any, name: str = "x", shape: tuple[int, ...] = (2, 3, 4), dtype: Any = None) -> Any:
    return network.add_input(name, dtype or trt.float32, shape)


def const(network: Any, values: Any, dtype: Any = np.float32) -> Any:
    array = np.array(values, dtype=dtype)
    KEPT.append(array)  # TensorRT points into it
    return network.add_constant(array.shape, array).get_output(0)


KEPT: list[Any] = []


def strided(trt: Any, network: Any) -> Any:
    return network.add_slice(x(trt, network), (0, 1, 3), (2, 2, 2), (1, 1, -2))


def repeated(trt: Any, network: Any) -> Any:
    return network.add_slice(x(trt, network), (1, 0, 0), (3, 3, 4), (0, 1, 1))


def along_one_axis(trt: Any, network: Any) -> Any:
    layer = network.add_slice(x(trt, network), (1,), (2,), (1,))
    layer.axes = (-1,)
    return layer


def shuffled(trt: Any, network: Any) -> Any:
    layer = network.add_shuffle(x(trt, network))
    layer.first_transpose = trt.Permutation([2, 0, 1])  # [4, 2, 3]
    layer.reshape_dims = (0, -1)  # [4, 6]
    layer.second_transpose = trt.Permutation([1, 0])
    return layer


def gathered(trt: Any, network: Any) -> Any:
    return network.add_gather(x(trt, network), const(network, [[2, 0]], np.int32), 1)


def elements(trt: Any, network: Any) -> Any:
    index = const(network, [[[0, 1, 2, 0]], [[2, 2, 0, 1]]], np.int32)
    layer = network.add_gather_v2(x(trt, network), index, trt.GatherMode.ELEMENT)
    layer.axis = 1
    return layer


def averaged(trt: Any, network: Any) -> Any:
    return network.add_reduce(x(trt, network), trt.ReduceOperation.AVG, 0b101, True)


def multiplied(trt: Any, network: Any) -> Any:
    other = const(network, np.arange(20).reshape(1, 5, 4))
    return network.add_matrix_multiply(x(trt, network), trt.MatrixOperation.NONE, other, trt.MatrixOperation.TRANSPOSE)


def counted(trt: Any, network: Any) -> Any:
    layer = network.add_fill((2, 3), trt.FillOperation.LINSPACE, trt.int64)
    layer.set_input(1, const(network, 5, np.int64))
    layer.set_input(2, const(network, [10, 1], np.int64))
    return layer


def chosen(trt: Any, network: Any) -> Any:
    condition = network.add_elementwise(
        x(trt, network), const(network, np.full((1, 1, 1), 7)), trt.ElementWiseOperation.GREATER
    )
    return network.add_select(condition.get_output(0), network.get_input(0), const(network, np.full((1, 1, 1), -1)))


def divided(trt: Any, network: Any) -> Any:
    whole = network.add_cast(x(trt, network), trt.int64).get_output(0)
    less = network.add_elementwise(whole, const(network, [[[9]]], np.int64), trt.ElementWiseOperation.SUB)
    return network.add_elementwise(
        less.get_output(0), const(network, [[[4]]], np.int64), trt.ElementWiseOperation.FLOOR_DIV
    )


def normalised(trt: Any, network: Any) -> Any:
    scale, bias = const(network, np.full((1, 1, 4), 2.0)), const(network, np.full((1, 1, 4), 0.5))
    layer = network.add_normalization_v2(x(trt, network), scale, bias, 0b100)
    layer.epsilon = 0.25
    return layer


def squeezed(trt: Any, network: Any) -> Any:
    axes = const(network, [0, -1], np.int64)
    wide = network.add_unsqueeze(x(trt, network), axes)  # [1, 2, 3, 4, 1]
    return network.add_squeeze(wide.get_output(0), const(network, [4], np.int64))


EXPECTED: dict[str, tuple[Build, Tensor]] = {
    "a slice that steps back": (strided, X[:, 1:3, [3, 1]]),
    "a slice that stands still": (repeated, X[1:].expand(3, 3, 4)),
    "a slice along its last axis": (along_one_axis, X[..., 1:3]),
    "two transposes around a reshape": (shuffled, X.permute(2, 0, 1).reshape(4, 6).T),
    "rows by index": (gathered, X[:, [[2, 0]]]),
    "elements by index": (elements, torch.stack([X[0, [0, 1, 2, 0], range(4)], X[1, [2, 2, 0, 1], range(4)]])[:, None]),
    "a mean over two axes": (averaged, X.mean((0, 2), keepdim=True)),
    "a product with the other side turned": (multiplied, X @ torch.arange(20.0).reshape(5, 4).T),
    "numbers along two axes": (counted, torch.tensor([[5, 6, 7], [15, 16, 17]])),
    "one or the other": (chosen, torch.where(X > 7, X, torch.tensor(-1.0))),
    "division downwards": (divided, torch.tensor([(i - 9) // 4 for i in range(24)]).reshape(2, 3, 4)),
    "a norm of groups of four": (normalised, (X - X.mean(-1, keepdim=True)) / (1.25 + 0.25) ** 0.5 * 2 + 0.5),
    "dimensions of one": (squeezed, X[None]),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_layer_computes(name: str) -> None:
    build, expected = EXPECTED[name]
    needs_x = build is not counted
    torch.testing.assert_close(run(build, {"x": X} if needs_x else {}), expected, rtol=1e-6, atol=1e-6)


def attention(trt: Any, network: Any, *, lengths: bool = True, mask: bool = True) -> Any:
    q = network.add_input("q", trt.bfloat16, (2, 4, 3, 8))
    k, v = (network.add_input(name, trt.bfloat16, (2, 2, 6, 8)) for name in ("k", "v"))
    made = network.add_attention(q, k, v, trt.AttentionNormalizationOp.SOFTMAX, False)
    if mask:
        made.mask = network.add_input("mask", trt.bool, (2, 1, 3, 6))
    if lengths:
        made.key_value_lengths = network.add_input("lengths", trt.int32, (2,))
    made.get_output(0).name = "out0"
    network.mark_output(made.get_output(0))
    return made


def attention_program(**options: bool) -> Program:
    trt = tensorrt()
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    attention(trt, network, **options)
    return Program.read(ParsedNetwork(trt=trt, logger=logger, builder=builder, network=network, parser=None))


@pytest.mark.parametrize("wide", [False, True])
def test_attention_sees_what_mask_and_lengths_allow(wide: bool) -> None:
    """Query head n goes with key head n // 2; nothing is scaled."""
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    mask, lengths = torch.rand(2, 1, 3, 6) < 0.6, torch.tensor([5, 2], dtype=torch.int32)
    mask[..., 0] = True
    short = torch.float32 if wide else torch.bfloat16
    feeds = {"q": q.to(short), "k": k.to(short), "v": v.to(short), "mask": mask, "lengths": lengths}
    found = Interpreter(attention_program(), wide=wide).run(feeds)["out0"]
    exact = [feeds[name].double() for name in ("q", "k", "v")]
    scores = exact[0] @ exact[1].repeat_interleave(2, 1).transpose(2, 3)
    visible = mask & (torch.arange(6) < lengths[:, None])[:, None, None]
    expected = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ exact[2].repeat_interleave(2, 1)
    torch.testing.assert_close(found, expected.to(short), rtol=1e-5 if wide else 2**-8, atol=1e-6)


def dequantised(trt: Any, network: Any, dtype: Any, scales: tuple[int, ...]) -> Any:
    codes = network.add_input("codes", dtype, (4, 6))
    layer = network.add_dequantize(codes, network.add_input("scales", trt.bfloat16, scales), trt.bfloat16)
    layer.axis = 1
    return layer


@pytest.mark.parametrize(("kind", "scales"), [("int8", (6,)), ("fp8", (6,)), ("int4", (4, 2))])
def test_codes_times_scales(kind: str, scales: tuple[int, ...]) -> None:
    trt = tensorrt()
    codes = torch.randint(-8, 8, (4, 6))
    given = codes.to(torch.float8_e4m3fn if kind == "fp8" else torch.int8)
    steps = (torch.rand(scales) + 0.5).bfloat16()
    found = run(lambda t, n: dequantised(t, n, getattr(trt, kind), scales), {"codes": given, "scales": steps})
    each = steps.float() if len(scales) == 1 else steps.float().repeat_interleave(3, 1)
    assert torch.equal(found, (codes * each).bfloat16())


WRONG: dict[str, tuple[Build, str]] = {
    "a kind": (lambda t, n: n.add_softmax(x(t, n)), r"`\(Unnamed.*` is of the kind SOFTMAX, which"),
    "an operation": (
        lambda t, n: n.add_unary(x(t, n), t.UnaryOperation.CEIL),
        r"\(UNARY\): `op` is CEIL, but the interpreter knows SQRT, ",
    ),
    "a mode": (
        lambda t, n: _with(n.add_slice(x(t, n), (0, 0, 0), (4, 4, 4), (1, 1, 1)), mode=t.SampleMode.WRAP),
        r"\(SLICE\): `mode` is WRAP",
    ),
}


def _with(layer: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_known_is_refused(what: str) -> None:
    build, message = WRONG[what]
    with pytest.raises(InterpreterError, match=message):
        run(build, {"x": X})


def test_an_attention_that_is_not_known_is_refused() -> None:
    def causal(trt: Any, network: Any) -> Any:
        made = attention(trt, network, lengths=False, mask=False)
        made.causal_kind = trt.CausalMaskKind.LOWER_RIGHT

    trt = tensorrt()
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    causal(trt, network)
    program = Program.read(ParsedNetwork(trt=trt, logger=None, builder=builder, network=network, parser=None))
    feeds = {name: torch.zeros(2, 4 if name == "q" else 2, 3 if name == "q" else 6, 8).bfloat16() for name in "qkv"}
    with pytest.raises(InterpreterError, match="causal"):
        Interpreter(program).run(feeds)


def test_an_attribute_that_no_rule_reads_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another version of TensorRT, say: nothing is left out in silence."""
    from graphs.trt.interpreter import program as module

    blind = {**RULES, "REDUCE": Rule(interface="IReduceLayer", body=RULES["REDUCE"].body, attributes=("axes", "op"))}
    monkeypatch.setattr(module, "RULES", blind)
    with pytest.raises(InterpreterError, match=r"\(REDUCE\): it has attributes .* not know: keep_dims"):
        Program.read(network_of(averaged))


def test_two_rules_for_one_kind() -> None:
    with pytest.raises(InterpreterError, match="two rules interpret UNARY"):
        merge_rules(RULES, {"UNARY": RULES["UNARY"]})


def test_every_rule_says_what_tensorrt_defines() -> None:
    assert all(rule.body.__doc__ for rule in RULES.values())


@pytest.mark.parametrize("wrong", [X.double(), X[:1]])
def test_what_the_network_does_not_say_of_an_input(wrong: Tensor) -> None:
    with pytest.raises(
        InterpreterError, match=r"the input `x` gives .* where the network has torch.float32 \[2, 3, 4\]"
    ):
        run(averaged, {"x": wrong})


def test_inputs_that_are_missing_or_too_many() -> None:
    with pytest.raises(InterpreterError, match="the input `x` was not fed"):
        run(averaged, {})
    with pytest.raises(InterpreterError, match="no input `y`"):
        run(averaged, {"x": X, "y": X})


def oracle(t: Mapping[str, Tensor], ids: Tensor | None, window: int) -> tuple[Tensor, Tensor, Tensor]:
    return sliding_window_attention(
        t["q"], t["k"], t["v"], t["k_cache"], t["v_cache"], t["start"], t["length"], ids, window, 0.3
    )


@pytest.mark.parametrize("start", [0, 5, 16, 29])
@pytest.mark.parametrize("images", [False, True])
def test_the_windows_formulas_are_those_of_the_oracle(start: int, images: bool) -> None:
    """Chunks, and single tokens, of three sequences: one whole, one with padding, one idle."""
    batch, chunk, window = 3, 12, 16
    t = {name: torch.randn(batch, chunk, heads, 8) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    t |= {f"{name}_cache": torch.randn(batch, 2, window, 8) for name in "kv"}
    t |= {"start": torch.tensor([start, start + 3, start]), "length": torch.tensor([chunk, 7, 0])}
    ids = torch.full((batch, chunk), -1)
    end = torch.arange(1, chunk + 1).expand(batch, chunk).clone()
    if images:
        ids[:, 2:6], end[:, 2:6] = 0, 6
    t["visible_end"] = end
    out, keys, values = oracle(t, ids if images else None, window)
    real = (torch.arange(chunk) < t["length"][:, None])[..., None, None]
    found = window_prefill(t, 0.3)
    torch.testing.assert_close(found, out.masked_fill(~real, 0), rtol=1e-5, atol=1e-6)
    cache_write(t)
    assert torch.equal(t["k_cache"], keys) and torch.equal(t["v_cache"], values)


@pytest.mark.parametrize("start", [0, 5, 15, 16, 40])
def test_one_token_over_its_ring(start: int) -> None:
    t = {name: torch.randn(2, 1, heads, 8) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    t |= {f"{name}_cache": torch.randn(2, 2, 16, 8) for name in "kv"}
    t |= {"start": torch.tensor([start, start]), "length": torch.tensor([1, 0])}
    t["position"] = t["start"] + t["length"] - 1
    out, keys, values = oracle(t, None, 16)
    cache_write(t)
    found = window_decode(t, 0.3)
    torch.testing.assert_close(found[0], out[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(t["k_cache"], keys) and torch.equal(t["v_cache"], values)
    assert torch.isfinite(found[1]).all() and (start > 0 or not found[1].any()), (
        "an idle sequence at its start gives zeros"
    )
