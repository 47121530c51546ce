"""Sizes as people read them."""

from __future__ import annotations


def in_words(size_bytes: int) -> str:
    """A size for people: 1.23 GB, 45.6 MB, 789 B (powers of ten, as disks are sold)."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size_bytes >= scale:
            value = size_bytes / scale
            digits = 2 if value < 10 else 1 if value < 100 else 0
            return f"{value:.{digits}f} {unit}"
    return f"{size_bytes} B"
