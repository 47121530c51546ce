"""Small GGUF files written by the ``gguf`` package, under ggml's names spelled out here once more."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Ggml

from gemma3_compile.config import ModelConfig

_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "a", "▁", "b", "<start_of_turn>", "<end_of_turn>", "[multi part]"]
PIECES += [f"<0x{byte:02X}>" for byte in range(256)]
TYPES = [3, 3, 3, 2, 1, 1, 1, 3, 3, 4] + [6] * 256


def ggml_name(canonical: str) -> str:
    """``decoder.layers.3.mlp.up_proj.weight`` to ``blk.3.ffn_up.weight``."""
    if canonical == "decoder.embed_tokens.weight":
        return "token_embd.weight"
    if canonical == "decoder.norm.weight":
        return "output_norm.weight"
    _, _, index, rest = canonical.split(".", 3)
    return f"blk.{index}.{_LAYER[rest.removesuffix('.weight')]}.weight"


def metadata_of(config: ModelConfig) -> dict[str, Any]:
    """The keys a converter writes for ``config``; integers become uint32, floats float32."""
    text = config.text
    return {
        "gemma3.context_length": text.max_context,
        "gemma3.embedding_length": text.hidden_size,
        "gemma3.block_count": text.num_layers,
        "gemma3.feed_forward_length": text.intermediate_size,
        "gemma3.attention.head_count": text.num_heads,
        "gemma3.attention.head_count_kv": text.num_kv_heads,
        "gemma3.attention.key_length": text.head_dim,
        "gemma3.attention.layer_norm_rms_epsilon": text.rms_norm_eps,
        "gemma3.attention.sliding_window": text.sliding_window,
        "gemma3.rope.freq_base": text.rope_global_base,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": text.rope_global_factor,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": PIECES,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(PIECES))],
        "tokenizer.ggml.token_type": TYPES,
        "tokenizer.ggml.eos_token_id": 8,  # as an instruction-tuned file has it
    }


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[npt.NDArray[Any], Ggml]],
    architecture: str = "gemma3",
) -> Path:
    """Writes fp32 arrays as the given types; ``tensors`` has ggml's names. Integer arrays are written as they are."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, (array, kind) in tensors.items():
        stored = gguf.quantize(array, kind) if array.dtype == np.float32 else array
        writer.add_tensor(name, stored, raw_dtype=kind if array.dtype == np.float32 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
