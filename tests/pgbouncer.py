"""PgBouncer in transaction mode in front of the run's PostgreSQL, like the address of a hosted database."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import psycopg
import pytest

from receiver.local_store.seaweed import Mortal
from tests.harness import wait_until
from tests.pipeline import free_port
from tests.postgres import Postgres

MISSING = "tests behind a pooler need Debian's PgBouncer: apt-get install pgbouncer"
PROGRAM = os.environ.get("PGBOUNCER", "pgbouncer")
CONFIG = """
[databases]
* = host=127.0.0.1 port={server} user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
pool_mode = transaction
default_pool_size = {size}
auth_type = any
logfile = {folder}/log
"""


NEEDED = pytest.mark.skipif(not shutil.which(PROGRAM) and "CI" not in os.environ, reason=MISSING)


class PgBouncer:
    """One pooler on 127.0.0.1, as a context manager. `size`: its server connections, lent for one transaction each."""

    def __init__(self, server: Postgres, *, size: int = 4) -> None:
        self.port = free_port()
        self._server = server
        self._folder = Path(tempfile.mkdtemp(prefix="receiver-pgbouncer-"))
        self._config = self._folder / "pgbouncer.ini"
        self._config.write_text(CONFIG.format(server=server.port, port=self.port, size=size, folder=self._folder))
        self._process: subprocess.Popen[bytes] | None = None
        self._starter = Mortal()  # the process is killed when the thread that started it ends

    def url(self, direct: str) -> str:
        """The address of a database of the server through the pooler."""
        return direct.replace(f":{self._server.port}/", f":{self.port}/")

    def __enter__(self) -> PgBouncer:
        user = (-1, -1)
        if os.getuid() == 0:  # PgBouncer refuses to run as root
            nobody = pwd.getpwnam("nobody")
            user = (nobody.pw_uid, nobody.pw_gid)
            os.chown(self._folder, *user)
        program = str(shutil.which(PROGRAM))
        with (self._folder / "log").open("ab") as log:
            os.chown(log.fileno(), *user)
            self._process = self._starter.start(
                [program, str(self._config)], death_signal=signal.SIGKILL, log=log, cwd=self._folder, env={}, user=user
            )
        try:
            wait_until(self._answers, seconds=60)
        except AssertionError:
            said = (self._folder / "log").read_text()
            self.__exit__()
            raise RuntimeError(f"PgBouncer did not start:\n{said[-3_000:]}") from None
        return self

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url(self._server.url()), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(20)
        shutil.rmtree(self._folder, ignore_errors=True)
