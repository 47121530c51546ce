"""A PostgreSQL server for tests: its own data folder, its own port, one user with a password."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

USER, PASSWORD, DATABASE = "tuner", "s3cret/w0rd", "tuning"


class Server:
    """A server that runs. ``url`` holds the password."""

    def __init__(self, programs: Path, folder: Path, port: int) -> None:
        self._programs, self._folder, self.port = programs, folder, port

    @property
    def url(self) -> str:
        return self.url_as(PASSWORD)

    def url_as(self, password: str, database: str = DATABASE) -> str:
        quoted = password.replace("/", "%2F")
        return f"postgresql://{USER}:{quoted}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        options = f"-p {self.port} -h 127.0.0.1 -k {self._folder} -c fsync=off"
        _run(
            self._programs / "pg_ctl",
            "-D",
            self._folder / "data",
            "-l",
            self._folder / "log",
            "-o",
            options,
            "-w",
            "start",
        )

    def stop(self) -> None:
        _run(self._programs / "pg_ctl", "-D", self._folder / "data", "-m", "immediate", "-w", "stop")

    def make_database(self, name: str) -> None:
        command = (self._programs / "psql", "-h", self._folder, "-p", self.port, "-U", USER, "-d", "postgres", "-c")
        _run(*command, f"CREATE DATABASE {name}", PGPASSWORD=PASSWORD)


def programs() -> Path | None:
    """The folder that holds ``initdb``, of the newest version; Debian keeps it out of the path."""
    homes = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda home: [int(n) for n in re.findall(r"\d+", str(home))]
    )
    found = next((home for home in reversed(homes) if (home / "initdb").exists()), None)
    inside = shutil.which("initdb")
    return found or (Path(inside).parent if inside else None)


@contextmanager
def running() -> Iterator[Server]:
    """A fresh server, which is stopped and removed afterwards."""
    home = programs()
    assert home is not None, "PostgreSQL is not installed"
    folder = Path(tempfile.mkdtemp(prefix="gemma3c-pg-"))
    try:
        if os.geteuid() == 0:  # initdb refuses root
            account = pwd.getpwnam(_account())
            os.chown(folder, account.pw_uid, account.pw_gid)
        secret = folder / "password"
        secret.write_text(PASSWORD + "\n")
        secret.chmod(0o644)
        _run(
            home / "initdb",
            "-D",
            folder / "data",
            "-U",
            USER,
            "-A",
            "scram-sha-256",
            f"--pwfile={secret}",
            "-N",
            "-E",
            "UTF8",
            "--no-locale",
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            server = Server(home, folder, free.getsockname()[1])
        server.start()
        try:
            server.make_database(DATABASE)
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _account() -> str:
    """Whom the server runs as where the tests run as root."""
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def _run(*command: object, **environment: str) -> None:
    words = [str(word) for word in command]
    if os.geteuid() == 0:
        account = pwd.getpwnam(_account())
        words = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups", *words]
    # To a file: the server keeps what it inherits open, and a pipe would never end.
    with tempfile.TemporaryFile() as output:
        done = subprocess.run(
            words, cwd="/", env=os.environ | {"LC_ALL": "C"} | environment, stdout=output, stderr=subprocess.STDOUT
        )
        output.seek(0)
        assert done.returncode == 0, f"{words}: {output.read().decode()}"
