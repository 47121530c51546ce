"""Where studies are kept: one URL, five kinds of place.

    (none)                                  SQLite in the user's cache folder
    sqlite:////folder/tuning.db             SQLite; three slashes for a relative path
    journal:///folder/tuning.log            Optuna's journal file, which also works over NFS; two slashes for a relative path
    postgresql://user:password@host/db      PostgreSQL, by psycopg
    mysql://user:password@host/db           MySQL or MariaDB, by PyMySQL
    grpc://host:13000                       Optuna's gRPC proxy

A password never leaves this module: every message that may repeat the URL goes through :class:`Secrets`.
"""

from __future__ import annotations

import json
import os
import random
import sqlite3
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, GrpcStorageProxy, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalStorage

from autotune.attendance import requeue
from runtimes.errors import Gemma3CompileError, HostError, UsageError

CONNECT_S = 10
"""How long a server may take to answer."""
HEARTBEAT_S, GRACE_S = 15, 60
"""A running trial gives a sign of life this often, and is given up after so long without one."""
_DRIVERS = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg", "mysql": "mysql+pymysql", "mariadb": "mysql+pymysql"}  # fmt: skip
_PACKAGES = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "pymysql": "pymysql", "grpc": "grpcio"}
_CREATION_TRIES = 8
_KINDS = (
    "sqlite:///FILE, journal:///FILE, postgresql://USER@HOST/DATABASE, mysql://USER@HOST/DATABASE, grpc://HOST:PORT"
)


@dataclass(frozen=True)
class Secrets:
    """Parts of a storage URL that must not be shown."""

    words: tuple[str, ...]

    @classmethod
    def of(cls, url: str) -> Secrets:
        """The password of ``url`` as it stands and decoded, its pieces (a driver may cut it anywhere), and its query's."""
        rest = url.partition("://")[2]
        password = rest.rpartition("@")[0].partition(":")[2]
        words = {password, unquote(password)}
        for mark in "@/:?#":
            words |= {piece for word in tuple(words) for piece in word.split(mark) if len(piece) > 2}
        query = parse_qsl(rest.partition("?")[2])
        words |= {value for name, value in query if any(mark in name.lower() for mark in ("pass", "pwd", "secret"))}
        return cls(tuple(sorted(words - {""}, key=len, reverse=True)))

    def masked(self, text: str) -> str:
        """``text`` with ``***`` for each of them."""
        for word in self.words:
            text = text.replace(word, "***")
        return text


@dataclass(frozen=True, kw_only=True)
class Storage:
    """An open storage.

    Args:
        place: what to call it: its URL without the password.
        beats: whether Optuna notices by itself that a worker of it died.
    """

    optuna: BaseStorage
    place: str
    secrets: Secrets
    beats: bool

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turns a failure of the storage within the block into a HostError without secrets."""
        try:
            yield
        except Gemma3CompileError:
            raise
        except Exception as error:
            if not _is_of_storage(error):
                raise
            words = self.secrets.masked(_first_line(error))
            raise HostError(
                f"the storage {self.place} failed: {words}",
                hint="what was tried is kept there: the same command goes on from it",
            ) from None


def default_path() -> Path:
    """``$XDG_CACHE_HOME/gemma3c/tuning.db``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gemma3c" / "tuning.db"


def open_storage(url: str | None) -> Storage:
    """Opens the storage, and makes its tables where there are none.

    Args:
        url: None takes SQLite in the user's cache folder.

    Raises:
        UsageError: the URL is of no known kind, or the server refuses its user or password.
        HostError: the server cannot be reached, the file cannot be opened or is something else, or a driver is missing.
    """
    if url is None:
        path = default_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{path}"
    scheme = url.partition(":")[0].lower() if "://" in url else ""
    if scheme == "journal":
        return _journal(Path(unquote(url.partition("://")[2])))
    if scheme == "grpc":
        return _grpc(url)
    if scheme.partition("+")[0] not in {"sqlite", *_DRIVERS}:
        raise UsageError(f"{_place(url)} is no storage that is known", hint=f"choose from {_KINDS}")
    return _database(url, scheme)


def _journal(path: Path) -> Storage:
    try:
        if path.exists() and not _is_journal(path):
            raise HostError(f"{path} is no journal of Optuna", hint="name another file")
        storage = JournalStorage(JournalFileBackend(str(path)))
    except OSError as error:
        raise HostError(f"the journal {path} cannot be opened: {error.strerror}") from error
    except (ValueError, KeyError) as error:  # what replaying a damaged line raises
        raise HostError(f"the journal {path} is damaged: {_first_line(error)}", hint="name another file") from error
    return Storage(optuna=storage, place=f"journal://{path}", secrets=Secrets(()), beats=False)


def _is_journal(path: Path) -> bool:
    """Optuna would append to any file, and passes over a last line without an end."""
    with path.open("rb") as file:
        first = file.readline(2**20)
    try:
        return first == b"" or "op_code" in json.loads(first)
    except (ValueError, TypeError):
        return False


def _grpc(url: str) -> Storage:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or 13000
    except ValueError:
        host = None
    if not host:
        raise UsageError(f"{_place(url)} is no address of a proxy", hint="write grpc://HOST:PORT")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = GrpcStorageProxy(host=host, port=port)
        storage.wait_server_ready(timeout=CONNECT_S)
    except ImportError as error:
        raise _missing("grpc") from error
    except ConnectionError as error:
        raise HostError(
            f"no gRPC proxy answers at {host}:{port} within {CONNECT_S} s",
            hint="docs/tuning.md says how to start one with optuna.storages.run_grpc_proxy_server",
        ) from error
    return Storage(optuna=storage, place=f"grpc://{host}:{port}", secrets=Secrets.of(url), beats=False)


def _database(url: str, scheme: str) -> Storage:
    secrets = Secrets.of(url)
    place = secrets.masked(_place(url))
    if url.partition("://")[2].partition("/")[0].count("@") > 1:
        raise UsageError(f"the password in {place} holds a bare `@`", hint="write it as %40")
    failure: Exception | None = None
    try:
        parsed = sqlalchemy.make_url(url).set(drivername=_DRIVERS.get(scheme, scheme))
        parsed.get_dialect()
    except (sqlalchemy.exc.SQLAlchemyError, ValueError) as error:
        failure = error
    if failure is not None:  # raised out here, so that the driver's words with the password are no part of the chain
        raise UsageError(f"{place} is no URL that can be read: {secrets.masked(_first_line(failure))}", hint=_KINDS)
    if parsed.get_backend_name() == "sqlite" and not parsed.database:
        raise UsageError(f"{place} names no file", hint="write sqlite:////FOLDER/FILE")
    try:
        storage = _created(parsed)
    except ImportError as error:
        raise _missing(parsed.get_driver_name()) from error
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError, OSError) as error:
        failure = error
    if failure is not None:
        raise _unopened(parsed, place, secrets, failure)
    return Storage(optuna=storage, place=place, secrets=secrets, beats=True)


class _Connection(sqlite3.Connection):
    """SQLite that waits for the disk once in a while rather than at each of the dozen writes of a trial.

    A process that is killed loses nothing by that; a host that loses its power may lose the last trials.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.execute("PRAGMA journal_mode=WAL")
        self.execute("PRAGMA synchronous=NORMAL")


def _created(url: sqlalchemy.URL) -> RDBStorage:
    """Opens a database. Workers that start together may all make its tables: who comes late looks again."""
    if url.get_backend_name() == "sqlite":
        arguments: dict[str, Any] = {"timeout": 60, "factory": _Connection}
    else:
        arguments = {} if "connect_timeout" in url.query else {"connect_timeout": CONNECT_S}
    for attempt in range(_CREATION_TRIES):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return RDBStorage(
                    url.render_as_string(hide_password=False).replace("{", "%7B").replace("}", "%7D"),
                    engine_kwargs={"connect_args": arguments, "pool_pre_ping": True},
                    heartbeat_interval=HEARTBEAT_S,
                    grace_period=GRACE_S,
                    heartbeat_stale_trial_callback=requeue,
                )
        except (sqlalchemy.exc.DBAPIError, optuna.exceptions.StorageInternalError) as error:
            if attempt == _CREATION_TRIES - 1 or not _is_a_race(str(error).lower()):
                raise
            time.sleep(random.uniform(0.1, 0.5))
    raise AssertionError("the last try either returns or raises")


def _is_a_race(words: str) -> bool:
    return any(mark in words for mark in ("already exists", "unique", "duplicate", "is locked"))


def _unopened(url: sqlalchemy.URL, place: str, secrets: Secrets, error: Exception) -> Gemma3CompileError:
    words = secrets.masked(_first_line(error))
    lower = words.lower()
    if url.get_backend_name() == "sqlite":
        if isinstance(error.__cause__, sqlite3.DatabaseError) and "not a database" in lower:
            return HostError(f"{url.database} is no SQLite database", hint="name another file")
        return HostError(f"{url.database} cannot be opened as a study's storage: {words}")
    if any(mark in lower for mark in ("password", "access denied", "authentication", "no pg_hba.conf entry")):
        return UsageError(
            f"{url.host} refuses the user `{url.username}`: {words}",
            hint="check the user and the password in --storage",
        )
    if "does not exist" in lower or "unknown database" in lower:
        return UsageError(f"{place}: {words}", hint="create the database first; its tables are made here")
    if isinstance(error, RuntimeError) and "optuna storage upgrade" in words:
        return HostError(f"{place}: {words}")
    return HostError(f"the storage {place} cannot be reached: {words}", hint="is the server up, and its address right?")


def _is_of_storage(error: Exception) -> bool:
    kinds: tuple[type, ...] = (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError)
    if "grpc" in sys.modules:
        kinds += (sys.modules["grpc"].RpcError,)
    return isinstance(error, kinds)


def _missing(driver: str) -> HostError:
    package = _PACKAGES.get(driver, driver)
    return HostError(
        f"this storage needs the package {package}, which is not installed here", hint=f"pip install '{package}'"
    )


def _place(url: str) -> str:
    """The URL without its password, whatever its form."""
    scheme, mark, rest = url.partition("://")
    if not mark:
        return "what --storage names" if "@" in url else f"`{url}`"
    user, at, host = rest.rpartition("@")
    name, colon, _ = user.partition(":")
    return f"{scheme}://{name}{':***' if colon else ''}{at}{host.partition('?')[0]}"


def _first_line(error: BaseException) -> str:
    """What the driver says, without SQLAlchemy's statement and link; Optuna hides the driver's words in a cause."""
    while isinstance(error, optuna.exceptions.StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    inner = getattr(error, "orig", None) or error
    details = getattr(inner, "details", None)  # of gRPC
    text = details() if callable(details) else str(inner)
    return next((line.strip() for line in str(text).splitlines() if line.strip()), type(inner).__name__)
