"""The long-running processes: the web server with its supervised workers, and a worker."""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import structlog
import uvicorn
from sqlalchemy.orm import configure_mappers

from receiver.app import database_faults
from receiver.app.jobs import mend_due_times
from receiver.app.wiring import Parts
from receiver.base.collector import collector_paused, spare_imports
from receiver.base.config import Settings
from receiver.web.http_protocol import KEEP_ALIVE_SECONDS, MAX_CONNECTIONS, BoundedHttpProtocol
from receiver.workers.supervisor import Supervisor, SupervisorProcess
from receiver.workers.worker import TooFewThreads
from storage.database import checkpoints
from storage.database.sessions import Database
from storage.database.urls import place
from storage.errors import DatabaseUnavailable, UserError
from storage.own_files import narrow
from storage.rows import migrations
from storage.spool import sweep
from storage.url_parts import LOOPBACK_HOSTS, split_url

log = structlog.get_logger()

# After a power cut the services of a host start in any order, and PostgreSQL may replay its log first. After this time
# the start fails with exit code 1, and the service manager tries again.
DATABASE_START_SECONDS = 60.0
DATABASE_INTERVAL_SECONDS = 2.0
# Modules that a worker imports late. The supervisor of workers imports them before it forks.
SHARED_MODULES = ("alembic.command", "storage.rows.migrations", "receiver.web.assets", "boto3.s3.inject")
# How long a request in progress may take to end at SIGTERM: a body has 10 s, its commit 5 s.
WEB_GRACE_SECONDS = 15
# How long a thread that computes, for a page or a scrape, keeps the interpreter when the event loop wants it. Python's
# own 5 ms are added to an acknowledgement each time.
SWITCH_SECONDS = 0.0005
# Descriptors that are not for connections: 20 of an idle web process (on SQLite), two for each of SQLite's 22 readers,
# one for each of 64 creates at the provider, ten to the bucket, one per worker, and a reserve for connections that are
# about to close.
RESERVED_DESCRIPTORS = 160


class ListenFailed(UserError):
    """The web server cannot listen: its address is in use, is not this machine's, or does not exist."""


class SchemaBehind(UserError):
    """The database has another schema than this code, an older or a newer one. The message says what to do."""


def ready_schema(database: Database, *, migrate: bool) -> None:
    """Bring the schema up to date if the settings allow it. Otherwise require the current schema and create nothing.

    Raises `SchemaBehind`, and `DatabaseRefused` for a file that is no database.
    """
    database_faults.check_file(database)
    if migrate:
        require_not_newer(migrations.current(database))
        migrations.upgrade(database)
        return
    if database.is_sqlite and not Path(database.url.database or "").exists():
        path = place(database.url)
        raise SchemaBehind(f"{path} holds no database: change to the right folder, correct RECEIVER_DATABASE_URL, "
                           "or run `receiver migrate` to make one")  # fmt: skip
    current, wanted = migrations.current(database), migrations.head()
    require_not_newer(current)
    if current != wanted:
        raise SchemaBehind(f"the database schema is {current or 'empty'}, this version needs {wanted}: "
                           "run `receiver migrate`")  # fmt: skip


def require_not_newer(current: str | None) -> None:
    """Raises `SchemaBehind` for the schema of a newer version: no step leads back from it."""
    if migrations.is_newer(current):
        raise SchemaBehind(f"the database schema is {current}, this version needs {migrations.head()}: "
                           f"{migrations.IF_NEWER}")  # fmt: skip


def await_schema(database: Database, *, migrate: bool, seconds: float = DATABASE_START_SECONDS) -> None:
    """`ready_schema` for a process that keeps running. Waits a limited time for an unreachable PostgreSQL, and logs it.

    A missing SQLite file, a wrong role and a wrong database name do not change by waiting. Raises `SchemaBehind`,
    `DatabaseUnavailable`.
    """
    deadline, logged = time.monotonic() + seconds, ""
    while True:
        try:
            ready_schema(database, migrate=migrate)
        except DatabaseUnavailable as error:
            left = deadline - time.monotonic()
            if database.is_sqlite or left < 0 or database_faults.is_for_good(error):
                raise
            words = database_faults.sentence(database.url, error)
            if words != logged:
                log.warning("start.database_not_reached", error=words, gives_up_in=round(left))
            logged = words
            time.sleep(DATABASE_INTERVAL_SECONDS)
        else:
            return


def narrow_files(parts: Parts) -> None:
    """Remove other users' access to our files, which earlier releases left readable."""
    files = list(parts.database.files.values())
    if store := parts.settings.store:
        files += [store / name for name in ("store.json", "store.lock", "console.key")]
    if narrowed := narrow(files):
        log.warning("files.narrowed", files=list(map(str, narrowed)), mode="0600")


def fit_descriptors() -> int:
    """The limit of simultaneous connections. Raises the soft limit of descriptors as needed, at most to the hard limit.

    Beyond the limit the event loop resets every new connection, callbacks too, and logs nothing. If descriptors are
    few, half of them are for connections.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + RESERVED_DESCRIPTORS
    if 0 <= soft < wanted:  # RLIM_INFINITY is -1
        enough = wanted if hard < 0 else min(hard, wanted)
        with suppress(OSError, ValueError):  # not permitted: keep the current limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))
            soft = enough
    if soft < 0 or soft >= wanted:
        return MAX_CONNECTIONS
    connections = soft - min(RESERVED_DESCRIPTORS, soft // 2)
    log.warning("start.descriptors_limited", limit=soft, connections=connections, wanted=wanted)
    return connections


def serve(parts: Parts, *, on_listening: Callable[[int], None] | None = None) -> None:
    """Run the web server and the workers until SIGTERM, SIGINT or SIGHUP.

    `on_listening`: called with the port. Raises `SchemaBehind`, `DatabaseUnavailable`, and `SupervisorEnded` when their
    supervisor ends by itself.
    """
    settings = parts.settings
    await_schema(parts.database, migrate=settings.migrates_on_start)
    BoundedHttpProtocol.max_connections = fit_descriptors()
    sockets = listen(settings.host, settings.port)
    warn_of_other_port(settings.public_url, sockets[0].getsockname()[1])
    narrow_files(parts)
    environment = {"RECEIVER_ALLOW_HTTP": "true"} if settings.allow_http else {}
    if settings.store:
        environment["RECEIVER_STORE"] = str(settings.store.absolute())
    supervisor = SupervisorProcess(grace_seconds=settings.grace_seconds, environment=environment)
    with collector_paused():
        web = parts.web()
    server = _Server(web_config(web, settings.host, settings.port), on_listening, supervisor.announce_end)
    if settings.workers:
        supervisor.start(server.end)
    sys.setswitchinterval(SWITCH_SECONDS)
    spare_imports()
    try:
        with checkpoints.beside(parts.database):
            server.run(sockets=sockets)
    finally:
        supervisor.stop()
        if parts.gateway is not None:
            parts.gateway.join()  # The next step closes the provider's client, which would cut their answers off.
        parts.database.close()
    supervisor.raise_if_ended()


def web_config(web: Any, host: str, port: int) -> uvicorn.Config:
    """Our uvicorn settings: no banner, no access log (paths hold tokens), no trust in forwarded headers."""
    return uvicorn.Config(
        web,
        host=host,
        port=port,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        http=BoundedHttpProtocol,
        ws="none",
        log_config=None,
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=WEB_GRACE_SECONDS,
    )


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to the addresses of `host` that this machine has. `port` 0: a free one, the same on each address.

    Raises `ListenFailed`.
    """
    sockets: list[socket.socket] = []
    reason = "no address of this machine"
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        found, reason = [], getattr(error, "strerror", None) or "no such host name"
    for family, _, _, _, address in dict.fromkeys(found):
        wanted = port or (sockets[0].getsockname()[1] if sockets else 0)
        try:
            sockets.append(_bound(family, (address[0], wanted, *address[2:])))
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # ::1 may be named on a host without IPv6
                for each in sockets:
                    each.close()
                sockets, reason = [], os.strerror(error.errno or 0)
                break
    if not sockets:
        raise ListenFailed(f"cannot listen on {host}:{port}: {reason}; choose another with --host and --port")
    return sockets


def warn_of_other_port(public_url: str | None, port: int) -> None:
    """Warn if callbacks go to this machine's loopback and another port. Only a proxy there brings them here."""
    url = split_url(public_url or "")
    wanted = url.port or (443 if url.scheme == "https" else 80)
    if url.hostname in LOOPBACK_HOSTS and wanted != port:
        log.warning("start.callbacks_misdirected", public_url=public_url, port=port)


def _bound(family: int, address: tuple[Any, ...]) -> socket.socket:
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.bind(address)
    except OSError:
        opened.close()
        raise
    return opened


def ending_signals() -> list[signal.Signals]:
    """The signals that end a process in order. A closing terminal sends SIGHUP, which `nohup` ignores; then so does
    this process.
    """
    is_held = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if is_held else [signal.SIGHUP])]


class _Server(uvicorn.Server):
    """Logs when it listens, and stops without ending the process. `on_signal`: called in the signal's handler."""

    def __init__(
        self, config: uvicorn.Config, on_listening: Callable[[int], None] | None, on_signal: Callable[[], object] = bool
    ) -> None:
        super().__init__(config)
        self._on_listening = on_listening
        self._on_signal = on_signal

    def end(self) -> None:
        """Stop as after a signal. Safe to call from any thread."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._on_signal()
        super().handle_exit(sig, frame)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Replaces uvicorn's handlers, because uvicorn raises the signal again at its end, which would end us before
        our workers.
        """
        before = {number: signal.signal(number, self.handle_exit) for number in ending_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: Any = None) -> None:
        """End answers that wait for a reader to leave or for a provider. Otherwise SIGTERM would wait for them."""
        for end in self.config.app.endings:  # type: ignore[union-attr]
            end()
        await super().shutdown(sockets)

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            log.info("web.started", host=self.config.host, port=self.port)
            if self._on_listening is not None:
                self._on_listening(self.port)

    @property
    def port(self) -> int:
        for server in self.servers:
            for each in server.sockets:
                return int(each.getsockname()[1])
        return self.config.port


def supervise(settings: Settings) -> bool:
    """Become the supervisor of RECEIVER_WORKERS workers. Returns False at its end, and True in each worker."""
    with collector_paused():
        for name in SHARED_MODULES:
            import_module(name)
        if not settings.database_url.get_secret_value().startswith("sqlite"):
            import_module("psycopg")
        configure_mappers()
    spare_imports()
    return Supervisor(settings.workers, grace_seconds=settings.grace_seconds).run()


def work(parts: Parts, *, supervised: bool) -> None:
    """Run one worker process until SIGTERM, SIGINT or SIGHUP, or if `supervised`, until its parent has ended."""
    settings = parts.settings
    await_schema(parts.database, migrate=False)
    narrow_files(parts)
    sweep(settings.spool_dir)
    worker = parts.worker()
    # Ctrl-C sends SIGINT to the whole group, and the supervisor SIGTERM at once. A handler that called `stop` could
    # interrupt another one within an event's lock, and waited for it until the worker was killed. So a thread calls it.
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    for number in ending_signals():
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_stop_after_signal, args=(woken, worker.stop), daemon=True).start()
    if supervised:
        threading.Thread(target=_watch_parent, args=(worker.stop,), daemon=True).start()
    log.info("worker.started", threads=settings.worker_threads)
    code = 0
    try:
        with checkpoints.beside(parts.database):
            worker.run()
    except TooFewThreads as error:
        log.error("worker.not_started", error=str(error))
        code = 1
    except Exception:
        log.exception("worker.step_failed", job="feed")
        code = 1  # the supervisor starts another
    # A download that exceeds the grace time runs in a thread that cannot be stopped. Its row was released.
    logging.shutdown()  # writes the log lines that wait
    os._exit(code)


def work_once(parts: Parts) -> int:
    """Work on everything that is due now. Returns how many rows were worked on."""
    ready_schema(parts.database, migrate=parts.settings.migrates_on_start)
    narrow_files(parts)
    mend_due_times(parts)
    worker, count = parts.worker(), 0
    while done := worker.run_until_idle() + worker.run_quarantined() + parts.sequence():
        count += done
    return count


def _stop_after_signal(woken: int, stop: Callable[[], None]) -> None:
    os.read(woken, 1)
    stop()


def _watch_parent(stop: Callable[[], None]) -> None:
    while os.read(0, 1024):
        pass
    stop()
