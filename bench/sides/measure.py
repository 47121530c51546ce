"""Times one side in this process: ``python -m bench.sides.measure SIDE PATH``; prints one line of JSON.

Run alone, so that no side's memory or threads are in the way of another's.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from pathlib import Path

import numpy as np

from bench.sides.base import Side

SIDES = {
    "ours": ("bench.sides.ours", "Ours"),
    "genai": ("bench.sides.genai", "Genai"),
    "llama": ("bench.sides.llama", "Llama"),
    "transformers": ("bench.sides.transformers", "Transformers"),
}
PREFILL, PASTS, CONTEXT = 1024, (128, 2048), 4096
WARM_UP_TOKENS = 4


def measure(side: Side, *, steps: int) -> dict[str, float]:
    """Tokens a second: ``prefill`` of 1,024, and ``decode@128`` and ``decode@2048`` over ``steps`` tokens each."""
    tokens = np.random.default_rng(0).integers(1000, 200_000, CONTEXT)
    side.prompt(tokens[:64])
    side.advance()
    start = time.perf_counter()
    side.prompt(tokens[:PREFILL])
    rates = {"prefill": PREFILL / (time.perf_counter() - start)}
    for past in PASTS:
        side.prompt(tokens[:past])
        for _ in range(WARM_UP_TOKENS):
            side.advance()
        start = time.perf_counter()
        for _ in range(steps):
            side.advance()
        rates[f"decode@{past}"] = steps / (time.perf_counter() - start)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("path", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=64)
    given = parser.parse_args()
    module, name = SIDES[given.side]
    side = getattr(importlib.import_module(module), name)(given.path, threads=given.threads, context=CONTEXT)
    print(json.dumps(measure(side, steps=given.steps)))


if __name__ == "__main__":
    main()
