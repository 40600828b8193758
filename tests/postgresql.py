"""A real PostgreSQL for tests, started from its binaries: an ordinary user, a folder of its own, a free port."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

OWNER, SERVICE, SUPERUSER = "owner", "service", "postgres"


def binaries() -> Path | None:
    """The folder of initdb, pg_ctl and postgres, if they are installed."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((p for p in places if all((p / name).exists() for name in ("initdb", "pg_ctl", "postgres"))), None)


def ordinary_user() -> str | None:
    """Whom to run as: PostgreSQL refuses root. None where this process is an ordinary user already."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)


def as_ordinary_user() -> dict[str, Any]:
    """Arguments for `subprocess` that make the child an ordinary user's."""
    user = ordinary_user()
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}


class Postgres:
    """One server; its databases are made from a template and thrown away with it."""

    def __init__(self) -> None:
        bin_ = binaries()
        if bin_ is None:
            pytest.skip("PostgreSQL is not installed; `apt-get install postgresql` makes these tests run")
        self._bin = bin_
        self.folder = Path(tempfile.mkdtemp(prefix="purser-pg-"))
        if user := ordinary_user():
            shutil.chown(self.folder, user)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._names = itertools.count(1)
        self._engines: dict[str, sa.Engine] = {}
        self._run("initdb", "-D", self.data, "-U", SUPERUSER, "-A", "trust", "-E", "UTF8", "--no-sync")
        settings = f"listen_addresses = '127.0.0.1'\nport = {self.port}\nunix_socket_directories = '{self.folder}'\n"
        with open(self.data / "postgresql.conf", "a", encoding="utf-8") as file:
            file.write(settings + "max_connections = 200\nshared_buffers = 32MB\n")
        self.start()
        self.sql("postgres", f"CREATE ROLE {OWNER} LOGIN", f"CREATE ROLE {SERVICE} LOGIN")

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def _run(self, tool: str, *arguments: object) -> None:
        # Its output goes to a file: a server that inherits a pipe would keep it open for ever.
        with tempfile.TemporaryFile() as output:
            command = [str(self._bin / tool), *map(str, arguments)]
            done = subprocess.run(
                command, stdout=output, stderr=output, cwd="/", timeout=120, check=False, **as_ordinary_user()
            )
            output.seek(0)
            assert done.returncode == 0, output.read().decode()

    def start(self) -> None:
        self._run("pg_ctl", "start", "-w", "-t", "60", "-D", self.data, "-l", self.folder / "log")

    def stop(self, mode: str = "fast") -> None:
        """`fast` ends sessions first; `immediate` is as good as pulling the plug."""
        self._run("pg_ctl", "stop", "-w", "-t", "60", "-m", mode, "-D", self.data)

    def end(self) -> None:
        for engine in self._engines.values():
            engine.dispose()
        if (self.data / "postmaster.pid").exists():  # unless a test has stopped it
            self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def setting(self, name: str, value: str) -> Iterator[None]:
        """The whole server runs with `name` = `value` for a while; sessions that begin meanwhile see it."""
        before = self._setting(name)
        try:
            self._set(name, f"ALTER SYSTEM SET {name} = '{value}'", value)
            yield
        finally:
            self._set(name, f"ALTER SYSTEM RESET {name}", before)

    def _setting(self, name: str) -> str:
        with self.engine("postgres").connect() as connection:
            return str(connection.exec_driver_sql(f"SHOW {name}").scalar_one())

    def _set(self, name: str, statement: str, value: str) -> None:
        self.sql("postgres", statement, "SELECT pg_reload_conf()")
        deadline = time.monotonic() + 30
        while self._setting(name) != value:
            assert time.monotonic() < deadline, f"{name} did not become {value}"
            time.sleep(0.005)

    def url(self, database: str, role: str = SERVICE) -> str:
        return f"postgresql://{role}@127.0.0.1:{self.port}/{database}"

    def engine(self, database: str, role: str = SUPERUSER) -> sa.Engine:
        """Plain connections of `role`, each statement committed at once."""
        url = self.url(database, role).replace("postgresql:", "postgresql+psycopg:")
        if url not in self._engines:
            self._engines[url] = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        return self._engines[url]

    def sql(self, database: str, *statements: str, role: str = SUPERUSER) -> None:
        with self.engine(database, role).connect() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    def create(self, template: str = "template1") -> str:
        """A new database that OWNER owns, a copy of `template`; returns its name."""
        name = f"books_{next(self._names)}"
        self.sql("postgres", f"CREATE DATABASE {name} OWNER {OWNER} TEMPLATE {template}")
        self.sql(name, f"ALTER SCHEMA public OWNER TO {OWNER}")
        return name

    def drop(self, database: str) -> None:
        self.sql("postgres", f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")
