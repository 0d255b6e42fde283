"""Output about tasks: one with its files and timeline, the newest ones, the state of the work, links."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from receiver.app.findings import start_command
from receiver.app.wiring import Parts
from receiver.cli import terminal
from receiver.cli.terminal import cell, say
from receiver.console import catalogue
from receiver.tasks.task_view import find, is_over, next_step, next_try_of, waiting_of, waits_for
from receiver.web.assets import asset_link
from storage.accounts import pauses
from storage.archive import continuous_audit
from storage.filters import DeliveryFilter, TaskFilter
from storage.keys import as_argument
from storage.operations import deadlines, heartbeats, lists, outbox
from storage.operations.counted import counted
from storage.operations.measures import STORE_ERRORS, Measures, measure, provider_waits, store_waits, waiting_lines
from storage.rows import tasks
from storage.rows.models import Asset, Task
from storage.rows.tasks import request_note
from storage.states import AssetState

POLL_INTERVAL_SECONDS = 0.2
# The worker of `receiver serve --store` is ready 4 to 8 s after the start on a busy host with two cores.
WORKER_START_SECONDS = 30.0
# A wait says what keeps a task once that has lasted for this long: most failed tries are good at the next.
WAITS_SECONDS = 10.0
# Events that are printed, the newest last. `--json` has all.
SHOWN_FAULTS = 20
# Tasks or deliveries of each kind that need a person.
SHOWN_EACH = 5
PROVIDER_ADVICE = "`receiver check` asks the provider, and says what to do; tasks are tried again by themselves"
STORE_ADVICE = "`receiver check` tests the store and the spool folder, and says what to do"


def no_worker(parts: Parts, then: str = "") -> str:
    """Report that no worker is alive, the consequence, and what to do."""
    return f"no worker is alive{then}: start `{start_command(parts.settings)}` (or `receiver work`)"


def await_worker(parts: Parts) -> bool:
    """Whether a worker is alive. Waits for one that is still starting, such as a `receiver serve &` just before."""
    if heartbeats.count_alive(parts.database):
        return True
    start = f"`{start_command(parts.settings)}` (or `receiver work`)"
    say(f"no worker is alive, waiting {WORKER_START_SECONDS:g} s; if none is starting, start {start}", err=True)
    deadline = time.monotonic() + WORKER_START_SECONDS
    while time.monotonic() < deadline:
        time.sleep(POLL_INTERVAL_SECONDS)
        if heartbeats.count_alive(parts.database):
            return True
    return False


def wait(parts: Parts, external_task_id: str) -> Task | None:
    """Wait until the task is over, with a live line on a terminal. None if it is not and no worker is alive."""
    console = Console(stderr=True)
    said: list[str] = []
    told, quiet_until = said, time.monotonic()
    with console.status(cell(f"{external_task_id}: waiting")) as status:
        while True:
            task, assets, _ = find(parts.database, external_task_id)
            if is_over(task):
                return task
            if not await_worker(parts):
                return None
            kept = sum(asset.state is AssetState.ARCHIVED for asset in assets)
            holds = pausing(parts, task)
            if holds != said:
                said = holds
                say(*(holds or ["creates are sent again"]), err=True)
            if not (waits := waits_for(task, assets)):
                quiet_until = time.monotonic() + WAITS_SECONDS
            elif waits != told and time.monotonic() > quiet_until:
                told, quiet_until = waits, time.monotonic() + WAITS_SECONDS
                say(*(f"still waiting, and tried again: {why}" for why in waits), err=True)
            count = f"{kept} of {task.expected or len(assets) or '?'} archived"
            status.update(cell(" · ".join([f"{external_task_id}: {task.state}, {count}", *holds, *waits])))
            time.sleep(POLL_INTERVAL_SECONDS)


def pausing(parts: Parts, task: Task | None = None) -> list[str]:
    """One line for each reason why no creates are sent: pauses of the account, and the disk. `task`: only those that
    hold this task.
    """
    if task is not None and task.queued_at is None:
        return []
    with parts.database.read() as session:
        found = pauses.every(session) if task is None else pauses.holding(session, task)
    shortage = parts.database.shortage()
    disk = [f"{shortage}, so nothing is sent until there is room"] if shortage else []
    return disk + [pauses.line(each) for each in found]


def waiting(parts: Parts) -> list[str]:
    """One line for each answer because of which files or tasks of any origin wait, most frequent first."""
    with parts.database.read() as session:
        return waiting_lines(store_waits(session), provider_waits(session))


def uris(parts: Parts, task: Task) -> list[str]:
    """The s3:// addresses of the task's archived files."""
    _, assets, _ = find(parts.database, task.external_task_id)
    return [parts.bucket.uri(asset.key) for asset in assets if asset.key and asset.state == "archived"]


def urls(parts: Parts, external_task_id: str, expires_seconds: int) -> list[dict[str, Any]]:
    """Links to the task's archived files, each with a description. The holder of a link can read its file.

    `url`: presigned, valid for `expires_seconds` (1 to 604,800). `link`: through our web server without expiry; None
    without a public URL. Raises `NoSuchTask`.
    """
    _, assets, _ = find(parts.database, external_task_id)
    public_url = parts.settings.public_url
    return [
        {
            "kind": asset.kind,
            "index": asset.index,
            "key": asset.key,
            "url": parts.bucket.presigned_get(str(asset.key), expires_seconds=expires_seconds),
            "link": asset_link(parts.tokens, public_url, asset) if public_url else None,
        }
        for asset in assets
        if asset.state is AssetState.ARCHIVED
    ]


def show(parts: Parts, external_task_id: str) -> None:
    """Print one task with its files and its timeline."""
    task, assets, facts = find(parts.database, external_task_id)
    say(f"{task.external_task_id}  {task.state}, archive {task.archive}")
    gone = task.deleted_at and f"deleted at {task.deleted_at:%Y-%m-%d %H:%M:%S} UTC"
    facts_of_task = {"provider id": task.provider_task_id, "units": task.units, "error": task.error}
    for label, value in {**facts_of_task, "note": gone or task.note}.items():
        if value:
            say(f"  {label}: {value}")
    _show_next(parts, task, assets)
    if assets:
        terminal.show(_asset_table(parts, assets))
    if any(asset.state is not AssetState.ARCHIVED and (asset.error or "").startswith(STORE_ERRORS) for asset in assets):
        say(f"  {STORE_ADVICE}")
    for fact in facts:
        say(f"  {fact.at:%Y-%m-%d %H:%M:%S.%f}  {fact.name}")


def _show_next(parts: Parts, task: Task, assets: Sequence[Asset]) -> None:
    """Print what the task waits for, and what keeps it from that."""
    name, at = next_step(parts.database, task, assets)
    if name in ("nothing", "deleted"):
        return
    say(f"  next: {catalogue.text('en', f'next.{name}')}" + (f" ({at:%Y-%m-%d %H:%M:%S} UTC)" if at else ""))
    for line in pausing(parts, task):
        say(f"  {line}")
    if name not in ("parked", "retry") and not heartbeats.count_alive(parts.database):
        say(f"  {no_worker(parts)}")


def _asset_table(parts: Parts, assets: Sequence[Asset]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("file", "state", "bytes", "sha256", "where or why"):
        table.add_column(heading, overflow="fold")
    for asset in assets:
        kept = asset.state is AssetState.ARCHIVED and asset.key is not None
        where = parts.bucket.uri(asset.key or "") if kept else _reason(asset)
        size = f"{asset.size:,}" if asset.size is not None else ""
        cells = (f"{asset.kind} {asset.index}", asset.state, size, (asset.sha256 or "")[:12], where)
        table.add_row(*map(cell, cells))
    return table


def _reason(asset: Asset) -> str:
    """Why a file is not archived, and whether that is final."""
    if (found := waiting_of(asset)) is None:
        next_try = next_try_of(asset)
        return f"next try at {next_try}: {asset.error}" if next_try else asset.error or ""
    tries = counted(found["tries"], "try", "tries")
    return f"not yet, {tries} since {found['since']}, next at {found['next_try_at']}: {asset.error}"


def measured(parts: Parts) -> Measures:
    """The state of the work."""
    lead = deadlines.lead_seconds(parts.settings.result_lifetime_seconds)
    with parts.database.read() as session:
        return measure(session, deadline_seconds=lead, slots=parts.slots)


def audited(parts: Parts) -> continuous_audit.Standing:
    """The state of the continuous audit, with its faults."""
    with parts.database.read() as session:
        return continuous_audit.standing(session)


def summary(found: Measures) -> str:
    """One line about the work: what waits, what is wrong, how callbacks arrive."""
    pauses_of_accounts = [line for account in found.accounts.values() for line in account.pauses]
    parts = [f"{found.due} due", *pauses_of_accounts, *_accounts(found)]
    wrong = (
        (found.overdue, "overdue", "overdue"),
        (found.failed_assets, "file given up", "files given up"),
        (found.unmatched, "delivery unmatched", "deliveries unmatched"),
        (found.unusable_files, "file unusable and still tried", "files unusable and still tried"),
        (found.deadline_near, "near its deadline", "near their deadline"),
        (found.audit_faults, "audit fault", "audit faults"),
    )
    parts += [counted(*each) for each in wrong if each[0]]
    parts += waiting_lines(found.store_waits, found.provider_waits)
    parts += ["audit behind its days"] if found.audit_late else []
    parts += _sinks(found)
    parts.append(
        f"last 24 h: {found.archived_day} archived, {found.incomplete_day} incomplete, {found.failed_day} failed"
    )
    if found.callbacks_expected:
        lost = f"callbacks: {found.callbacks_lost} of {found.callbacks_expected} lost ({found.callback_loss_rate:.0%})"
        parts.append(lost + (f", {found.callbacks_late} late" if found.callbacks_late else ""))
    return " · ".join(parts)


def _accounts(found: Measures) -> Iterator[str]:
    for name, account in found.accounts.items():
        waits = counted(account.tasks_queued, "task waits", "tasks wait")
        if account.slot_limit is not None:
            yield f"{name}: {account.slots_held} of {counted(account.slot_limit, 'slot')} held, {waits}"
        elif account.tasks_queued:
            yield f"{name}: {waits} in the queue"


def _sinks(found: Measures) -> Iterator[str]:
    if unnumbered := found.events_open - sum(s.events_open for n, s in found.sinks.items() if n != outbox.CLIENTS):
        yield f"events without a number: {unnumbered}"
    for name, sink in found.sinks.items():
        dead = f", {sink.events_dead} given up" if sink.events_dead else ""
        yield f"events to {name}: {sink.events_open} wait{dead}"


def _concerned(parts: Parts, found: Measures) -> Iterator[str]:
    """One line for each kind of rows that need a person, with the newest of them."""
    lead = deadlines.lead_seconds(parts.settings.result_lifetime_seconds)
    kinds = (
        ("files given up", found.failed_assets, "failed"),
        ("files tried again", found.unusable_files or found.store_waits, "waiting"),
        ("near their deadline", found.deadline_near, "expiring"),
    )
    with parts.database.read() as session:
        for words, count, files in kinds:
            if count:
                page = lists.newest_tasks(session, TaskFilter(files=files), None, SHOWN_EACH, lead_seconds=lead)
                yield _line(words, [as_argument(task.external_task_id) for task in page.rows], page)
        if found.unmatched:
            page = lists.newest_deliveries(session, DeliveryFilter(state="unmatched"), None, SHOWN_EACH)
            yield _line("deliveries unmatched", [str(row.id) for row, *_ in page.rows], page)


def _line(words: str, names: Sequence[str], page: lists.Page) -> str:
    return f"  {words}: {' '.join(names)}{' …' if page.further else ''}"


def show_latest(parts: Parts, limit: int) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("external id", "state", "archive", "created", "error"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "created")
    with parts.database.read() as session:
        newest = tasks.newest(session, limit)
    for task in newest:
        created = f"{task.created_at:%Y-%m-%d %H:%M:%S}"
        why = task.error or ("" if request_note(task) else task.note or "")
        cells = (task.external_task_id, task.state, task.archive, created, why)
        table.add_row(*map(cell, cells))
    terminal.show(table)
    found = measured(parts)
    say(summary(found))
    if found.store_waits:
        say(STORE_ADVICE)
    if found.provider_waits:
        say(PROVIDER_ADVICE)
    if shortage := parts.database.shortage():
        say(f"callbacks are answered 503: {shortage}")
    say(*_concerned(parts, found))
    for fault in audited(parts).findings[-SHOWN_FAULTS:]:
        say(f"  {fault['kind']}  {fault['key']}")
