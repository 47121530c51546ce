"""Rows of a bench: their table, and the file under bench/results/ that a claim in the README points to."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
IMAGES = ROOT / "docs" / "images"
BAR = "figure to reach"
"""The peer of a row that is held against a figure of the project's own, not against another program."""

_PACKAGES = (
    "numpy", "onnxruntime", "onnxruntime-genai", "llama-cpp-python", "torch", "transformers", "onnx", "onnx-ir",
)  # fmt: skip
_GPU_PACKAGES = ("torch", "triton", "nvidia-cudnn-frontend")
UNKNOWN = "unknown"
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "asimddp", "i8mm")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure. ``ratio`` is above 1 where we are ahead; ``note`` says why a peer is missing, or what to know."""

    case: str
    metric: str
    unit: str
    value: float | None
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None
    note: str | None = None


def more_is_better(
    case: str, metric: str, unit: str, value: float | None, peer: str, peer_value: float | None, note: str | None = None
) -> Row:
    """A rate, against a peer's."""
    ratio = value / peer_value if value and peer_value else None
    return Row(
        case=case, metric=metric, unit=unit, value=value, peer=peer, peer_value=peer_value, ratio=ratio, note=note
    )


def less_is_better(
    case: str, metric: str, unit: str, value: float | None, peer: str, peer_value: float | None, note: str | None = None
) -> Row:
    """A time, a size or an error, against a peer's or a bar."""
    ratio = peer_value / value if value and peer_value else None
    return Row(
        case=case, metric=metric, unit=unit, value=value, peer=peer, peer_value=peer_value, ratio=ratio, note=note
    )


def options(description: str | None) -> argparse.ArgumentParser:
    """What every bench takes."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="few repeats, to see that the script works; writes nothing"
    )
    return parser


def with_gpu(name: str, gpu_name: str) -> str:
    """``name`` with the GPU's short name behind it: ``kernels-h100``."""
    from autotune.gpu import GPUS  # and with it torch, which not every bench needs

    known = (short for short, gpu in GPUS.items() if gpu.name == gpu_name)
    return f"{name}-{next(known, re.sub(r'[^a-z0-9]+', '-', gpu_name.lower()).strip('-'))}"


def finish(name: str, rows: Sequence[Row], *, quick: bool, measured: str | None = None) -> None:
    """Prints the table and, unless ``quick``, writes bench/results/NAME.json.

    Args:
        measured: the commit; None asks git.
    """
    print(table(rows))
    if quick:
        print(f"\nbench/results/{name}.json is left as it is")
        return
    report = {
        "name": name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": measured or commit(),
        "hardware": hardware(),
        "versions": versions(),
        "rows": [{key: _rounded(value) for key, value in asdict(row).items() if _said(key, value)} for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\nwritten: {path.relative_to(ROOT)}")


def table(rows: Iterable[Row]) -> str:
    """The rows as aligned columns."""
    cells = [("case", "metric", "value", "unit", "peer", "its value", "ratio")]
    notes = []
    for row in rows:
        mark = ""
        if row.note:
            if row.note not in notes:
                notes.append(row.note)
            mark = f" [{notes.index(row.note) + 1}]"
        cells.append(
            (
                row.case,
                row.metric,
                _shown(row.value),
                row.unit,
                (row.peer or "") + mark,
                _shown(row.peer_value) if row.peer else "",
                "" if row.ratio is None else f"{row.ratio:.2f}",
            )
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    numeric = {2, 5, 6}
    lines = [
        "  ".join(t.rjust(w) if i in numeric else t.ljust(w) for i, (t, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join([line.rstrip() for line in lines] + [f"[{i}] {note}" for i, note in enumerate(notes, 1)])


def hardware() -> dict[str, object]:
    """The processor, its vector instructions, how many cores this process may use, memory, and the GPU if one was used."""
    info = _cpu_info()
    flags = set(info.get("flags", info.get("Features", "")).split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts: dict[str, object] = {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "cpu_flags": [flag for flag in _FLAGS if flag in flags],
        "cores": cores,
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    if hasattr(os, "getloadavg"):
        facts["load_at_the_end"] = round(os.getloadavg()[0], 2)
    if _used_gpu():
        facts["gpu"] = _gpu()
    return facts


def versions() -> dict[str, str]:
    """Python, those of the packages in play that are installed, and what lies below torch if a GPU was used."""
    found = {"python": platform.python_version()}
    for package in dict.fromkeys((*_PACKAGES, *(_GPU_PACKAGES if _used_gpu() else ()))):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found | (_gpu_versions() if _used_gpu() else {})


def commit() -> str:
    """The commit that was measured, with ``+changes`` where the working tree differs from it; ``unknown`` in a copy
    without its history.
    """
    if not (ROOT / ".git").exists():  # git would answer for a repository around the copy
        return UNKNOWN
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN


def _used_gpu() -> bool:
    """This process has used a GPU, by torch."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


def _gpu() -> dict[str, object]:
    import torch

    properties = torch.cuda.get_device_properties()
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def _gpu_versions() -> dict[str, str]:
    """NVIDIA's driver, the CUDA that torch was built with, and the cuDNN that it has loaded."""
    import torch

    cudnn: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    found = {"nvidia-driver": _driver(), "cuda": torch.version.cuda or UNKNOWN}
    if cudnn is not None:  # 91900 is 9.19.0
        found["cudnn"] = f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}"
    return found


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN
    return lines[0] if lines else UNKNOWN


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _cpu_info() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    first = text.partition("\n\n")[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def _said(key: str, value: object) -> bool:
    """``note`` is left out of the file where there is nothing to say; every other field always stands."""
    return key != "note" or value is not None


def _rounded(value: object) -> object:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _shown(value: float | None) -> str:
    if value is None:
        return "–"
    if value and abs(value) < 0.1:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
