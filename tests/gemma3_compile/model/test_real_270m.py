"""The real, pre-trained 270M over 701 tokens of prose, past its window of 512, against transformers, fp32.

transformers reads the GGUF file with its own loader, ours with ours: the loader is held against a second one too.
Everything stands in one test, so that each side loads the file once (most of the time goes into that).
"""

from __future__ import annotations

from pathlib import Path

import sentencepiece
import torch

from gemma3_compile.checkpoints import load_eager, open_checkpoint
from gemma3_compile.checkpoints.rename import SAFETENSORS, rename
from gemma3_compile.hf_config import to_hf_config
from gemma3_compile.model import Gemma3
from gemma3_compile.presets import preset
from tests.tolerances import check

TOKENS, CHUNK = 701, 128
PROSE = Path(__file__).parents[3] / "LICENSE"


def _transformers_270m(path: Path) -> torch.nn.Module:
    import transformers

    # The configuration is given: without it transformers parses the file's header, 20 s of it, a second time.
    config = transformers.Gemma3TextConfig(**to_hf_config(preset("270m")))
    twin = transformers.Gemma3ForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=torch.float32
    )
    return twin.eval().requires_grad_(False)


def _check_weights(model: Gemma3, twin: torch.nn.Module) -> None:
    theirs = twin.state_dict()
    stored = rename(theirs, SAFETENSORS, "the twin").stored
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, theirs[stored[name]]), f"{name} differs from what transformers' loader reads"


def test_701_tokens_equal_transformers(gguf_270m_path: Path) -> None:
    with open_checkpoint(gguf_270m_path, size="270m") as checkpoint:
        model = load_eager(checkpoint)
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=checkpoint.tokenizer())
    twin = _transformers_270m(gguf_270m_path)
    _check_weights(model, twin)
    token_ids = torch.tensor([2, *tokenizer.encode(PROSE.read_text(encoding="utf-8"))][:TOKENS])
    assert token_ids.shape == (TOKENS,) and model.config.text.sliding_window < TOKENS
    hidden = twin.model(input_ids=token_ids[None], use_cache=False).last_hidden_state[0]
    caches = model.decoder.empty_caches(1, TOKENS)
    for start in range(0, TOKENS, CHUNK):  # logits a chunk at a time: those of all tokens would take 1.5 GB
        part = token_ids[start : start + CHUNK]
        size = part.shape[0]
        logits, caches = model.decoder(
            part[None], torch.tensor([start]), torch.tensor([size]), torch.arange(size)[None], caches
        )
        theirs = twin.lm_head(hidden[start : start + size])
        check("eager.logits", logits[0], theirs, f"tokens {start} to {start + size}")
