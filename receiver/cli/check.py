"""The command `check`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from receiver.cli.options import AllowHttp, Json, Store
from receiver.cli.terminal import cell, say, say_json, show

if TYPE_CHECKING:
    from receiver.app.findings import Result

COLOURS = {"ok": "green", "note": "cyan", "fault": "bold red"}


def check(
    as_json: Json = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print every check, also those that are ok.")] = False,
    store: Store = None,
    allow_http: AllowHttp = False,
) -> None:
    """Check settings, database, bucket, provider, clock and event sinks, and print a remedy for each fault.

    Exit code 1 if there is a fault. Nothing is submitted, no event is sent, and test objects in the bucket are removed.
    Prints lines to paste: a new callback secret while none is set, else the URL for the provider's console. Both are
    secrets.
    """
    from receiver.app import checks
    from receiver.app.findings import Status
    from receiver.base import config, telemetry
    from receiver.local_store import serve_store

    try:
        settings = config.load(allow_http=allow_http or None, store=store)
    except config.SettingsInvalid as error:
        results = [*checks.refused_settings(error)]
    else:
        telemetry.configure("warning", settings.log_format)
        with serve_store.running(settings) as started_store:
            results = checks.run(settings, started_store=started_store)
    is_good = all(result.status is not Status.FAULT for result in results)
    if as_json:
        say_json({"ok": is_good, "checks": [asdict(result) for result in results]}, indent=1)
    else:
        _show([result for result in results if verbose or not result.detail])
    if not is_good:
        raise typer.Exit(1)


def _show(results: Sequence[Result]) -> None:
    """The table, then the lines to paste, unwrapped."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("", "check", "found"):
        table.add_column(heading, overflow="fold")
    for result in results:
        found = f"{result.line}: {result.advice}" if result.advice else result.line
        table.add_row(cell(result.status, COLOURS[result.status]), cell(result.name), cell(found))
    show(table)
    for result in results:
        if result.paste:
            say("", result.paste)
