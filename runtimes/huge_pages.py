"""Asks Linux to put a session's weights on huge pages.

A decode step reads every weight once, and most of a small model's time goes there. On pages of 4 KiB the
processor looks up an address for every 4,096 bytes of that stream; on pages of 2 MiB, hardly ever.
ONNX Runtime allocates its packed weights with malloc, which asks for nothing, so where the kernel gives huge
pages on request only (``madvise``), nobody has asked. This does, for what was allocated in between.

Source: Linux, Documentation/admin-guide/mm/transhuge.rst; madvise(2).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

Span = tuple[int, int]

HUGE_BYTES = 2 << 20
_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25  # Linux 6.1
_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MAPS = Path("/proc/self/maps")
_ANONYMOUS = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0 *$", re.MULTILINE)


@contextmanager
def on_huge_pages() -> Iterator[None]:
    """Moves what the ``with`` allocates onto huge pages, where the kernel gives them on request.

    Does nothing elsewhere, and never fails: it changes how fast memory is, not what is in it.
    """
    if not _on_request():
        yield
        return
    before = _anonymous()
    yield
    for start, end in new_spans(before, _anonymous()):
        _advise(-(-start // HUGE_BYTES) * HUGE_BYTES, end // HUGE_BYTES * HUGE_BYTES)


def new_spans(before: list[Span], after: list[Span]) -> list[Span]:
    """The parts of ``after`` that are not in ``before``, of at least one huge page. Both are sorted."""
    found: list[Span] = []
    for start, end in after:
        position = start
        for old_start, old_end in before:
            if old_end <= position or old_start >= end:
                continue
            found.append((position, old_start))
            position = old_end
        found.append((position, end))
    return [(start, end) for start, end in found if end - start >= HUGE_BYTES]


def _on_request() -> bool:
    try:
        return "[madvise]" in _MODE.read_text()
    except OSError:
        return False


def _anonymous() -> list[Span]:
    """Private, writable memory of this process that no file backs."""
    try:
        maps = _MAPS.read_text()
    except OSError:
        return []
    return [(int(start, 16), int(end, 16)) for start, end in _ANONYMOUS.findall(maps)]


def _advise(start: int, end: int) -> None:
    if end <= start:
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):  # the second moves what is there now; an older kernel refuses
        madvise(start, end - start, advice)
