"""The operator's commands: retry, replay, reconcile, adopt, dismiss, prune."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from receiver.cli.opening import opened
from receiver.cli.options import MAX_NUMBER, AllowHttp, DryRun, Json, Since, Until
from receiver.cli.terminal import say_tally
from storage.operations.counted import counted

if TYPE_CHECKING:
    from receiver.app.wiring import Parts
    from receiver.tasks.operate import Operator

# Rows of one `retry --all-failed`. The next call continues with the following ones.
MAX_FAILED = 100_000
# The reason why a command found nothing to do, and what to do instead.
NO_FAILED = "no file was given up and no task is parked; dismissed ones are retried by their id, and filters narrow it"
NO_DELIVERY = "no stored delivery came then and is in that state; an earlier --since or no --state reaches more"
NO_READ = "no task waits for its result; name a task to read one that has ended"
NO_LISTED = "the provider lists no task of these days; a larger --listed-days reaches further back"
NO_OLD = "nothing that is over is older than that; `--older-than` with fewer days reaches more"
# The most days that still reach a year that there is.
MAX_DAYS = 36_500


def retry(
    name: Annotated[str | None, typer.Argument(help="A task (external id) or a file (asset id).")] = None,
    all_failed: Annotated[
        bool, typer.Option("--all-failed", help="All given-up files, and tasks that a retry may complete.")
    ] = False,
    since: Since = None,
    error: Annotated[str | None, typer.Option(metavar="TEXT", help="Only if the error contains this text.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="At most this many files and tasks, the oldest first.", min=1)
    ] = None,
    accept_unverified: Annotated[
        bool, typer.Option("--accept-unverified", help="Archive this one file although its structure check fails.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    allow_http: AllowHttp = False,
) -> None:
    """Try again: makes given-up files, or a task's next step, due now.

    A failed task is read once more, because a late success still counts. Nothing is sent again; only `submit` sends.
    --since, --error and --limit belong to --all-failed, which leaves dismissed tasks alone. --since selects tasks that
    were created then or later.
    """
    filtered = since is not None or error is not None or limit is not None
    if (name is None) is not all_failed or (not all_failed and filtered) or (all_failed and accept_unverified):
        raise typer.BadParameter("give a task or a file, or --all-failed with its filters")
    with opened(allow_http, needs_bucket=False) as parts:
        operator = _operator(parts, dry_run)
        if name is not None:
            tally = operator.retry(name, accept_unverified=accept_unverified)
        else:
            tally = operator.retry_failed(since=since, error=error, limit=limit or MAX_FAILED)
    say_tally(tally, dry_run, as_json, NO_FAILED)


def replay(
    delivery: Annotated[list[int] | None, typer.Argument(help="Numbers of deliveries.", min=1, max=MAX_NUMBER)] = None,
    since: Since = None,
    until: Until = None,
    state: Annotated[
        Literal["unmatched", "rejected", "unreadable", "applied"] | None,
        typer.Option(help="Only deliveries in this state."),
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    allow_http: AllowHttp = False,
) -> None:
    """Apply stored deliveries again, by number or by time of arrival, with today's code. It may be repeated.

    A delivery that was refused for its signature is applied only if today's secrets verify it as of its arrival.
    """
    in_range = since is not None or until is not None
    if bool(delivery) is in_range or (delivery and state):
        raise typer.BadParameter("give deliveries, or --since and --until (and --state)")
    from storage.states import CallbackState

    with opened(allow_http, needs_bucket=False) as parts:
        wanted = CallbackState(state) if state else None
        tally = _operator(parts, dry_run).replay(delivery or (), since=since, until=until, state=wanted)
    say_tally(tally, dry_run, as_json, NO_DELIVERY)


def reconcile(
    external_task_id: Annotated[list[str] | None, typer.Argument(help="Tasks. [default: every unfinished one]")] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Read them in this process, and wait until all are read.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    allow_http: AllowHttp = False,
) -> None:
    """Read tasks at the provider now, without waiting for their next read."""
    with opened(allow_http, asks_provider=True, needs_bucket=wait) as parts:
        operator = _operator(parts, dry_run)
        tally, reads = operator.reconcile(external_task_id or ())
        if wait and not dry_run:
            from rich.console import Console

            from receiver.app.read_now import read_now

            lane = next(lane for lane in parts.lanes() if lane.name == "reads")
            with Console(stderr=True).status(f"reading {counted(len(reads.ids), 'task')}"):
                done = read_now(parts.database, lane, reads, lease_seconds=parts.settings.lease_seconds)
            tally.counts.update(done.counts)
            tally.left.update(done.left)
    say_tally(tally, dry_run, as_json, NO_READ)


def adopt(
    task: Annotated[list[str] | None, typer.Argument(help="Tasks by external id or by the provider's id.")] = None,
    listed_days: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=MAX_DAYS, help="All that the provider lists of the last N days."),
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    allow_http: AllowHttp = False,
) -> None:
    """Take over tasks that were made elsewhere, and archive their files.

    Tasks known here stay as they are, so it may be repeated. It also restores rows after an old backup.
    """
    if bool(task) is (listed_days is not None):
        raise typer.BadParameter("give tasks, or --listed-days N")
    from rich.console import Console

    from receiver.tasks.adopt import Adopter

    with (
        opened(allow_http, migrate=not dry_run, asks_provider=True, needs_bucket=False) as parts,
        Console(stderr=True).status("asking the provider"),
    ):
        adopter = Adopter(parts.database, parts.providers, parts.schedule, parts.read_rate_limit, dry_run=dry_run)
        tally = adopter.take(task) if task else adopter.take_listed(timedelta(days=listed_days or 0))
    say_tally(tally, dry_run, as_json, NO_LISTED)


def dismiss(
    reason: Annotated[str, typer.Option(metavar="TEXT", help="The reason. It is stored with the task.")],
    external_task_id: Annotated[str | None, typer.Argument(help="External id of the task.")] = None,
    delivery: Annotated[
        list[int] | None, typer.Option(metavar="N", max=MAX_NUMBER, help="A delivery that matches no task. Repeatable.")
    ] = None,
    lost: Annotated[
        list[str] | None,
        typer.Option("--object", metavar="KEY", help="A lost object that `receiver audit` names. Repeatable."),
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """End the alarms of a task that cannot be completed. Missing files are given up, archived ones stay.

    A late success still counts, and `receiver retry` brings the task back. A dismissed delivery is still applied when
    its task appears, and `receiver replay` brings it back. A lost object (--object) is an earlier manifest that no one
    has. Audit and export then list it as accepted, until an audit finds it again.
    """
    if sum(map(bool, (external_task_id, delivery, lost))) != 1:
        raise typer.BadParameter("give a task, or deliveries (--delivery), or lost objects (--object)")
    if not reason.strip():
        raise typer.BadParameter("give a reason", param_hint="--reason")
    with opened(starts_store=bool(lost), needs_bucket=bool(lost)) as parts:
        operator = _operator(parts, dry_run)
        if lost:
            tally = operator.accept_losses(parts.bucket, lost, reason)
        elif external_task_id:
            tally = operator.dismiss(external_task_id, reason)
        else:
            tally = operator.dismiss_deliveries(delivery or (), reason)
    say_tally(tally, dry_run, as_json)


def prune(
    older_than: Annotated[
        int, typer.Option(metavar="DAYS", min=1, max=MAX_DAYS, help="Remove what is older than that.")
    ],
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Remove old deliveries, events and request bodies of tasks that are over. Tasks and files stay.

    SQLite keeps the freed space in its file for new rows.
    """
    from rich.console import Console

    from storage.database import checkpoints

    with (
        opened(needs_bucket=False) as parts,
        Console(stderr=True).status("pruning"),
        checkpoints.beside(parts.database),
    ):
        tally = _operator(parts, dry_run).prune(timedelta(days=older_than))
    say_tally(tally, dry_run, as_json, NO_OLD)


def _operator(parts: Parts, dry_run: bool) -> Operator:
    from receiver.tasks.operate import Operator

    return Operator(parts.database, parts.providers, parts.schedule, dry_run=dry_run)
