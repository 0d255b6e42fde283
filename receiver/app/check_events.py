"""Checks whether events could reach their sinks, and results the gateway's clients. Nothing is sent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing

from sqlalchemy import func
from sqlmodel import col, select

from receiver.app.findings import Result, Status
from receiver.app.wiring import Parts
from receiver.base.config import Settings
from receiver.base.sink_setting import Entry
from receiver.events.dispatcher import Unsure
from receiver.events.make import make
from receiver.providers.base import plain
from storage.errors import GiveUp, Retry
from storage.fetch.addresses import host_of
from storage.keys import as_argument
from storage.operations import heartbeats, measures, outbox
from storage.operations.counted import counted
from storage.rows.models import Dispatch

# What to do about a sink that cannot be reached, by kind.
SINK_ADVICE = {
    "webhook": "correct it in RECEIVER_EVENT_SINKS; a receiver of your own network belongs on "
    "RECEIVER_PRIVATE_EVENT_HOSTS as HOST:PORT",
    "sqs": "correct the queue's URL in RECEIVER_EVENT_SINKS, or the credentials and the region that boto3 finds",
    "file": "it needs a folder that this user may write to; make that, or correct RECEIVER_EVENT_SINKS",
    "stdout": "",
}
GRANT = "grant sqs:GetQueueAttributes so that the queue can be checked; sending needs sqs:SendMessage alone"
HANGING = "check its address in RECEIVER_EVENT_SINKS, and that no firewall is in between"
PROXY_VARIABLES = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"}
MAX_LINE_CHARS = 300
# Of events that were given up for a sink that was removed: no worker sends them again.
REMOVED = "RECEIVER_EVENT_SINKS has no sink of this name: give it to one, or let `receiver prune` remove them in time"


def name_of(entry: Entry) -> str:
    return f"events to {entry.name}"


def sink(entry: Entry, parts: Parts) -> Iterator[Result]:
    """Check whether events could be delivered to this sink from here."""
    name, settings = name_of(entry), parts.settings
    try:
        tunnel = settings.egress_proxy.connect if settings.egress_proxy else None
        with closing(make(entry, settings.event_policy, settings.event_secrets, tunnel)) as made:
            yield Result(name, Status.OK, made.check())
    except Unsure as error:
        yield Result(name, Status.NOTE, f"may not be checked ({error})", GRANT)
    except (Retry, GiveUp) as error:
        line = plain(f"cannot be reached ({error})", MAX_LINE_CHARS)
        yield Result(name, Status.FAULT, line, SINK_ADVICE[entry.kind])


def numbers(parts: Parts) -> Iterator[Result]:
    """Check that workers number events. Without a number no sink and no reader gets an event."""
    with parts.database.read() as session:
        fault = measures.unnumbered_fault(session)
    if not fault:
        return
    if heartbeats.count_alive(parts.database):
        advice = "look for `worker.step_failed` in the workers' log, and for a program that holds the row of `counter`"
        yield Result("events", Status.FAULT, fault, advice)
    else:
        yield Result("events", Status.NOTE, fault, "workers number them, and none is alive")


def undelivered(parts: Parts) -> Iterator[Result]:
    """Check which sinks did not take their events, and the last answer of each. Without the clients of the gateway."""
    known = {each.sink for each in parts.subscriptions}
    kinds = {
        outbox.IS_DEAD: ("given up", "repair that receiver, then `receiver events redeliver --all-dead --sink {}`"),
        outbox.IS_OPEN & col(Dispatch.error).is_not(None): ("waiting", "repair that receiver; they are sent again"),
    }
    with parts.database.read() as session:
        for condition, (words, advice) in kinds.items():
            # The limit, which nothing reaches, holds SQLite to the index of the condition.
            rows = select(Dispatch.sink, Dispatch.id).where(condition).limit(2**62).subquery().c
            newest = select(rows.sink, func.count(), func.max(rows.id)).group_by(rows.sink)
            for name, count, dispatch in session.execute(newest.where(rows.sink != outbox.CLIENTS)).all():
                if words == "waiting" and name not in known:
                    continue  # see `left_behind`
                error = session.execute(select(Dispatch.error).where(col(Dispatch.id) == dispatch)).scalar_one()
                line = plain(f"{counted(count, 'event')} {words}, the newest after: {error}", MAX_LINE_CHARS)
                then = advice.format(as_argument(name)) if name in known else REMOVED
                yield Result(f"events to {name}: {words}", Status.NOTE, line, then)


def left_behind(parts: Parts) -> Iterator[Result]:
    """Check for events of sinks that were renamed or removed while these waited: no worker sends them."""
    known = {each.sink for each in parts.subscriptions}
    rows = select(Dispatch.sink).where(outbox.IS_OPEN).limit(2**62).subquery().c  # the limit: as above
    with parts.database.read() as session:
        counts = session.execute(select(rows.sink, func.count()).group_by(rows.sink).order_by(rows.sink)).all()
    for name, count in counts:
        if name not in known:
            line = f"{counted(count, 'event')} waiting, and RECEIVER_EVENT_SINKS has no sink of this name"
            advice = (
                f"give a sink this name, which then gets them, or run `receiver events disable {as_argument(name)}`"
            )
            yield Result(f"events to {name}: waiting", Status.FAULT, line, advice)


def disabled(parts: Parts) -> Iterator[Result]:
    """Check which sinks of the setting get no events. A sink that answered 410 may accept them again."""
    with parts.database.read() as session:
        reasons = outbox.disabled(session)
    for name in [entry.name for entry in parts.settings.event_entries if entry.name in reasons]:
        line = plain(f"disabled, so no event is queued for it: {reasons[name]}", MAX_LINE_CHARS)
        advice = f"`receiver events enable {as_argument(name)}`, or take it from RECEIVER_EVENT_SINKS"
        yield Result(f"events to {name}: disabled", Status.FAULT, line, advice)


def proxies(settings: Settings) -> Iterator[Result]:
    """Check for proxy variables in the environment. Only boto3 uses them."""
    if names := sorted({name.upper() for name in os.environ if name.upper() in PROXY_VARIABLES and os.environ[name]}):
        line = f"{', '.join(names)} of the environment: used for bucket and SQS, ignored for provider, files, webhooks"
        advice = "" if settings.egress_proxy else "set RECEIVER_EGRESS_PROXY if they are reached through a proxy alone"
        yield Result("proxy", Status.NOTE, line, advice)


def callbacks(settings: Settings) -> Iterator[Result]:
    """Check RECEIVER_PRIVATE_CALLBACK_HOSTS, to which clients may be called back."""
    refused = settings.callback_policy.sinks
    for host in settings.private_callback_hosts:
        if host_of(f"http://{host}") in refused:
            line = f"{host} is a host that events go to: clients are never called back there, on no port"
            advice = "take it from the list, or give the receiver of events another host name"
            yield Result("RECEIVER_PRIVATE_CALLBACK_HOSTS", Status.FAULT, line, advice)


def gateway(settings: Settings) -> Iterator[Result]:
    """Check whether clients of the gateway get links that last."""
    if not settings.api_keys:
        return
    if settings.public_url:
        yield Result("gateway", Status.OK, f"clients ask {settings.public_url}/kling")
        return
    days = settings.result_lifetime_seconds / 86_400
    line = f"is on, and RECEIVER_PUBLIC_URL is not set: clients get the provider's links, which die after {days:g} days"
    advice = "set it to the https address at which clients reach us, for links that last"
    yield Result("gateway", Status.NOTE, line, advice)
