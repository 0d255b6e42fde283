"""Verbs that look: status."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def status(
    external_task_id: Annotated[
        str | None, typer.Argument(help="One task with its timeline; without it the latest.")
    ] = None,
    limit: Annotated[int, typer.Option(help="How many of the latest tasks.", min=1, max=10_000)] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Show how one task stands, with its files and timeline, or a table of the latest tasks."""
    from rich.console import Console

    from receiver import config, process, waiting
    from receiver.wiring import Parts

    parts = Parts(config.load())
    process.ready_schema(parts.database, migrate=False)
    if external_task_id is None and as_json:
        found = [waiting.report(parts, task.external_task_id) for task in waiting.latest(parts, limit)]
        typer.echo(json.dumps(found, indent=1))
    elif external_task_id is None:
        waiting.show_latest(parts, limit, Console())
    elif as_json:
        typer.echo(waiting.report_json(parts, external_task_id))
    else:
        waiting.show(parts, external_task_id, Console())
