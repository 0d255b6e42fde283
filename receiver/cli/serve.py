"""Commands that run the program: serve, work, migrate."""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from receiver.base.collector import collector_paused, import_without_rich
from receiver.cli.opening import opened
from receiver.cli.options import AllowHttp, Store
from receiver.cli.terminal import OutputFailed, say
from storage.operations.counted import counted

if TYPE_CHECKING:
    from receiver.base.config import Settings


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="RECEIVER_HOST")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", show_default="RECEIVER_PORT")] = None,
    store: Store = None,
    allow_http: AllowHttp = False,
) -> None:
    """Receive callbacks and archive their pictures: the web server and its worker processes."""
    with opened(
        allow_http, ready=False, quiet=False, store=store, starts_store=True, borrows_store=False, host=host, port=port
    ) as parts:
        from receiver.app import process

        _name_settings(parts.settings)
        settings = parts.settings
        process.serve(parts, on_listening=partial(_name_console, settings) if settings.store else None)


def work(
    once: Annotated[bool, typer.Option("--once", help="Work on what is due now, then exit.")] = False,
    supervised: Annotated[bool, typer.Option("--supervised", hidden=True)] = False,
    store: Store = None,
    allow_http: AllowHttp = False,
) -> None:
    """Run one worker process: applies deliveries, sends and reads tasks, archives pictures."""
    if supervised and not _is_forked_worker(store, allow_http):
        return
    with opened(allow_http, ready=False, quiet=False, store=store, starts_store=not supervised) as parts:
        from receiver.app import process

        if not supervised:  # `receiver serve` has logged it already
            _name_settings(parts.settings)
        if once:
            say(f"worked on {counted(process.work_once(parts), 'row')}", err=_is_output_for_events(parts.settings))
        else:
            process.work(parts, supervised=supervised)


def _is_forked_worker(store: Path | None, allow_http: bool) -> bool:
    """Become the supervisor of `receiver serve`'s workers. Returns False at its end, and True in each worker."""
    with collector_paused():
        import_without_rich()
        from receiver.app import process
        from receiver.base import config, telemetry

    settings = config.load(allow_http=allow_http or None, store=store)
    telemetry.configure(settings.log_level, settings.log_format)
    return process.supervise(settings)


def migrate() -> None:
    """Bring the database schema up to date. Safe to repeat, and to run on several hosts at once."""
    from receiver.app import database_faults, process
    from storage.rows import migrations

    with opened(ready=False, needs_bucket=False) as parts:
        database_faults.check_file(parts.database)
        before = migrations.current(parts.database)
        process.ready_schema(parts.database, migrate=True)
        after = migrations.current(parts.database)
    say(f"schema {after} was there already" if before == after else f"schema {before or 'empty'} -> {after}")


def _name_console(settings: Settings, port: int) -> None:
    """Print a one-time link to the console. Where output is not a terminal it may be stored, so only the key's file is
    named. `port`: where it listens, for the setting may be 0.
    """
    from receiver.console.access import one_time_token
    from receiver.local_store.serve_store import has_made_key

    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host  # noqa: S104 - compared, not bound
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/console"
    made = has_made_key(settings)
    key = f"the key in {settings.store}/console.key" if made else "a key of RECEIVER_CONSOLE_KEYS"
    words = f"{url}  (log in with {key})"
    if sys.stdout.isatty():
        token = one_time_token(settings.console_people[0])
        words = f"{url}/login?once={token}  (works once, within ten minutes; afterwards log in with {key})"
    with suppress(OutputFailed, BrokenPipeError):  # callbacks come whether or not somebody reads this
        say(f"console: {words}", err=_is_output_for_events(settings))


def _is_output_for_events(settings: Settings) -> bool:
    """Whether standard output is a sink, whose reader expects JSON lines alone."""
    return any(entry.kind == "stdout" for entry in settings.event_entries)


def _name_settings(settings: Settings) -> None:
    """Log which sources the settings have, and which are often missing or misspelt.

    Otherwise a misspelt variable silently leaves its setting at the default.
    """
    import structlog

    from receiver.base import config, env_file

    log = structlog.get_logger()
    if path := env_file.find():
        log.info("settings.read", file=str(path))
    for name in config.unknown_variables():
        log.warning("settings.variable_not_recognized", variable=name, nearest=config.nearest_variable(name))
    if not (settings.kling_api_key or settings.kling_access_key):
        log.warning("settings.credentials_not_set", missing="RECEIVER_KLING_API_KEY")
