"""Batches whose sequences differ in length and position, against transformers on each sequence alone."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma3_compile.model import Gemma3
from gemma3_compile.model.decoder import Cache
from tests.tolerances import check
from tests.twins import Passage, Twin, eager_logits, features_of, passage, twin_logits

CONTEXT = 80


def _step(model: Gemma3, token_ids_BS: Tensor, start: list[int], length: list[int], caches: list[Cache]) -> tuple:
    rows_BS = torch.arange(token_ids_BS.shape[1]).expand(token_ids_BS.shape[0], -1)
    return model.decoder(token_ids_BS, torch.tensor(start), torch.tensor(length), rows_BS, caches)


def _expected(twin: Twin, token_ids: Tensor) -> Tensor:
    text = torch.full_like(token_ids, -1)
    return twin_logits(twin, Passage(token_ids=token_ids, image_ids=text, feature_rows=text, pixels=None))


def test_unequal_lengths_then_decode(nano_model: Gemma3, nano_twin: Twin) -> None:
    """Right-padded prefill of 5, 16, 23 and 40 tokens, then each decodes at its own position."""
    lengths, decoded = [5, 16, 23, 40], 6
    whole = [passage(nano_model.config, n + decoded, seed=n).token_ids for n in lengths]
    expected = [_expected(nano_twin, ids) for ids in whole]
    padded_BS = torch.zeros((4, 40), dtype=torch.int64)
    for row, (ids, n) in enumerate(zip(whole, lengths, strict=True)):
        padded_BS[row, :n] = ids[:n]
    caches = nano_model.decoder.empty_caches(4, CONTEXT)
    logits, caches = _step(nano_model, padded_BS, [0] * 4, lengths, caches)
    for row, n in enumerate(lengths):
        check("eager.logits", logits[row, :n], expected[row][:n], f"prefill of sequence {row}")
    assert torch.isfinite(logits).all(), "padding rows must stay finite"
    for step in range(decoded):
        starts = [n + step for n in lengths]
        next_B1 = torch.stack([ids[at : at + 1] for ids, at in zip(whole, starts, strict=True)])
        logits, caches = _step(nano_model, next_B1, starts, [1] * 4, caches)
        for row, at in enumerate(starts):
            check("eager.logits", logits[row, 0], expected[row][at], f"sequence {row} at position {at}")


def test_prefill_beside_decode_beside_idle(nano_model: Gemma3, nano_twin: Twin) -> None:
    """One call in which a sequence decodes, one prefills past its window, one starts, one is idle."""
    before, length = [30, 12, 0, 21], [1, 19, 7, 0]
    whole = [
        passage(nano_model.config, b + n + 1, seed=7 * b + 1).token_ids for b, n in zip(before, length, strict=True)
    ]
    caches = nano_model.decoder.empty_caches(4, CONTEXT)
    padded_BS = torch.zeros((4, max(before)), dtype=torch.int64)
    for row, b in enumerate(before):
        padded_BS[row, :b] = whole[row][:b]
    _, caches = _step(nano_model, padded_BS, [0] * 4, before, caches)
    idle = [(k[3].clone(), v[3].clone()) for k, v in caches]

    chunk_BS = torch.zeros((4, max(length)), dtype=torch.int64)
    for row, (b, n) in enumerate(zip(before, length, strict=True)):
        chunk_BS[row, :n] = whole[row][b : b + n]
    logits, caches = _step(nano_model, chunk_BS, before, length, caches)
    expected = [_expected(nano_twin, ids) for ids in whole]
    for row, (b, n) in enumerate(zip(before, length, strict=True)):
        if n:
            check("eager.logits", logits[row, :n], expected[row][b : b + n], f"sequence {row}")
    for (k, v), (idle_k, idle_v) in zip(caches, idle, strict=True):
        check("kernel.cache", k[3], idle_k, "keys of the idle sequence")
        check("kernel.cache", v[3], idle_v, "values of the idle sequence")

    ends = [b + n for b, n in zip(before, length, strict=True)]
    last_B1 = torch.stack([ids[end : end + 1] for ids, end in zip(whole, ends, strict=True)])
    logits, _ = _step(nano_model, last_B1, ends, [1] * 4, caches)
    for row, end in enumerate(ends):
        check("eager.logits", logits[row, 0], expected[row][end], f"sequence {row} afterwards")


def test_a_sequence_does_not_see_its_neighbours(nano_model: Gemma3) -> None:
    prompt = passage(nano_model.config, 33)
    alone = eager_logits(nano_model, prompt)
    batch = torch.stack([passage(nano_model.config, 33, seed=9).token_ids, prompt.token_ids])
    logits, _ = _step(nano_model, batch, [0, 0], [33, 33], nano_model.decoder.empty_caches(2, CONTEXT))
    check("eager.chunking", logits[1], alone)


def test_images_in_a_batch(nano_model: Gemma3, nano_twin: Twin) -> None:
    """Images at other places in each sequence, one sequence without any, one shorter: one call for all."""
    prompts = [passage(nano_model.config, n, at, seed=n) for n, at in ((30, (3, 12)), (24, (17,)), (9, ()))]
    features, offset = [], 0
    ids_BS, image_BS, rows_BS = (torch.full((3, 30), fill) for fill in (0, -1, -1))
    for row, prompt in enumerate(prompts):
        n = len(prompt)
        ids_BS[row, :n], image_BS[row, :n] = prompt.token_ids, prompt.image_ids
        rows_BS[row, :n] = torch.where(prompt.feature_rows >= 0, prompt.feature_rows + offset, -1)
        found = features_of(nano_model, prompt)
        if found is not None:
            features.append(found)
            offset += found.shape[0]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    every_BS = torch.arange(30).expand(3, -1)
    start, caches = torch.zeros(3, dtype=torch.int64), nano_model.decoder.empty_caches(3, CONTEXT)
    logits, _ = nano_model.decoder(ids_BS, start, lengths, every_BS, caches, torch.cat(features), rows_BS, image_BS)
    for row, prompt in enumerate(prompts):
        check("eager.logits", logits[row, : len(prompt)], twin_logits(nano_twin, prompt), f"sequence {row}")
