"""The command `status`."""

from __future__ import annotations

from typing import Annotated

import typer

from receiver.cli.opening import opened
from receiver.cli.options import Json
from receiver.cli.terminal import say, say_json


def status(
    external_task_id: Annotated[
        str | None, typer.Argument(help="A task by its external id or its own id (a UUID). [default: the newest tasks]")
    ] = None,
    limit: Annotated[int, typer.Option(help="How many of the newest tasks.", min=1, max=10_000)] = 20,
    urls: Annotated[
        bool, typer.Option("--urls", help="Print a link to each archived file of the task. Each link is a secret.")
    ] = False,
    expires: Annotated[int, typer.Option(help="Seconds until these links expire.", min=1, max=604_800)] = 3_600,
    as_json: Json = False,
) -> None:
    """Show one task with its files and timeline, or a table of the newest tasks."""
    from receiver.cli import show
    from receiver.tasks.task_view import report, reports

    with opened(needs_bucket=as_json or external_task_id is not None) as parts:
        if urls:
            if external_task_id is None:
                raise typer.BadParameter("--urls needs a task")
            links = show.urls(parts, external_task_id, expires)
            if as_json:
                say_json(links, indent=1)
            else:
                say(*(link["url"] for link in links))
        elif external_task_id is None and as_json:
            found = list(reports(parts.database, parts.bucket, limit))
            audit = show.audited(parts).as_json()
            summary = {**show.measured(parts).as_dict(), "intake": parts.database.shortage() or "ok"}
            say_json({"summary": summary, "audit": audit, "tasks": found}, indent=1)
        elif external_task_id is None:
            show.show_latest(parts, limit)
        elif as_json:
            say_json(report(parts.database, parts.bucket, external_task_id), indent=1)
        else:
            show.show(parts, external_task_id)
