"""The next token of each row of logits, on the GPU: greedy, or drawn after temperature, top-k, top-p and min-p.

Legend: B rows, V vocabulary, g groups of neighbouring logits in a row.

The options of :class:`runtimes.sampling.SamplingOptions` are tensors of one value a row, so that one recorded launch
serves all requests. Their order is that module's: repetition penalty, temperature, top-k (ties with the last are kept),
top-p (the fewest tokens that reach it), min-p, and the inverse transform of the row's uniform number: in descending
order of logits, ties by ascending id, or in order of ids where nothing is filtered. Greedy takes the lowest id among the
largest. Every value of every option is served; what keeps tens of thousands of tokens is only slower. A row that holds
a NaN or an infinity gives -1. Two launches:

1. Many programs reduce each group to its largest logit and its sum of weights, exp((x - largest) / temperature).
2. One program a row first bounds the logits that can matter: the k-th largest of the groups' maxima lies no higher than
   the k-th largest logit, and what weighs less than (1 - top_p) / V of the sum cannot reach the nucleus. It gathers what
   reaches the bound from the groups that hold any. Among these candidates it finds three thresholds: where the count
   comes to k, where the weights come to top_p of their sum, and where they pass uniform x sum. Each search compares with
   several pivots at a time until one value is left, so that nothing is sorted, and ties are exact.

Counts are exact. Weights are fp32 and add up in fp64: a token differs from one computed in fp64 only where its target
lies within about 1e-6 of the boundary between two tokens.

Sources: arXiv 1904.09751 (top-p), 2407.01082 (min-p), 1909.05858 (repetition penalty).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import triton
from torch import Tensor

from autotune.gpu import Gpu
from autotune.kernel import Case, Config, Cost, Kernel, Space, Stage, Tensors, Use
from autotune.kernels.sample_threshold import pick_kernel, reduce_groups_kernel
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
_DEFAULT = {"GROUP": 128, "BLOCK": 4096, "CHUNK": 2048, "SEARCH": 256, "PIVOTS": 16}


def sample_oracle(logits_BV: Tensor, options: Tensors, uniform_B: Tensor, seen_BV: Tensor | None = None) -> Tensor:
    """The torch oracle: tokens int32 [B], computed in fp64 beyond the penalty."""
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
    largest = logits_V.max()
    if o["temperature"] <= 0:
        return int((logits_V == largest).nonzero()[0])
    weights_V = ((logits_V.double() - largest) / o["temperature"]).exp()
    if o["top_k"] <= 0 and o["top_p"] >= 1 and o["min_p"] <= 0:
        ids_K, weights_K = torch.arange(len(weights_V), device=logits_V.device), weights_V
    else:
        sorted_V, ids_K = torch.sort(logits_V, descending=True, stable=True)
        if 0 < o["top_k"] < len(logits_V):
            ids_K = ids_K[: int((sorted_V >= sorted_V[int(o["top_k"]) - 1]).sum())]
        weights_K = weights_V[ids_K]
        if o["top_p"] < 1:
            before_K = weights_K.cumsum(0) - weights_K
            keep = max(1, int((before_K < o["top_p"] * weights_K.sum()).sum()))
            ids_K, weights_K = ids_K[:keep], weights_K[:keep]
        ids_K, weights_K = ids_K[weights_K >= o["min_p"]], weights_K[weights_K >= o["min_p"]]
    cumulative_K = weights_K.cumsum(0)
    place = int(torch.searchsorted(cumulative_K, uniform * cumulative_K[-1], right=True))
    return int(ids_K[min(place, len(ids_K) - 1)])


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
    groups = triton.cdiv(vocab, config.constants["GROUP"])
    shapes = {
        "token": ((rows,), torch.int32),
        "_maxima": ((rows, groups), torch.float32),
        "_sums": ((rows, groups), torch.float32),
        "_listed": ((rows, groups), torch.int32),
        "_values": ((rows, vocab), torch.float32),
        "_ids": ((rows, vocab), torch.int32),
    }
    return {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}


def _launches(config: Config, tensors: Tensors) -> tuple[Launch, Launch]:
    rows, vocab = tensors["logits"].shape
    groups, c = tensors["_maxima"].shape[1], config.constants
    both: dict[str, Any] = {"logits_ptr": tensors["logits"], "vocab": vocab, "groups": groups}
    both |= {f"{name}_ptr": tensors[name] for name in ("temperature", "penalty")}
    both |= {f"{name}_ptr": tensors[f"_{name}"] for name in ("maxima", "sums")}
    constants: dict[str, Any] = {"GROUP": c["GROUP"]}
    (both if "seen" in tensors else constants)["seen_ptr"] = tensors.get("seen")
    reduce = Launch(
        function=reduce_groups_kernel,
        grid=(triton.cdiv(groups, c["BLOCK"] // c["GROUP"]), rows, 1),
        arguments=both,
        constants=constants | {"BLOCK_GROUPS": c["BLOCK"] // c["GROUP"]},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    own = {f"{name}_ptr": tensors[name] for name in ("top_k", "top_p", "min_p", "uniform", "token")}
    own |= {f"{name}_ptr": tensors[f"_{name}"] for name in ("listed", "values", "ids")}
    pick = Launch(
        function=pick_kernel,
        grid=(rows, 1, 1),
        arguments=both | own,
        constants=constants | {name: c[name] for name in ("CHUNK", "SEARCH", "PIVOTS")},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return reduce, pick


def _default() -> Config:
    return Config(constants=_DEFAULT, num_warps=8, num_stages=1)


class Sample(Kernel):
    """Options are the same for all rows of a case: temperature, top-p, min-p and penalty in hundredths."""

    name: ClassVar[str] = "sample"
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    stages: ClassVar[tuple[Stage, ...]] = ("prefill", "decode")
    source: ClassVar[tuple[str, ...]] = ("autotune.kernels.sample", "autotune.kernels.sample_threshold")

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
            "BLOCK": (1024, 2048, 4096, 8192),
            "CHUNK": (1024, 2048, 4096, 8192),
            "SEARCH": (128, 256, 512, 1024),
            "PIVOTS": (4, 8, 16, 32),
        }
        return Space(constants=constants, num_warps=(4, 8, 16), num_stages=(1,))

    def refusal(self, case: Case, config: Config, gpu: Gpu) -> str | None:
        c = config.constants
        for name, tile in (("CHUNK", c["CHUNK"]), ("BLOCK", c["BLOCK"]), ("PIVOTS", c["PIVOTS"] * c["SEARCH"])):
            if tile // (32 * config.num_warps) > 64:
                return f"{name}: {tile} values in {config.num_warps} warps take too many registers a thread"
        return None

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

    def cost(self, case: Case) -> Cost:
        rows, vocab = case.dims["rows"], case.dims["vocab"]
        return Cost(bytes=rows * vocab * (4 + int(case.dims["penalty"] != 100)), flops=4 * rows * vocab)
