"""Our plugins, by what their kernels compute: the live plugin of the network says which run, and with what numbers.

Legend: B batch, S tokens in the chunk, N query heads, G key-value heads, D head_dim, W window.

Nothing of triton or CUDA is imported here. A test holds these formulas against the kernels' oracles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from autotune.kernels.cache_layout import kept_rows_BC, slot_positions_BC, take_rows
from autotune.kernels.siglip_pool import siglip_pool
from graphs.trt.interpreter.rule import Call, Rule
from runtimes.trt.plugin_base import KernelPlugin
from runtimes.trt.plugin_pool import SigLIPPoolPlugin
from runtimes.trt.plugin_window import SlidingWindowAttentionPlugin

Named = dict[str, Tensor]


def window_prefill(t: Named, scale: float) -> Tensor:
    """[B, S, N, D]: the chunk's queries over the ring as it was, and over the chunk; zeros in padding rows.

    Query s sees the keys with positions above ``start + s - W`` and below ``start + min(visible_end[s], length)``.
    """
    window, chunk = t["k_cache"].shape[2], t["q"].shape[1]
    start_B, length_B = t["start"].long(), t["length"].long()
    step_S = torch.arange(chunk)
    cached_BW = slot_positions_BC(start_B, window, window, "ring")
    key_B1K = torch.cat([cached_BW, start_B[:, None] + step_S], dim=1)[:, None]
    query_BS1 = (start_B[:, None] + step_S)[:, :, None]
    end_BS1 = (start_B[:, None] + torch.minimum(t["visible_end"].long(), length_B[:, None]))[:, :, None]
    padding_BS1 = (step_S >= length_B[:, None])[:, :, None]
    visible_BSK = (key_B1K > query_BS1 - window) & (key_B1K >= 0) & (key_B1K < end_BS1)
    keys, values = (torch.cat([t[f"{x}_cache"], t[x].transpose(1, 2)], dim=2) for x in ("k", "v"))
    out_BSND = _attend(t["q"], keys, values, visible_BSK | padding_BS1, scale)
    return out_BSND.masked_fill(padding_BS1[..., None], 0)


def window_decode(t: Named, scale: float) -> Tensor:
    """[B, 1, N, D]: one token over the ring that holds it, up to ``position``; zeros for an idle sequence."""
    slot_W = torch.arange(t["k_cache"].shape[2])
    position_B11 = t["position"].long()[:, None, None]
    idle_B11 = position_B11 < 0
    out_BSND = _attend(t["q"], t["k_cache"], t["v_cache"], (slot_W <= position_B11) | idle_B11, scale)
    return out_BSND.masked_fill(idle_B11[..., None], 0)


def _attend(q_BSND: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, visible_BSL: Tensor, scale: float) -> Tensor:
    """In fp32, rounded once."""
    q_BNSD, keys, values = (x.float() for x in (q_BSND.transpose(1, 2), k_BGLD, v_BGLD))
    mask = visible_BSL[:, None]
    out = F.scaled_dot_product_attention(q_BNSD, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).to(q_BSND.dtype)


def cache_write(t: Named) -> None:
    """Writes the last ``min(length, W)`` of the chunk's rows: position p into slot p mod W, in place."""
    start_B, length_B = t["start"].long(), t["length"].long()
    for x in ("k", "v"):
        cache = t[f"{x}_cache"]
        window = cache.shape[2]
        rows_BW = kept_rows_BC(start_B, length_B, window, window, "ring")
        cache.copy_(take_rows(torch.cat([cache, t[x].transpose(1, 2)], dim=2), rows_BW))


def _sliding_window_attention(call: Call, plugin: KernelPlugin) -> tuple[Tensor, ...]:
    """What :mod:`runtimes.trt.plugin_window` launches, in its order."""
    assert isinstance(plugin, SlidingWindowAttentionPlugin)
    t = _named(call, plugin)
    if t["k_cache"].shape[2] != plugin.window:
        raise call.layer.refuse(f"its window is {plugin.window}, but its cache has {t['k_cache'].shape[2]} slots")
    t["position"] = t["newest"]
    out: Tensor | None = None
    for kernel in plugin.paths(plugin.values([tuple(call.tensor(i).shape) for i in range(len(call.inputs))])):
        if kernel == "cache_write":
            cache_write(t)
        elif kernel == "window_prefill":
            out = window_prefill(t, plugin.scale)
        elif kernel == "window_decode":
            out = window_decode(t, plugin.scale)
        else:
            raise call.layer.refuse(f"the interpreter knows no kernel {kernel}")
    assert out is not None
    return out, t["k_cache"], t["v_cache"]


def _siglip_pool(call: Call, plugin: KernelPlugin) -> tuple[Tensor, ...]:
    """The mean over squares of patches, and the norm after it."""
    assert isinstance(plugin, SigLIPPoolPlugin)
    t = _named(call, plugin)
    return (siglip_pool(t["x"], t["scale"], plugin.pool, plugin.eps),)


_PLUGINS: Mapping[str, Callable[[Call, KernelPlugin], tuple[Tensor, ...]]] = {
    SlidingWindowAttentionPlugin.NAME: _sliding_window_attention,
    SigLIPPoolPlugin.NAME: _siglip_pool,
}


def _named(call: Call, plugin: KernelPlugin) -> Named:
    """The inputs by the plugin's names; their types must be those that it takes."""
    call.only_inputs(len(plugin.INPUTS))
    kinds = {"bf16": call.dtype("BF16"), "i32": torch.int32, "fp32": torch.float32}
    named = {name: call.tensor(index) for index, (name, _) in enumerate(plugin.INPUTS)}
    for name, kind in plugin.INPUTS:
        if named[name].dtype != kinds[kind]:
            raise call.layer.refuse(f"its input `{name}` is {named[name].dtype}, but the plugin takes {kind}")
    return named


def _plugin(call: Call) -> tuple[Tensor, ...]:
    """PluginV3: what the plugin computes. An output that it declares to be an input is that input, written in place."""
    plugin = call.attribute("plugin")
    if not isinstance(plugin, KernelPlugin) or plugin.NAME not in _PLUGINS:
        raise call.layer.refuse(f"the interpreter knows no plugin {type(plugin).__name__}")
    outputs = _PLUGINS[plugin.NAME](call, plugin)
    for index, output in enumerate(outputs):
        source = plugin.get_aliased_input(index)
        if source >= 0 and output is not call.inputs[source]:
            raise call.layer.refuse(f"its output {index} is not its input {source}")
    return outputs


RULES: dict[str, Rule] = {"PLUGIN_V3": Rule(interface="IPluginV3Layer", body=_plugin, attributes=("plugin",))}

__all__ = ["RULES", "cache_write", "window_decode", "window_prefill"]
