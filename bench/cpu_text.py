"""Text on a CPU: the real 270M on two threads, against onnxruntime-genai, llama.cpp and transformers.

Prefill of 1,024 tokens from nothing, and greedy decoding at 128 and at 2,048 tokens of past. Each side runs in a
fresh process, one after another, round after round; a figure is the median of the rounds. Choosing the token, the
largest of 262,144 logits, is in every side's time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from bench import real_270m
from bench.record import ROOT, Row, finish, more_is_better, options

METRICS = {"prefill": "prefill of 1024", "decode@128": "decode at 128", "decode@2048": "decode at 2048"}
Rates = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A side with its model. ``package``: what must be installed for it; ``peers``: whom it is held against."""

    name: str
    side: str
    package: str
    peers: tuple[str, ...] = ()
    dtype: str | None = None


CONTENDERS = (
    Contender(name="onnxruntime-genai int4", side="genai", package="onnxruntime_genai"),
    Contender(name="llama.cpp Q4_K_M", side="llama", package="llama_cpp"),
    Contender(name="transformers float32", side="transformers", package="transformers"),
    Contender(name="int4", side="ours", package="onnxruntime", dtype="int4", peers=("onnxruntime-genai int4", "llama.cpp Q4_K_M")),
    Contender(name="kept grid", side="ours", package="onnxruntime", dtype="auto", peers=("llama.cpp Q4_K_M",)),
    Contender(name="int8", side="ours", package="onnxruntime", dtype="int8", peers=("llama.cpp Q4_K_M",)),
    Contender(name="float32", side="ours", package="onnxruntime", dtype="float32", peers=("transformers float32",)),
)  # fmt: skip


def prepare(contender: Contender, *, reuse: bool) -> Path | str:
    """The model's files, or why the side cannot run here."""
    if find_spec(contender.package) is None:
        return f"{contender.package} is not installed: pip install -e .[bench]"
    if contender.dtype is not None:
        return real_270m.bundle(contender.dtype, reuse=reuse)
    if contender.side == "llama":
        return real_270m.gguf()
    folder = real_270m.transformers_folder()
    if contender.side == "transformers":
        return folder
    return _genai_model(folder, reuse=reuse)


def _genai_model(source: Path, *, reuse: bool) -> Path | str:
    out = real_270m.WORK / "270m-genai"
    if reuse and (out / "genai_config.json").exists():
        return out
    print(f"building {out.name} with onnxruntime-genai's builder", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "bench.sides.genai_builder", str(source), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return out if done.returncode == 0 else f"its builder failed: {_last_line(done.stderr)}"


def run(contender: Contender, path: Path, *, steps: int) -> dict[str, float] | str:
    """One round of one side, or why it failed."""
    command = [sys.executable, "-m", "bench.sides.measure", contender.side, str(path), "--steps", str(steps)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"it failed: {_last_line(done.stderr)}"
    rates: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return rates


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1][:200]


def rows(rates: dict[str, Rates], reasons: dict[str, str]) -> Iterator[Row]:
    """Ours against each peer; a peer that did not run stands with the reason."""
    for contender in CONTENDERS:
        for peer in contender.peers:
            for metric, words in METRICS.items():
                ours, theirs = rates[contender.name].get(metric), rates[peer].get(metric)
                yield more_is_better(
                    contender.name,
                    words,
                    "tokens/s",
                    median(ours) if ours else None,
                    peer,
                    median(theirs) if theirs else None,
                    reasons.get(contender.name) or reasons.get(peer),
                )


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="how often every side runs")
    parser.add_argument("--steps", type=int, default=64, help="tokens of each decoding")
    parser.add_argument("--reuse", action="store_true", help="take the bundles and the genai model of an earlier run")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these contenders only")
    given = parser.parse_args()
    rounds, steps = (1, 8) if given.quick else (given.rounds, given.steps)
    chosen = [c for c in CONTENDERS if not given.only or c.name in given.only]
    rates: dict[str, Rates] = {c.name: {} for c in CONTENDERS}
    reasons = {c.name: "not asked for (--only)" for c in CONTENDERS if c not in chosen}
    ready: list[tuple[Contender, Path]] = []
    for contender in chosen:
        found = prepare(contender, reuse=given.reuse)
        if isinstance(found, str):
            reasons[contender.name] = found
        else:
            ready.append((contender, found))
    for number in range(rounds):
        for contender, path in ready:
            measured = run(contender, path, steps=steps)
            if isinstance(measured, str):
                reasons[contender.name] = measured
                continue
            for metric, rate in measured.items():
                rates[contender.name].setdefault(metric, []).append(rate)
            words = ", ".join(f"{METRICS[metric]} {rate:.1f}" for metric, rate in measured.items())
            print(f"round {number + 1}/{rounds} {contender.name}: {words}", file=sys.stderr, flush=True)
    finish("cpu_text", list(rows(rates, reasons)), quick=given.quick)


if __name__ == "__main__":
    main()
