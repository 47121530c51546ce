"""Where studies are kept: every kind of URL, and what is said of one that does not work."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import optuna
import pytest
import sqlalchemy

from autotune import storage as storages
from autotune.storage import Secrets, Storage, default_path, open_storage
from runtimes.errors import Gemma3CompileError, HostError, UsageError

PASSWORD = "hunter2/x"


def study_in(storage: Storage) -> optuna.Study:
    return optuna.create_study(storage=storage.optuna, study_name="a study", load_if_exists=True)


def test_the_default_is_a_file_in_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "gemma3c" / "tuning.db"
    storage = open_storage(None)
    assert default_path().is_file()
    assert storage.place == f"sqlite:///{tmp_path}/gemma3c/tuning.db"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_path() == Path("/home/somebody/.cache/gemma3c/tuning.db")


@pytest.mark.parametrize("scheme", ["sqlite", "journal"])
def test_what_is_written_is_found_again(scheme: str, tmp_path: Path) -> None:
    url = f"{scheme}:///{tmp_path}/studies"
    study_in(open_storage(url)).enqueue_trial({"x": 1})
    again = open_storage(url)
    assert again.beats == (scheme == "sqlite")
    assert len(study_in(again).trials) == 1


def test_sqlite_does_not_wait_for_the_disk_at_each_write(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/studies.db")
    assert isinstance(storage.optuna, optuna.storages.RDBStorage)
    with storage.optuna.engine.connect() as connection:
        assert connection.execute(sqlalchemy.text("PRAGMA synchronous")).scalar() == 1
    with sqlite3.connect(tmp_path / "studies.db") as plain:
        assert plain.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize(
    ("url", "kind", "message"),
    [
        ("redis://host", UsageError, "redis://host is no storage that is known"),
        ("tuning.db", UsageError, "`tuning.db` is no storage that is known"),
        ("me:hunter2/x@host/db", UsageError, "what --storage names is no storage that is known"),
        ("sqlite://", UsageError, "sqlite:// names no file"),
        ("sqlite:////nowhere/at/all.db", HostError, "/nowhere/at/all.db cannot be opened as a study's storage: unable"),
        ("journal:///nowhere/at/all.log", HostError, "the journal /nowhere/at/all.log cannot be opened: No such file"),
        ("postgresql://me:hunter2/x@127.0.0.1:1/db", HostError, "the storage postgresql://me:***@127.0.0.1:1/db cannot be reached: "),
        ("postgresql://me:hunter2@x@127.0.0.1/db", UsageError, "the password in postgresql://me:***@127.0.0.1/db holds a bare `@`"),
        ("postgresql://me:hunter2@host:port/db", UsageError, "postgresql://me:***@host:port/db is no URL that can be read: "),
        ("postgresql+nonsense://me:hunter2/x@host/db", UsageError, "postgresql+nonsense://me:***@host/db is no URL that can be read: "),
        ("grpc://", UsageError, "grpc:// is no address of a proxy"),
        ("grpc://host:port", UsageError, "grpc://host:port is no address of a proxy"),
    ],
)  # fmt: skip
def test_a_bad_url_is_told_without_its_password(url: str, kind: type[Gemma3CompileError], message: str) -> None:
    with pytest.raises(kind) as raised:
        open_storage(url)
    assert raised.value.message.startswith(message)
    chain: list[BaseException] = [raised.value]
    while following := (chain[-1].__cause__ or chain[-1].__context__):
        chain.append(following)
    said = " ".join([raised.value.hint or "", *(f"{link} {link!r}" for link in chain)])
    assert "hunter2" not in said


def test_files_of_another_kind_are_left_as_they_are(tmp_path: Path) -> None:
    letter = tmp_path / "letter.txt"
    letter.write_text("Dear reader, this is no database. " * 100)
    with pytest.raises(HostError, match=r"letter\.txt is no SQLite database"):
        open_storage(f"sqlite:///{letter}")
    with pytest.raises(HostError, match=r"letter\.txt is no journal of Optuna"):
        open_storage(f"journal:///{letter}")
    assert letter.read_text() == "Dear reader, this is no database. " * 100


def test_a_damaged_journal_is_told(tmp_path: Path) -> None:
    url = f"journal:///{tmp_path}/studies"
    study_in(open_storage(url))
    with (tmp_path / "studies").open("a") as file:
        file.write("{broken\n{}\n")
    with pytest.raises(HostError, match=r"studies is damaged: "):
        open_storage(url)


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: sqlalchemy.URL) -> optuna.storages.RDBStorage:
        raise ImportError("no module")

    monkeypatch.setattr(storages, "_created", missing)
    with pytest.raises(HostError, match=r"needs the package psycopg\[binary\]") as raised:
        open_storage("postgresql://host/db")
    assert raised.value.hint == "pip install 'psycopg[binary]'"
    with pytest.raises(HostError, match="needs the package pymysql"):
        open_storage("mysql://host/db")


def test_servers_are_asked_through_the_drivers_of_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def note(url: sqlalchemy.URL) -> optuna.storages.RDBStorage:
        seen.append(url.drivername)
        raise ImportError

    monkeypatch.setattr(storages, "_created", note)
    for scheme in ("postgresql", "postgres", "postgresql+psycopg2", "mysql", "mariadb"):
        with pytest.raises(HostError):
            open_storage(f"{scheme}://host/db")
    assert seen == ["postgresql+psycopg"] * 2 + ["postgresql+psycopg2"] + ["mysql+pymysql"] * 2


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("postgresql://me:hunter2%2Fx@host/db", f"{PASSWORD} and hunter2%2Fx and hunter2 alone"),
        ("postgresql://host/db?user=me&password=hunter2", "hunter2"),
        ("mysql://me:hunter2/x@host/db", "could not translate host name hunter2"),
    ],
)
def test_secrets_are_masked_in_every_form(url: str, text: str) -> None:
    masked = Secrets.of(url).masked(text)
    assert "hunter2" not in masked
    assert "***" in masked


def test_without_a_password_nothing_is_masked() -> None:
    assert Secrets.of("postgresql://me@host/db").masked("me at host has db") == "me at host has db"


def test_a_failure_of_the_storage_is_told_as_one(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/studies.db")
    study = study_in(storage)
    with sqlite3.connect(tmp_path / "studies.db") as plain:
        plain.execute("DROP TABLE trials")
    failed = pytest.raises(HostError, match=r"the storage sqlite:///.*studies\.db failed: no such table: trials")
    with failed as raised, storage.watched():
        study.get_trials()
    assert raised.value.hint is not None and "the same command goes on" in raised.value.hint
    with pytest.raises(ZeroDivisionError), storage.watched():
        raise ZeroDivisionError
