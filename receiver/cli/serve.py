"""Verbs that run: serve, work, migrate."""

from __future__ import annotations

from typing import Annotated

import typer

from receiver.cli.terminal import say

AllowHttp = Annotated[bool, typer.Option("--allow-http", help="Accept http:// addresses that are not loopback.")]


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="RECEIVER_HOST")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", show_default="RECEIVER_PORT")] = None,
    allow_http: AllowHttp = False,
) -> None:
    """Receive callbacks and archive their pictures: the web server and its worker processes."""
    from receiver.app import process
    from receiver.app.wiring import Parts
    from receiver.base import config, telemetry

    settings = config.load(host=host, port=port, allow_http=allow_http or None)
    telemetry.configure(settings.log_level, settings.log_format)
    process.serve(Parts(settings))


def work(
    once: Annotated[bool, typer.Option("--once", help="Work on what is due now, then exit.")] = False,
    supervised: Annotated[bool, typer.Option("--supervised", hidden=True)] = False,
    allow_http: AllowHttp = False,
) -> None:
    """Run one worker process: applies deliveries, sends and reads tasks, archives pictures."""
    from receiver.app import process
    from receiver.app.wiring import Parts
    from receiver.base import config, telemetry

    settings = config.load(allow_http=allow_http or None)
    telemetry.configure(settings.log_level, settings.log_format)
    if once:
        say(f"worked on {process.work_once(Parts(settings))} rows")
    else:
        process.work(Parts(settings), supervised=supervised)


def migrate() -> None:
    """Bring the database schema up to date. Safe to repeat, and to run on several hosts at once."""
    from receiver.app.wiring import Parts
    from receiver.base import config
    from storage.rows import migrations

    database = Parts(config.load()).database
    before = migrations.current(database)
    migrations.upgrade(database)
    after = migrations.current(database)
    say(f"schema {after} was there already" if before == after else f"schema {before or 'empty'} -> {after}")
