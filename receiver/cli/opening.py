"""The start of every command: settings, logs, the database with its schema, and their faults in one line each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from receiver.base.collector import collector_paused, import_without_rich
from receiver.cli.terminal import say

if TYPE_CHECKING:
    from receiver.app.wiring import Parts
    from receiver.base.config import Settings

NEW_FILE_SECONDS = 30.0


@contextmanager
def opened(
    allow_http: bool = False,
    *,
    migrate: bool = False,
    ready: bool = True,
    needs_bucket: bool = True,
    quiet: bool = True,
    store: Path | None = None,
    starts_store: bool = False,
    borrows_store: bool = True,
    asks_provider: bool = False,
    pays: bool = False,
    **settings: Any,
) -> Iterator[Parts]:
    """The parts for a command, closed at its end.

    `migrate`: the command makes rows, so it may create the schema if the settings allow it; otherwise nothing is
    created. `ready`: check the schema first. `needs_bucket`: the command names, reads or writes objects. `quiet`:
    log only warnings. `store`: the folder of a local store; `starts_store`: the command needs it running;
    `borrows_store`: that of another process will do. `asks_provider`: say which `.env` decided where the key goes.
    `pays`: the command itself sends what is paid for. `settings`: values from the command's options.
    """
    with collector_paused():
        import_without_rich()
        from receiver.app import process
        from receiver.app.database_faults import explained
        from receiver.app.wiring import Parts
        from receiver.base import telemetry
        from receiver.local_store import serve_store

    chosen = _settings(needs_bucket=needs_bucket, allow_http=allow_http or None, store=store, **settings)
    telemetry.configure("warning" if quiet else chosen.log_level, chosen.log_format)
    _announce(chosen, asks_provider)
    with serve_store.running(chosen, borrows=borrows_store) if starts_store else nullcontext():
        with collector_paused():
            parts = Parts(_with_console_key(chosen) if starts_store else chosen)
        try:
            with explained(parts.database):
                if pays:
                    _require_served(parts)
                if ready:
                    parts.database.bound_waits()
                    process.ready_schema(parts.database, migrate=migrate and chosen.migrates_on_start)
                yield parts
        finally:
            parts.close()


def _settings(**values: Any) -> Settings:
    from receiver.base import config

    try:
        return config.load(**values)
    except config.SettingsInvalid as error:  # a missing setting is often a misspelt one
        raise config.SettingsInvalid("\n".join([str(error), *_unknown()])) from None


def _with_console_key(settings: Settings) -> Settings:
    """The settings with the console key of the local store, where none is set."""
    from pydantic import SecretStr

    from receiver.local_store import serve_store

    if settings.store is None or settings.console_keys:
        return settings
    key = SecretStr(f"me={serve_store.console_key(settings.store)}")
    return settings.model_copy(update={"console_keys": (key,)})


def _announce(settings: Settings, asks_provider: bool) -> None:
    from receiver.base import env_file
    from receiver.local_store import serve_store

    if asks_provider and (path := env_file.find()):
        say(f"settings: {path} was read", err=True)
    if warning := serve_store.other_database(settings):
        say(f"warning: {warning}", err=True)


def _require_served(parts: Parts) -> None:
    """Refuse to pay for pictures that nobody fetches: in a database that only the current folder decides, and that is
    new, or beside the one of the store and without a worker. Raises `UserError`.
    """
    from receiver.local_store import serve_store
    from storage.database.urls import file_url
    from storage.errors import UserError
    from storage.operations import heartbeats
    from storage.rows import migrations

    database = parts.database
    file = Path(database.url.database or "")
    if not database.is_sqlite or file.is_absolute():
        return
    if not serve_store.other_database(parts.settings):
        if file.parent.is_dir() and not _appears(file):
            raise UserError(f"nothing was sent, because {file.absolute()} does not exist: run this in the folder where "
                            "`receiver serve` runs, or name the file there by its whole path in RECEIVER_DATABASE_URL. "
                            "`receiver migrate` makes a new one here")  # fmt: skip
        return
    if file.is_file() and migrations.current(database) == migrations.head() and heartbeats.count_alive(database):
        return
    raise UserError(f"nothing was sent, because no worker serves {file.absolute()}. To use it all the same, start "
                    "`receiver serve` in this folder first, or name the file by its whole path: "
                    f"RECEIVER_DATABASE_URL={file_url(file)}")  # fmt: skip


def _appears(file: Path) -> bool:
    """Whether the file exists. Waits for a `receiver serve` that is still starting, such as one just before with &."""
    deadline = time.monotonic() + NEW_FILE_SECONDS
    if not file.exists():
        say(f"{file.absolute()} does not exist, waiting {NEW_FILE_SECONDS:g} s for `receiver serve` here", err=True)
    while not (exists := file.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return exists


def _unknown() -> Iterator[str]:
    from receiver.base import config

    for name in config.unknown_variables():
        nearest = config.nearest_variable(name)
        yield f"{name}: no setting has this name" + (f"; did you mean {nearest}?" if nearest else "")
