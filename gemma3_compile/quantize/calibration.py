"""Calibration of the decoder, layer by layer: each linear layer is rounded by what its inputs are.

Legend: B sequences, S tokens in each, T = B S tokens, H hidden, K inputs of a linear layer, N outputs.

Two streams of activations run through the layers side by side. In the first all weights are the
checkpoint's; in the second those before are rounded already. A linear layer is rounded so that its
outputs in the second stream come close to those of the first:

    sum_t weight_t |q x'_t - w x_t|**2 = sum_t weight_t |(q - v) x'_t|**2 + const,   v = w (1 + sum_t weight_t (x_t - x'_t) x'_t' / M)

and ``v`` is what :mod:`gemma3_compile.quantize.output_rounding` rounds. In memory are one layer's
weights and the activations of the calibration tokens.

Source: GPTQ (arXiv 2210.17323); the first stream as the goal, GPTAQ (arXiv 2504.02692), here in closed form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gemma3_compile.blocks import Blocks
from gemma3_compile.checkpoints import Checkpoint
from gemma3_compile.config import ModelConfig
from gemma3_compile.model.decoder import Layer, RMSNorm
from gemma3_compile.quantize.output_rounding import OutputRounding, damped
from gemma3_compile.quantize.rounding import dequantize, quantize_rtn
from graphs import ops
from graphs.weights import BlockFormat
from runtimes.errors import NumericsError
from runtimes.progress import SILENT, Progress

EMBEDDING = "decoder.embed_tokens.weight"
HEAD_SWEEPS = 1
_ROW_ELEMENTS = 1 << 24
_SAME_INPUT = {"self_attn.k_proj": "self_attn.q_proj", "self_attn.v_proj": "self_attn.q_proj", "mlp.up_proj": "mlp.gate_proj"}
"""Linear layers whose input is another's too: the moments of q and gate serve them, where the weighting agrees."""
_NORMED_OUTPUT = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"})
"""Linear layers whose output goes into an RMSNorm next, which divides by its size: a token counts by 1 / size**2."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Inputs:
    """What a linear layer of the unrounded stream saw: inputs [T, K] and the size of its outputs [T], squared."""

    x_TK: Tensor
    size_T: Tensor
