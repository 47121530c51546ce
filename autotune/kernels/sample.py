"""The next token of each row of logits, on the GPU: greedy, or drawn after temperature, top-k, top-p and min-p.

Legend: B rows, V vocabulary, g groups of neighbouring logits in a row, P borders.

The options of :class:`runtimes.sampling.SamplingOptions` are tensors of one value a row, so that one recorded launch
serves all requests. Their order is that module's: repetition penalty, temperature, top-k (ties with the last are kept),
top-p (the fewest tokens that reach it), min-p, and the inverse transform of the row's uniform number: in descending
order of logits, ties by ascending id, or in order of ids where nothing is filtered. Greedy takes the lowest id among the
largest. A row that holds a NaN or an infinity gives -1.

Weights are integers (:mod:`autotune.kernels.sample_order`), and so is every sum of them: the oracle's token is the
kernels', bit for bit, whatever the GPU, the configuration or the order of adding up. What a filter keeps is always the
beginning of the row in descending order, so that it is known by its mass; the last token that top-p keeps, and the token
that is drawn, are both found by the place in the row's mass that they cover.

    launches                               a row of V logits reads
    1. largest and smallest of each group  4 V bytes
    2. greedy and top-k (up to g): the token, by one program, from the groups that hold any of the k largest;
       other rows: masses before P borders 4 V
    3-5. top-p: where its last token lies  8 V: masses between two of the borders, a list of what lies between two of
                                           those, and the token of that list that covers the place
    6-8. the draw likewise                 8 V

A launch that a row has no need of leaves at once. Every value of every option is served; a top-k of more than g tokens
is only slower.

Sources: arXiv 1904.09751 (top-p), 2407.01082 (min-p), 1909.05858 (repetition penalty).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import triton
from torch import Tensor

from autotune.gpu import Gpu
from autotune.kernel import Case, Config, Cost, Kernel, Space, Stage, Tensors, Use
from autotune.kernels.sample_order import C0, C1, C2, C3, C4, C5, C6, FARTHEST, RATE
from autotune.kernels.sample_passes import (
    LINE,
    STATE,
    find_kernel,
    first_kernel,
    list_kernel,
    narrow_kernel,
    reduce_kernel,
)
from autotune.launch import Launch
from autotune.model_shapes import ModelShapes
from autotune.tensor_checks import check_tensor
from runtimes.errors import UsageError
from runtimes.sampling import SamplingOptions

OPTION_DTYPES = {
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "penalty": torch.float32,
}
"""Tensors [B] of options. Greedy is temperature 0; no filter is top-k 0, top-p 1, min-p 0, penalty 1."""
MOST_TOKENS = 2**22
"""V at most: sums of weights stay below 2**62."""
_DEFAULT = {"GROUP": 128, "BLOCK": 2048, "CHUNK": 4096, "SEARCH": 256, "PIVOTS": 32, "DEPENDENT": 0}


def weights_of(logits_V: Tensor, temperature: float) -> Tensor:
    """Weights of a row, int64: 2**40 exp((x - largest) / temperature), to 1e-7 or to 1, whichever is more."""
    rate = torch.tensor(RATE.value, dtype=torch.float32) / torch.tensor(temperature, dtype=torch.float32)
    steps_V = ((logits_V.max() - logits_V) * rate.to(logits_V.device)).clamp(max=FARTHEST.value).long()
    h_V = (steps_V & 0xFFFFFF) * 64 - 2**29
    m_V = torch.full_like(h_V, C6.value)
    for c in (C5, C4, C3, C2, C1, C0):
        m_V = ((m_V * h_V) >> 30) + c.value
    return (m_V << 10) >> (steps_V >> 24)


def sample_oracle(logits_BV: Tensor, options: Tensors, uniform_B: Tensor, seen_BV: Tensor | None = None) -> Tensor:
    """The torch oracle: tokens int32 [B]."""
    tokens = []
    for row, logits_V in enumerate(logits_BV):
        o = {name: values_B[row].item() for name, values_B in options.items()}
        if seen_BV is not None:
            penalty = options["penalty"][row]
            penalised_V = torch.where(logits_V < 0, logits_V * penalty, logits_V / penalty)
            logits_V = torch.where(seen_BV[row] != 0, penalised_V, logits_V)
        tokens.append(_picked(logits_V, o, float(uniform_B[row])))
    return torch.tensor(tokens, dtype=torch.int32, device=logits_BV.device)


def _picked(logits_V: Tensor, o: dict[str, float], uniform: float) -> int:
    if not bool(logits_V.isfinite().all()):
        return -1
    if o["temperature"] <= 0:
        return int((logits_V == logits_V.max()).nonzero()[0])
    weights_V = weights_of(logits_V, o["temperature"])
    if o["top_k"] <= 0 and o["top_p"] >= 1 and o["min_p"] <= 0:
        ids_K = torch.arange(len(weights_V), device=logits_V.device)
    else:
        sorted_V, ids_K = torch.sort(logits_V, descending=True, stable=True)
        if 0 < o["top_k"] < len(logits_V):
            ids_K = ids_K[: int((sorted_V >= sorted_V[int(o["top_k"]) - 1]).sum())]
    weights_K = weights_V[ids_K]
    end_K = weights_K.cumsum(0)
    mass = int(end_K[-1])
    likely = int(weights_K[weights_K >= math.ceil(o["min_p"] * 2**40)].sum())
    if o["top_p"] < 1:
        needed = min(max(math.ceil(o["top_p"] * float(mass)), 1), mass)
        mass = int(end_K[(end_K < needed).sum()])
    mass = min(mass, likely)
    place = min(int(uniform * float(mass)), mass - 1)
    return int(ids_K[(end_K <= place).sum()])


def option_tensors(options: Sequence[SamplingOptions], device: torch.device | str) -> Tensors:
    """The options of each row as the kernels take them; seeds stay with the caller, who draws the uniform numbers."""
    columns = {
        "temperature": [o.temperature for o in options],
        "top_k": [min(o.top_k or 0, 2**31 - 1) for o in options],
        "top_p": [o.top_p for o in options],
        "min_p": [o.min_p for o in options],
        "penalty": [o.repetition_penalty for o in options],
    }
    return {name: torch.tensor(columns[name], dtype=dtype, device=device) for name, dtype in OPTION_DTYPES.items()}


def sample(
    logits_BV: Tensor,
    options: Sequence[SamplingOptions],
    uniform_B: Tensor,
    seen_BV: Tensor | None = None,
    *,
    config: Config | None = None,
) -> Tensor:
    """The next token of each row.

    Args:
        logits_BV: fp32.
        options: one for each row.
        uniform_B: fp64, from 0 up to and without 1.
        seen_BV: uint8, 1 at tokens that the prompt or the text so far holds; the new ones are marked in it. Needed where
            a row has a repetition penalty.
        config: None takes the heuristic.

    Returns:
        int32 [B]; -1 where a row held a NaN or an infinity.

    Raises:
        UsageError: a shape, dtype or device that does not fit, or a penalty without ``seen_BV``.
    """
    rows, vocab = logits_BV.shape
    device = logits_BV.device
    if len(options) != rows:
        raise UsageError(f"sampling needs options for each of {rows} rows of logits, but got {len(options)}")
    if vocab > MOST_TOKENS:
        raise UsageError(f"sampling takes rows of up to {MOST_TOKENS} logits, but got {vocab}")
    check_tensor("logits", logits_BV, shape=(rows, vocab), dtypes=(torch.float32,), device=device)
    check_tensor("uniform", uniform_B, shape=(rows,), dtypes=(torch.float64,), device=device)
    if seen_BV is not None:
        check_tensor("seen", seen_BV, shape=(rows, vocab), dtypes=(torch.uint8,), device=device)
    elif any(o.repetition_penalty != 1 for o in options):
        raise UsageError("a repetition penalty needs `seen`, the tokens said so far, but it is None")
    chosen = config or _default()
    tensors = {"logits": logits_BV, "uniform": uniform_B} | option_tensors(options, device)
    if seen_BV is not None:
        tensors["seen"] = seen_BV
    tensors |= _outputs(rows, vocab, chosen, device)
    for launch in _launches(chosen, tensors):
        launch.run()
    return tensors["token"]


def _outputs(rows: int, vocab: int, config: Config, device: torch.device | str) -> Tensors:
    c = config.constants
    groups, blocks = triton.cdiv(vocab, c["GROUP"]), triton.cdiv(vocab, c["BLOCK"])
    shapes = {
        "token": ((rows,), torch.int32),
        "_maxima": ((rows, groups), torch.float32),
        "_tops": ((rows, blocks), torch.float32),
        "_bottoms": ((rows, blocks), torch.float32),
        "_listed": ((rows, groups), torch.int32),
        "_values": ((rows, vocab), torch.float32),
        "_ids": ((rows, vocab), torch.int32),
        "_scratch": ((rows, 2 * c["SEARCH"]), torch.int64),
        "_state": ((rows, STATE), torch.int64),
        "_borders": ((rows, 3, c["PIVOTS"]), torch.int64),
    }
    tensors = {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}
    return tensors | {"_zero_sums": torch.zeros((rows, _sums(c["PIVOTS"])), dtype=torch.int64, device=device)}


def _sums(pivots: int) -> int:
    return 4 * pivots + 2 * int(LINE.value)


_OPTIONS = ("temperature", "penalty", "top_k", "top_p", "min_p", "uniform")
_LIST = ("values", "ids", "scratch")
_FIRST = (
    *_OPTIONS,
    "maxima",
    "tops",
    "bottoms",
    "listed",
    *_LIST,
    "state",
    "borders",
    "sums",
    "token",
    "vocab",
    "groups",
)
_NARROW = ("temperature", "penalty", "top_p", "uniform", "state", "borders", "sums", "vocab")
_TO_LIST = ("penalty", "top_p", "state", "borders", "sums", "values", "ids", "vocab")
_FIND = ("temperature", "top_p", "state", "borders", "sums", *_LIST, "token", "vocab")


def _launches(config: Config, tensors: Tensors) -> tuple[Launch, ...]:
    rows, vocab = tensors["logits"].shape
    groups, c = tensors["_maxima"].shape[1], config.constants
    named: dict[str, Any] = {name.removeprefix("_zero").removeprefix("_"): tensor for name, tensor in tensors.items()}
    named |= {"vocab": vocab, "groups": groups}
    fixed = dict(c) | {"STATE": STATE, "WIDE": triton.next_power_of_2(_sums(c["PIVOTS"]))}

    def launch(function: Any, grid: tuple[int, int], arguments: Sequence[str], constants: str, **more: int) -> Launch:
        given = {name if name in ("vocab", "groups") else f"{name}_ptr": named[name] for name in arguments}
        set_: dict[str, Any] = {name: fixed[name] for name in (*constants.split(), "DEPENDENT")} | more
        (given if "seen" in named else set_)["seen_ptr"] = named.get("seen")
        return Launch(
            function=function,
            grid=(*grid, 1),
            arguments=given,
            constants=set_,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            dependent=bool(c["DEPENDENT"]),
        )

    blocks = (triton.cdiv(vocab, c["BLOCK"]), rows)
    passes = [
        launch(
            reduce_kernel, blocks, ("logits", "penalty", "maxima", "tops", "bottoms", "vocab", "groups"), "GROUP BLOCK"
        ),
        launch(first_kernel, blocks, ("logits", *_FIRST), "GROUP BLOCK CHUNK SEARCH PIVOTS STATE"),
    ]
    for which in (0, 1):
        passes += [
            launch(narrow_kernel, blocks, ("logits", *_NARROW), "BLOCK SEARCH PIVOTS STATE", WHICH=which),
            launch(list_kernel, blocks, ("logits", *_TO_LIST), "BLOCK PIVOTS STATE", WHICH=which),
            launch(find_kernel, (rows, 1), _FIND, "SEARCH PIVOTS WIDE STATE", WHICH=which),
        ]
    return tuple(passes)


def _default() -> Config:
    return Config(constants=_DEFAULT, num_warps=8, num_stages=1)


class Sample(Kernel):
    """Options are the same for all rows of a case: temperature, top-p, min-p and penalty in hundredths."""

    name: ClassVar[str] = "sample"
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    stages: ClassVar[tuple[Stage, ...]] = ("prefill", "decode")
    source: ClassVar[tuple[str, ...]] = (
        "autotune.kernels.sample",
        "autotune.kernels.sample_order",
        "autotune.kernels.sample_passes",
    )

    def uses(self, model: ModelShapes, stage: Stage, *, batch: int, context: int, dtype: str) -> tuple[Use, ...]:
        if stage == "vision":
            return ()
        recommended = {"temperature": 100, "top_k": 64, "top_p": 95, "min_p": 0, "penalty": 100}
        case = Case(dtype="float32", dims={"rows": batch, "vocab": model.vocab, **recommended})
        return (Use(name="sampling", case=case, count=1),)

    def bucket(self, case: Case) -> str:
        d = case.dims
        kind = "top-k" if d["top_k"] else "top-p" if d["top_p"] < 100 else "min-p" if d["min_p"] else "all"
        rows = min(triton.next_power_of_2(d["rows"]), 64)
        vocab = triton.next_power_of_2(d["vocab"] * 3 // 4)
        return f"rows<={rows} vocab~{vocab} {kind if d['temperature'] else 'greedy'} penalty={int(d['penalty'] != 100)}"

    def space(self, case: Case) -> Space:
        constants = {
            "GROUP": (32, 64, 128, 256),
            "BLOCK": (1024, 2048, 4096),
            "CHUNK": (1024, 2048, 4096),
            "SEARCH": (128, 256, 512),
            "PIVOTS": (16, 32),
            "DEPENDENT": (0,),
        }
        return Space(constants=constants, num_warps=(4, 8, 16), num_stages=(1,))

    def refusal(self, case: Case, config: Config, gpu: Gpu) -> str | None:
        c = config.constants
        tiles = (
            ("CHUNK", c["CHUNK"], 64),
            ("BLOCK", c["BLOCK"], 64),
            ("PIVOTS", c["PIVOTS"] // 4 * c["CHUNK"], 128),
            ("SEARCH", c["PIVOTS"] * c["SEARCH"], 32),  # sums of 64 bits
        )
        for name, tile, most in tiles:
            if tile // (32 * config.num_warps) > most:
                return f"{name}: {tile} values in {config.num_warps} warps take too many registers a thread"
        # On an H100 dependent launches gained nothing beyond greedy rows, and 3 of 1040 draws were wrong with an earlier version.
        return "its launches are not known to be right as dependent ones" if c["DEPENDENT"] else None

    def default(self, case: Case, gpu: Gpu) -> Config:
        return _default()

    def inputs(self, case: Case, *, device: torch.device | str, seed: int = 0) -> Tensors:
        rows, vocab, penalty = (case.dims[name] for name in ("rows", "vocab", "penalty"))
        shape, drawn = (rows, vocab), torch.uint8 if penalty != 100 else None
        if str(device) == "meta":
            tensors = {name: torch.empty(rows, dtype=dtype, device=device) for name, dtype in OPTION_DTYPES.items()}
            tensors |= {"logits": torch.empty(shape, device=device)}
            tensors |= {"uniform": torch.empty(rows, dtype=torch.float64, device=device)}
            return tensors if drawn is None else tensors | {"seen": torch.empty(shape, dtype=drawn, device=device)}
        generator = torch.Generator(device=device).manual_seed(seed)
        tensors = {
            name: torch.full((rows,), case.dims[name] / (1 if name == "top_k" else 100), device=device).to(dtype)
            for name, dtype in OPTION_DTYPES.items()
        }
        noise_BV = torch.rand(shape, generator=generator, device=device)
        ranks_BV = noise_BV.argsort(1).float() + 1
        tensors["logits"] = 20 - 1.5 * ranks_BV.log() + torch.rand(shape, generator=generator, device=device)
        tensors["uniform"] = torch.rand(rows, generator=generator, device=device).double()
        return tensors if drawn is None else tensors | {"seen": (noise_BV < 0.01).to(drawn)}

    def outputs(self, case: Case, config: Config, *, device: torch.device | str) -> Tensors:
        return _outputs(case.dims["rows"], case.dims["vocab"], config, device)

    def launches(self, case: Case, config: Config, tensors: Tensors) -> tuple[Launch, ...]:
        return _launches(config, tensors)

    def oracle(self, case: Case, inputs: Tensors) -> Tensors:
        options = {name: inputs[name] for name in OPTION_DTYPES}
        token = sample_oracle(inputs["logits"], options, inputs["uniform"], inputs.get("seen"))
        if "seen" not in inputs:
            return {"token": token}
        return {"token": token, "seen": inputs["seen"].scatter(1, token.long()[:, None], 1)}

    def in_place(self, case: Case) -> frozenset[str]:
        return frozenset() if case.dims["penalty"] == 100 else frozenset({"seen"})

    def cost(self, case: Case) -> Cost:
        rows, vocab = case.dims["rows"], case.dims["vocab"]
        return Cost(bytes=rows * vocab * (4 + int(case.dims["penalty"] != 100)), flops=4 * rows * vocab)
