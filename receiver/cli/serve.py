"""Commands that run the program: serve, work, migrate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from receiver.cli.opening import opened
from receiver.cli.terminal import say

Store = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Keep pictures in DIR: runs the packaged S3 server on loopback."),
]
AllowHttp = Annotated[bool, typer.Option("--allow-http", help="Accept http:// addresses that are not loopback.")]


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="RECEIVER_HOST")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", show_default="RECEIVER_PORT")] = None,
    store: Store = None,
    allow_http: AllowHttp = False,
) -> None:
    """Receive callbacks and archive their pictures: the web server and its worker processes."""
    from receiver.app import process

    with opened(allow_http, ready=False, quiet=False, store=store, starts_store=True, host=host, port=port) as parts:
        _name_settings()
        process.serve(parts)


def work(
    once: Annotated[bool, typer.Option("--once", help="Work on what is due now, then exit.")] = False,
    supervised: Annotated[bool, typer.Option("--supervised", hidden=True)] = False,
    store: Store = None,
    allow_http: AllowHttp = False,
) -> None:
    """Run one worker process: applies deliveries, sends and reads tasks, archives pictures."""
    from receiver.app import process

    with opened(allow_http, ready=False, quiet=False, store=store, starts_store=not supervised) as parts:
        if not supervised:  # its `receiver serve` has said it
            _name_settings()
        if once:
            say(f"worked on {process.work_once(parts)} rows")
        else:
            process.work(parts, supervised=supervised)


def migrate() -> None:
    """Bring the database schema up to date. Safe to repeat, and to run on several hosts at once."""
    from storage.rows import migrations

    with opened(ready=False) as parts:
        before = migrations.current(parts.database)
        migrations.upgrade(parts.database)
        after = migrations.current(parts.database)
    say(f"schema {after} was there already" if before == after else f"schema {before or 'empty'} -> {after}")


def _name_settings() -> None:
    """Log where settings came from. A misspelt variable otherwise leaves its setting at the default silently."""
    import structlog

    from receiver.base import config

    if path := config.env_file():
        structlog.get_logger().info("settings.read", file=str(path))
    for name in config.unknown_variables():
        structlog.get_logger().warning("settings.unknown", variable=name, nearest=config.nearest_variable(name))
