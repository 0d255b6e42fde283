"""`--store DIR`: an S3 store on this machine for users without another one. SeaweedFS with its data in DIR.

    DIR/store.json   0600: its keys, made once, its ports, the process that runs it, and that process's database
    DIR/store.lock   held by that process and by the server, so that no second server works on the same data
    DIR/s3/          the data
    DIR/console.key  0600: the key of the console if RECEIVER_CONSOLE_KEYS names none

The first command that needs the store starts it and stops it again. Any other command finds the running one by the
file.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy.exc import DBAPIError
from sqlmodel import select

from receiver.base.config import Settings
from receiver.local_store.seaweed import (
    KEPT,
    PORT_TRIES,
    START_SECONDS,
    PortTaken,
    Seaweed,
    answers,
    ownership_fault,
    pair_is_free,
    pick_ports,
    weed_binary,
)
from storage.database.sessions import Database
from storage.database.turnstile import who_holds
from storage.database.urls import normal_url, place
from storage.errors import DatabaseUnavailable, UserError
from storage.local_folder import LocalFolder
from storage.own_files import FILE_MODE, final, is_shared, open_own
from storage.rows.models import Asset
from storage.states import AssetState

LOCK_INTERVAL_SECONDS = 0.2
STRANGER_SECONDS = 30.0  # the limit of the database's lock; a server whose receiver was killed ends within 2 s


class StoreFailed(UserError):
    """The store of `--store` cannot be used. The message gives the reason."""


def address(settings: Settings) -> tuple[str | None, tuple[str, str] | None]:
    """The store's endpoint, and its keys if we run it. None: boto3's own chain finds them."""
    if settings.store is None:
        return settings.s3_endpoint_url, None
    with _named(settings.store):
        keys = _read(settings.store) or _fresh()  # made by the first command that runs it
    return f"http://127.0.0.1:{keys['ports']['s3']}", (keys["access_key"], keys["secret_key"])


def console_key(directory: Path) -> str:
    """The key of the console, made at the first call and kept in DIR/console.key, mode 0600. Raises `StoreFailed`."""
    path = directory / "console.key"
    with _named(directory):
        _make(directory)
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
        except FileExistsError:
            return _text(path).strip()
        with open(file, "w") as made:
            made.write(secrets.token_urlsafe(30) + "\n")
        return _text(path).strip()


def has_made_key(settings: Settings) -> bool:
    """Whether the console's first key is that of DIR/console.key, because none was set."""
    file = settings.store and settings.store / "console.key"
    if not file or not file.is_file() or not settings.console_people:
        return False
    return file.read_text().strip() == settings.console_people[0].key.get_secret_value()


@contextmanager
def running(settings: Settings, *, borrows: bool = True) -> Iterator[bool]:
    """Run the store of `--store` until the end of the block. Does nothing without `--store`.

    `borrows`: use the store of another process if one runs; it ends with that process. Yields whether the store was
    started here. Raises `StoreFailed`.
    """
    if settings.store is None:
        yield False
        return
    with _named(settings.store):
        _refuse_typo(settings)
        server = _started(settings.store.absolute(), settings.s3_bucket, _database(settings), borrows)
    try:
        yield server is not None
    finally:
        if server is not None:
            server.stop()


def _refuse_typo(settings: Settings) -> None:
    """Refuse to begin an empty store for a database whose files are in another one. `mkdir` says that it is meant."""
    assert settings.store is not None
    if any((settings.store / name).exists() for name in ("store.json", "s3")) or not _has_files(settings):
        return
    new = shlex.quote(str(settings.store / "s3"))
    raise StoreFailed(f"RECEIVER_STORE: there is no store in {settings.store}, and the files of {_database(settings)} "
                      f"are in another: correct the folder, or run `mkdir -p {new}` for a new one")  # fmt: skip


def _has_files(settings: Settings) -> bool:
    """Whether the database says that files are archived. False if it cannot tell, which others report."""
    database = Database(settings.database_url.get_secret_value())
    if database.is_sqlite and not Path(database.url.database or "").is_file():
        return False
    try:
        with database.read() as session:
            return session.exec(select(Asset.id).where(Asset.state == AssetState.ARCHIVED).limit(1)).first() is not None
    except (DatabaseUnavailable, DBAPIError):
        return False
    finally:
        database.close()


def other_database(settings: Settings) -> str | None:
    """A warning if the store last ran with another SQLite file that still exists. Either may be the right one."""
    if settings.store is None:
        return None
    with _named(settings.store):
        recorded, ours = (_read(settings.store) or {}).get("database"), _database(settings)
    if not recorded or not Path(recorded).is_file() or Path(recorded).resolve() == Path(ours).resolve():
        return None
    return (
        f"{settings.store} was last served with the tasks in {recorded}, and this command uses {ours}: "
        f"stand in {Path(recorded).parent}, or set RECEIVER_DATABASE_URL, if you mean those tasks"
    )


def _database(settings: Settings) -> str:
    return place(normal_url(settings.database_url.get_secret_value()))


@contextmanager
def _named(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        path = Path(error.filename or directory)
        words = ownership_fault(path.absolute(), directory.absolute()) or f"{path}: {error.strerror}"
        raise StoreFailed(f"RECEIVER_STORE: {words}") from None


def _started(directory: Path, bucket: str, database: str, borrows: bool) -> Seaweed | None:
    """A server of ours that answers; None if another process runs one and `borrows`."""
    try:
        weed_binary()
    except RuntimeError as error:
        raise StoreFailed(f"RECEIVER_STORE: {error}") from None
    _make(directory)
    # The server holds the lock too, so that after a kill -9 of this process the next one waits until the server has
    # ended.
    with open(open_own(directory / "store.lock", os.O_RDWR | os.O_CREAT), "wb") as lock:
        if owner := _waited_for(lock.fileno(), directory):
            if borrows:
                return None
            raise StoreFailed(f"RECEIVER_STORE: process {owner} runs the store in {directory}, which ends with it: "
                              "end that process first, or name another folder")  # fmt: skip
        keys = _read(directory) or _fresh()
        known = keys.get("database", "")
        if known and Path(known).is_file() and not Path(database).is_file():
            database = known  # a command in the wrong folder, such as `audit`, which makes no database
        keys |= {"owner": os.getpid(), "database": database}
        for _ in range(PORT_TRIES):
            with suppress(PortTaken):
                return _started_on_ports(directory, bucket, keys, lock.fileno())
    raise StoreFailed(f"RECEIVER_STORE: other programs took its ports {PORT_TRIES} times; start it again")


def _started_on_ports(directory: Path, bucket: str, keys: dict[str, Any], held: int) -> Seaweed:
    """A server on its previous ports if they are free. Raises `PortTaken` if another program took one first."""
    if not all(pair_is_free(port) for port in keys["ports"].values()):
        keys["ports"] = pick_ports()
    _write(directory, keys)
    server = Seaweed(
        directory / "s3", bucket, access_key=keys["access_key"], secret_key=keys["secret_key"],
        ports=keys["ports"], size=KEPT, held=held,
    )  # fmt: skip
    try:
        server.start()
    except PortTaken:
        keys["ports"] = pick_ports()
        raise
    except RuntimeError as error:
        raise StoreFailed(f"RECEIVER_STORE: {error}") from None
    return server


def _make(directory: Path) -> None:
    """Create the folder for this user. Raises PermissionError if others may change its contents, such as the keys."""
    final(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
    if is_shared(directory.stat()):
        raise PermissionError(errno.EPERM, "other users may write this folder; run `chmod go-w` on it", str(directory))


def _text(path: Path) -> str:
    with open(open_own(path, os.O_RDONLY)) as file:
        return file.read()


def _waited_for(lock: int, directory: Path) -> int | None:
    """Take the lock. The process that holds it instead, if it is alive and its store answers."""
    began_at = time.monotonic()
    while not _locked(lock):
        keys = _read(directory)
        is_starting = keys is not None and _is_alive(keys.get("owner"))
        if keys and is_starting and answers("GET", keys["ports"]["s3"], "/healthz"):
            return int(keys["owner"])
        if time.monotonic() > began_at + (START_SECONDS if is_starting else STRANGER_SECONDS):
            path = directory / "store.lock"
            raise StoreFailed(f"RECEIVER_STORE: {path} is locked, but no store answers: {who_holds(path)}")
        time.sleep(LOCK_INTERVAL_SECONDS)  # a process that is ending, or that has just started
    return None


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_alive(process_id: Any) -> bool:
    try:
        os.kill(int(process_id or 0), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return bool(process_id)


def _fresh() -> dict[str, Any]:
    return {"access_key": secrets.token_hex(10), "secret_key": secrets.token_urlsafe(30), "ports": pick_ports()}


def _read(directory: Path) -> dict[str, Any] | None:
    path = directory / "store.json"
    try:
        keys = json.loads(_text(path))
        database = str(keys.get("database") or "")
        return {**keys, "database": database, "ports": {part: int(port) for part, port in keys["ports"].items()}}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StoreFailed(f"RECEIVER_STORE: {path} is damaged; restore it from a backup") from None


def _write(directory: Path, keys: dict[str, Any]) -> None:
    """Write the whole file or nothing, readable for this user alone."""
    with LocalFolder(directory, folds_case=False).writing(["store.json"]) as file:
        file.write(json.dumps(keys).encode())
        file.flush()
        os.fsync(file.fileno())
