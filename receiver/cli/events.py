"""`receiver events`: list deliveries to sinks, deliver again, follow events, enable and disable sinks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from receiver.cli.opening import opened
from receiver.cli.options import MAX_NUMBER, DryRun, Json
from receiver.cli.terminal import MAX_SHOWN, cell, say, say_counts, say_json, show
from storage.keys import as_argument

if TYPE_CHECKING:
    from sqlmodel import Session

    from receiver.app.wiring import Parts
    from storage.rows.models import Dispatch, Event

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Events to sinks: list, redeliver, tail, enable, disable."
)

# Events that `tail` prints first, like the lines of tail(1).
TAIL = 10
PAGE = 200
# How often `tail --follow` reads new events.
FOLLOW_SECONDS = 0.5

Sink = Annotated[str | None, typer.Option(metavar="NAME", help="Only deliveries to this sink.")]
Types = Annotated[
    str, typer.Option(metavar="PATTERNS", help="Only events of these names, as in task.*,asset.archived.")
]


@app.command("list")
def list_(
    dead: Annotated[bool, typer.Option("--dead", help="Only deliveries that were given up.")] = False,
    is_open: Annotated[bool, typer.Option("--open", help="Only deliveries that are not finished.")] = False,
    sink: Sink = None,
    limit: Annotated[int, typer.Option(help="List at most this many deliveries.", min=1, max=100_000)] = 100,
    as_json: Json = False,
) -> None:
    """List deliveries that are open or dead, with their last error. Exit code 1 if there are dead ones."""
    from storage.operations import outbox
    from storage.states import DispatchState

    wanted = [DispatchState.DEAD] * (dead or not is_open) + [DispatchState.DUE] * (is_open or not dead)
    with opened(needs_bucket=False) as parts, parts.database.read() as session:
        found = [
            _shown(*each)
            for state in wanted
            for each in outbox.dispatches(session, state=state, sink=sink, limit=limit)
        ]
        disabled = outbox.disabled(session)
        unknown = sorted({str(each["sink"]) for each in found} - parts.sinks.keys())
    if as_json:
        say_json({"deliveries": found, "disabled": disabled, "unknown": unknown}, indent=1)
    else:
        _table(found)
        _explain(disabled, unknown)
    if any(each["state"] == DispatchState.DEAD for each in found):
        raise typer.Exit(1)


def _shown(row: Dispatch, event: Event, external_task_id: str | None) -> dict[str, object]:
    due_at = row.due_at.isoformat() if row.due_at else None
    return {
        "id": row.id,
        "sink": row.sink,
        "state": row.state,
        "event": event.name,
        "seq": event.seq,
        "external_task_id": external_task_id,
        "tries": row.tries,
        "due_at": due_at,
        "error": row.error,
    }


def _table(found: Sequence[dict[str, object]]) -> None:
    from rich.table import Table

    if not found:
        say("nothing is open and nothing is dead")
        return
    table = Table("id", "sink", "state", "event", "task", "tries", "due", "error", box=None, pad_edge=False)
    for each in found:
        names = ("id", "sink", "state", "event", "external_task_id", "tries", "due_at", "error")
        table.add_row(*(cell(str(each[name] if each[name] is not None else "")) for name in names))
    show(table)


def _explain(disabled: dict[str, str], unknown: Sequence[str]) -> None:
    for name, reason in disabled.items():
        say(f"{name} is disabled: {reason}; `receiver events enable {as_argument(name)}` queues for it again", err=True)
    for name in unknown:
        say(
            f"{name} is not in RECEIVER_EVENT_SINKS; `receiver events disable {as_argument(name)}` gives it up",
            err=True,
        )


@app.command()
def redeliver(
    number: Annotated[
        list[int] | None, typer.Argument(metavar="[ID]...", max=MAX_NUMBER, help="Numbers of deliveries in `list`.")
    ] = None,
    all_dead: Annotated[bool, typer.Option("--all-dead", help="All deliveries that were given up.")] = False,
    sink: Sink = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Deliver again, as if for the first time: these, or all dead ones (of one sink with --sink).

    The id of each event stays the same, so receivers recognise it. Events of a disabled sink are left alone.
    """
    if bool(number) is all_dead or (number and sink):
        raise typer.BadParameter("give numbers, or --all-dead (and --sink)")
    from receiver.tasks.changes import change
    from storage.operations import outbox

    count, seen, sinks = 0, set[int](), set[str]()
    with opened(needs_bucket=False) as parts:
        known = sorted(each.sink for each in parts.subscriptions)
        for page in outbox.pages_to_redeliver(parts.database, number or [], sink, PAGE):
            with change(parts.database, dry_run=dry_run) as session:
                count += outbox.redeliver(session, page)
            seen |= {row.id or 0 for row in page}
            sinks |= {row.sink for row in page}
        with parts.database.read() as session:
            disabled = {name: why for name, why in outbox.disabled(session).items() if name in sinks}
    missing = sorted(set(number or []) - seen)
    _print_counts({"redelivered": count, "missing": missing}, dry_run, as_json)
    for each in missing[:MAX_SHOWN]:
        say(f"{each}: no such delivery", err=True)
    _explain(disabled, sorted(sinks.difference(known)))
    if not count and not missing and not disabled and not as_json:
        say(_why_none(sink, known, all_dead=all_dead), err=True)
    if missing or (disabled and not count):
        raise typer.Exit(1)


def _why_none(sink: str | None, known: Sequence[str], *, all_dead: bool) -> str:
    """Why nothing was delivered again, and what to do."""
    if not all_dead:
        return "these are on their way this moment; `receiver events list --open` shows them"
    if sink and sink not in known:
        return (
            f"nothing for {sink!r} was given up, and there is no such sink; known sinks: {', '.join(known) or 'none'}"
        )
    return "nothing was given up; give the numbers of `receiver events list` for others"


@app.command()
def tail(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Continue until interrupted.")] = False,
    after: Annotated[
        int | None, typer.Option(metavar="NUMBER", help="Print all events after this number.", min=0, max=MAX_NUMBER)
    ] = None,
    types: Types = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one CloudEvent a line.")] = False,
) -> None:
    """Print events in the order in which they happened: the last ones, or all after a number."""
    import time

    from receiver.base.sink_setting import names_matching
    from storage.rows import events

    try:
        names = names_matching(word for word in types.split(",") if word)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--types") from None
    with opened(needs_bucket=as_json) as parts:  # an event in JSON names the bucket
        with parts.database.read() as session:
            last = after if after is not None else _before_the_last(session, TAIL)
        while True:
            with parts.database.read() as session:
                found = events.page(session, last, PAGE, names)
            for event, subject in found.events:
                _print(parts, event, subject, as_json)
            is_end, last = found.until == last, found.until
            if is_end and not follow:
                return
            if is_end:
                time.sleep(FOLLOW_SECONDS)


def _before_the_last(session: Session, count: int) -> int:
    """The number before the last `count` events. Numbers skip some after a restore."""
    from sqlmodel import col, select

    from storage.rows.models import Event

    number = col(Event.seq)
    return session.exec(select(number).where(number.is_not(None)).order_by(number.desc()).offset(count)).first() or 0


def _print(parts: Parts, event: Event, subject: str | None, as_json: bool) -> None:
    if as_json:
        say(parts.envelope.encode(event, subject).decode())
    else:
        say(f"{event.seq}  {event.at:%Y-%m-%d %H:%M:%S}  {event.name}  {subject or ''}".rstrip())


@app.command()
def enable(name: Annotated[str, typer.Argument(help="Name of the sink.")], as_json: Json = False) -> None:
    """Queue events for a disabled sink again, from now on. `redeliver --all-dead --sink` sends those given up.

    Those since it was disabled are never sent: `tail --after NUMBER --json` prints them.
    """
    from storage.operations import outbox

    with opened(needs_bucket=False) as parts, parts.database.write() as session:
        done = outbox.enable(session, name)
    _print_counts({"enabled": int(done)}, False, as_json)
    if not done:
        say(f"{name}: no such disabled sink", err=True)
        raise typer.Exit(1)


@app.command()
def disable(
    name: Annotated[str, typer.Argument(help="Name of the sink.")],
    reason: Annotated[str, typer.Option(metavar="TEXT", help="The reason. It is stored with the sink.")] = "by hand",
    as_json: Json = False,
) -> None:
    """Queue nothing more for a sink, and give up its queued events. Works for a sink that is no longer configured."""
    from storage.operations import outbox

    with opened(needs_bucket=False) as parts:
        _check_name(parts, name)
        with parts.database.write() as session:
            outbox.disable(session, name, reason)
        dead = outbox.end_disabled(parts.database)
    _print_counts({"disabled": 1, "given_up": dead}, False, as_json)


@app.command("client-secret")
def client_secret_(as_json: Json = False) -> None:
    """Print the secrets that sign the callbacks of each of RECEIVER_API_KEYS, for the holder of that key."""
    from receiver.base.signature import client_secret
    from receiver.gateway.api_keys import client_of

    with opened(needs_bucket=False, ready=False) as parts:  # also before an upgrade: clients need theirs by then
        keys, secrets = parts.settings.api_keys, parts.settings.event_secrets
    if not keys or not secrets:
        say("callbacks are signed once RECEIVER_API_KEYS and RECEIVER_EVENT_SECRETS are set", err=True)
        raise typer.Exit(1)
    clients = dict.fromkeys(client_of(key.get_secret_value()) for key in keys)
    made = [
        {"client": client, "secrets": [client_secret(secret, client).get_secret_value() for secret in secrets]}
        for client in clients
    ]
    if as_json:
        say_json(made, indent=1)
        return
    for place, each in enumerate(made, 1):
        say(f"client {place} of RECEIVER_API_KEYS: {' '.join(each['secrets'])}")


def _check_name(parts: Parts, name: str) -> None:
    """A misspelt name would disable nothing, and make /readyz degraded because of a sink that does not exist."""
    from storage.operations import outbox

    known = {each.sink for each in parts.subscriptions}
    if name in known:
        return
    with parts.database.read() as session:
        known |= outbox.remembered(session)
    if name not in known:
        raise typer.BadParameter(f"no sink is called {name!r}; known sinks: {', '.join(sorted(known))}")


def _print_counts(counts: dict[str, object], dry_run: bool, as_json: bool) -> None:
    if as_json:
        say_json({**counts, "dry_run": dry_run})
        return
    say_counts({name: count for name, count in counts.items() if isinstance(count, int)}, dry_run)
