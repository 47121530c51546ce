"""The text that calibration runs on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gemma3_compile.quantize import text
from gemma3_compile.quantize.text import calibration_tokens, random_tokens
from runtimes.errors import UsageError


def characters(string: str) -> list[int]:
    return [ord(c) % 500 + 3 for c in string]


def test_the_default_is_prose_and_code_and_the_same_each_time() -> None:
    ids = calibration_tokens(characters, 2, sequences=6, length=64)
    assert ids.shape == (6, 64) and ids.dtype == torch.int64
    assert bool((ids[:, 0] == 2).all())
    assert torch.equal(ids, calibration_tokens(characters, 2, sequences=6, length=64))
    assert len({tuple(row) for row in ids.tolist()}) == 6
    decoded = ["".join(chr(i - 3) for i in row[1:]) for row in ids.tolist()]
    assert text._source().startswith(decoded[4]) and text._manual().startswith(decoded[0])


def test_windows_are_spread_from_the_first_to_the_last_and_do_not_overlap() -> None:
    ids = list(range(100))
    windows = text._windows(ids, 3, 10)
    assert [w[0] for w in windows] == [0, 45, 90] and all(len(w) == 10 for w in windows)
    assert [w[0] for w in text._windows(ids, 50, 30)] == [0, 35, 70]
    assert text._windows(ids, 5, 60) == [ids[:60]]
    assert text._windows(ids, 5, 101) == []


def test_a_file_of_the_user(tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("äbc " * 100, encoding="utf-8")
    ids = calibration_tokens(characters, 7, file, sequences=4, length=33)
    assert ids.shape == (4, 33)
    assert ids[0].tolist() == [7, *characters("äbc " * 8)]


def test_a_short_file_gives_fewer_sequences(tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("x" * 70, encoding="utf-8")
    assert calibration_tokens(characters, 7, file, sequences=4, length=33).shape == (2, 33)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"short", "too short"), (b"", "too short"), (b"\xff\xfe" * 400, "not UTF-8"), (None, "cannot be read")],
)
def test_a_file_that_will_not_do(tmp_path: Path, content: bytes | None, words: str) -> None:
    file = tmp_path / "own.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=words) as error:
        calibration_tokens(characters, 7, file, length=33)
    assert error.value.hint and str(tmp_path) not in error.value.message


def test_a_python_without_its_manual_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(UsageError, match=r"pydoc_data\.topics") as error:
        calibration_tokens(characters, 2)
    assert error.value.hint is not None and "--calibration" in error.value.hint


def test_random_tokens_are_seeded() -> None:
    ids = random_tokens(100, 2, sequences=3, length=20)
    assert ids.shape == (3, 20) and int(ids.max()) < 100 and bool((ids[:, 0] == 2).all())
    assert torch.equal(ids, random_tokens(100, 2, sequences=3, length=20))
