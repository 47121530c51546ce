"""The custom ops: registered as torch wants them, and with shapes that the fakes tell rightly."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphs.ops import gemma3c
from tests.tolerances import check

B, S, N, G, D, W, C = 2, 5, 4, 2, 8, 6, 12


def attention(slots: int, image: bool) -> list[object]:
    return [
        torch.randn(B, S, N, D),
        torch.randn(B, S, G, D),
        torch.randn(B, S, G, D),
        torch.randn(B, G, slots, D),
        torch.randn(B, G, slots, D),
        torch.tensor([0, 7]),
        torch.tensor([5, 3]),
        torch.tensor([[-1, 0, 0, -1, -1]] * B) if image else None,
    ]


CALLS: dict[str, tuple[object, Sequence[object]]] = {
    "sliding_window_attention": (gemma3c.sliding_window_attention.default, [*attention(W, False), W, 0.3]),
    "sliding_window_attention, images": (gemma3c.sliding_window_attention.default, [*attention(W, True), W, 0.3]),
    "global_attention": (gemma3c.global_attention.default, [*attention(C, False), 0.3]),
    "global_attention, images": (gemma3c.global_attention.default, [*attention(C, True), 0.3]),
    "siglip_pool": (gemma3c.siglip_pool.default, [torch.randn(2, 16, 6), torch.rand(6), 2, 1e-6]),
    "rotary_table": (gemma3c.rotary_table.default, [torch.arange(10).view(2, 5), 8, 1e4, 8.0]),
    "rotate": (gemma3c.rotate.default, [torch.randn(B, S, N, D), torch.rand(B, S, D // 2), torch.rand(B, S, D // 2)]),
    "add_rms_norm": (gemma3c.add_rms_norm.default, [torch.randn(B, S, D), torch.randn(B, S, D), torch.rand(D), 1e-6]),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_registration_holds(name: str) -> None:
    """The schema tells no lie (nothing is mutated, nothing aliased) and the fake gives the real shapes and strides."""
    op, arguments = CALLS[name]
    torch.library.opcheck(op, tuple(arguments), test_utils=("test_schema", "test_faketensor"))


def test_every_op_is_checked() -> None:
    registered = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("gemma3c::")]
    assert sorted(registered) == sorted({op.name() for op, _ in CALLS.values()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_rms_norm_is_a_sum_and_a_norm(dtype: torch.dtype) -> None:
    """In bfloat16 the sum is rounded before it is normalised, as the residual stream is."""
    a, b, scale = torch.randn(3, 7, 16).to(dtype), torch.randn(3, 7, 16).to(dtype), torch.rand(16)
    normed, total = gemma3c.add_rms_norm(a, b, scale, 1e-6)
    assert torch.equal(total, a + b) and normed.dtype == dtype
    expected: Tensor = F.rms_norm((a + b).float(), (16,), scale, 1e-6).to(dtype)
    check("graph.exact", normed.float(), expected.float())
