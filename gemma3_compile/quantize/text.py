"""The text that calibration runs on: a file of the user's, or what every Python host has.

The default is prose from Python's manual (``pydoc_data.topics``) and source from the standard library,
two parts to one. It comes with Python itself, so a bundle carries nobody's text; another
version of Python has a slightly other text, and the rounding then differs in a few codes.

Legend: B sequences, S tokens in each.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from runtimes.errors import UsageError

Encode = Callable[[str], Sequence[int]]

SEQUENCES, LENGTH = 32, 512
_MODULES = (
    "argparse", "ast", "calendar", "csv", "difflib", "fractions", "heapq", "inspect", "pathlib", "shutil", "statistics",
    "tarfile", "textwrap",
)  # fmt: skip
_PROSE_SHARE = 2 / 3


def calibration_tokens(
    encode: Encode, bos: int, file: Path | None = None, sequences: int = SEQUENCES, length: int = LENGTH
) -> Tensor:
    """Token ids int64 [B, S], each sequence begun with ``bos`` and taken at equal distances from the text.

    Args:
        encode: text to token ids, without ``bos``.
        file: UTF-8 text; None for the default.

    Raises:
        UsageError: the file cannot be read, is no UTF-8 or too short, or this Python lacks the default's text.
    """
    if file is not None:
        found = _windows(encode(_read(file)), sequences, length - 1)
        if not found:
            raise UsageError(
                f"the calibration text {file.name} is too short: one sequence takes {length - 1} tokens",
                hint=f"{sequences * length} tokens of varied text serve well",
            )
    else:
        prose = round(sequences * _PROSE_SHARE)
        found = _windows(encode(_manual()), prose, length - 1)
        found += _windows(encode(_source()), sequences - prose, length - 1)
    return torch.tensor([[bos, *window] for window in found], dtype=torch.int64)


def random_tokens(vocabulary: int, bos: int, sequences: int = SEQUENCES, length: int = LENGTH) -> Tensor:
    """The same shape from a seed, for a checkpoint that has no tokenizer."""
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(0, vocabulary, (sequences, length), generator=generator)
    ids_BS[:, 0] = bos
    return ids_BS


def _windows(ids: Sequence[int], count: int, width: int) -> list[Sequence[int]]:
    """``count`` stretches of ``width``, from the first to the last; fewer where they would overlap."""
    count = min(count, len(ids) // width)
    if count < 2:
        return [ids[:width]][:count]
    starts = [i * (len(ids) - width) // (count - 1) for i in range(count)]
    return [ids[start : start + width] for start in starts]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(
            f"the calibration text {file.name} cannot be read: {reason}", hint="give a plain text file in UTF-8"
        ) from error


def _manual() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise _missing("pydoc_data.topics") from error
    return "\n\n".join(topics[name] for name in sorted(topics))


def _source() -> str:
    parts = []
    for name in _MODULES:
        spec = importlib.util.find_spec(name)
        path = Path(spec.origin) if spec is not None and spec.origin is not None else None
        if path is not None and path.name == "__init__.py":
            path = path.with_name("__init__.py")
        if path is None or not path.is_file():
            raise _missing(name)
        parts.append(path.read_text(encoding="utf-8"))
    return "\n\n".join(parts)


def _missing(module: str) -> UsageError:
    return UsageError(
        f"this Python does not bring the text of `{module}`, which calibration reads by default",
        hint="give a text file of your own with --calibration",
    )
