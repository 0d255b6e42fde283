"""The sink for the gateway's clients. Each is called back in Kling's format at the URL that its create named.

Other sinks have one receiver. Here every host has a circuit of its own, and threads are shared between hosts and
clients, so a slow or unreachable host delays no other.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from urllib.parse import urlsplit

from pydantic import SecretStr
from sqlmodel import col, select

from receiver.base.signature import Signer, client_secret
from receiver.events.dispatcher import Message, NotTried, Outcome, SinkGone, SinkRefused, SinkUnavailable
from receiver.events.http_post import Poster
from receiver.gateway.answers import ENDS_OF_ARCHIVE, STATUS_OF_EVENT, ResponseFormat, Results, callback_body
from receiver.gateway.callback_turns import CallbackTurns
from storage.circuit import Circuit
from storage.database.sessions import Database
from storage.errors import GiveUp, Retry
from storage.operations import outbox
from storage.rows import tasks
from storage.rows.events import EventName
from storage.rows.models import Event, Task

NAME = outbox.CLIENTS
NAMESPACE = uuid.UUID("4c0f6a55-2f0e-4f0c-9f0b-6b7d1d1c3f9e")
MEDIA_TYPE = "application/json; charset=utf-8"
THREADS = 8
# A third of the time that an operator's own receiver has. A client that works longer should answer first.
TIMEOUT_SECONDS = 5.0
# An answer that takes longer counts as a failure of its host, like no answer.
SLOW_SECONDS = 2.5
# A host without a success for this long is not expected back soon: its callbacks follow the schedule, at whose end they
# are given up. Until then they are sent within half a minute of its return, and count no try that was not made.
LONG_DOWN_SECONDS = 3_600.0
# Hosts with a circuit. If a client invents more host names, only the outages of other hosts are forgotten.
MAX_HOSTS = 1_000


def callback_id(event_id: str) -> str:
    """The `webhook-id` of a callback. It differs from the event's id, because a receiver that drops known ids would
    otherwise drop one of the two.
    """
    return str(uuid.uuid5(NAMESPACE, event_id))


def events(results: Results) -> frozenset[str]:
    """The events that may concern a client; `callback_body` decides.

    A client that gets the provider's success gets no event at the end of the archive. Queuing it was two transactions a
    task.
    """
    ends = ENDS_OF_ARCHIVE if results == "archived" else ()
    return frozenset(str(name) for name in (*STATUS_OF_EVENT, *ends))


@dataclass
class _Host:
    """`down_since`: the first failure since the last success, in monotonic seconds."""

    circuit: Circuit = field(default_factory=Circuit)
    down_since: float | None = None

    @property
    def is_long_down(self) -> bool:
        return self.down_since is not None and time.monotonic() - self.down_since >= LONG_DOWN_SECONDS


class Clients:
    """A `dispatcher.Sink`. Signed if there are `secrets`, with a secret of the client derived from each. Kling's own
    callbacks are not signed, so clients do not require it.
    """

    batch = 1
    threads = THREADS

    def __init__(
        self, database: Database, poster: Poster, secrets: Sequence[SecretStr], response_format: ResponseFormat
    ) -> None:
        self._database = database
        self._poster = poster
        self._secrets = secrets
        self._response_format = response_format
        self._turns = CallbackTurns(THREADS)
        self._hosts: dict[str, _Host] = {}
        self._lock = threading.Lock()

    def send(self, messages: Sequence[Message]) -> list[Outcome]:
        return [self._send(message) for message in messages]

    def _send(self, message: Message) -> Outcome:
        task, body = self._task_and_body(message.event)
        if body is None or task is None or not task.client_callback_url:
            return None  # nothing new for the client
        host, client = urlsplit(task.client_callback_url).netloc, task.client or ""
        if wait := self._turns.begin(host, client):
            return NotTried("others are before it", after=wait)
        began = time.monotonic()
        try:
            headers = self._headers(task.client, message, body)
            return self._post(task.client_callback_url, host, client, body, headers)
        finally:
            self._turns.end(host, client, time.monotonic() - began)

    def _headers(self, client: str | None, message: Message, body: bytes) -> dict[str, str]:
        # A task without a client was made before clients had secrets of their own.
        secrets = [client_secret(secret, client) for secret in self._secrets] if client else self._secrets
        signed = Signer(secrets).headers(callback_id(message.id), body, datetime.now(UTC))
        return {"Content-Type": MEDIA_TYPE, **signed}

    def _post(self, url: str, name: str, client: str, body: bytes, headers: Mapping[str, str]) -> Outcome:
        host = self._host(name)
        with host.circuit.grant(1) as grant:
            if not grant.count:
                kind = SinkUnavailable if host.is_long_down else NotTried
                return kind("its host is down", after=self._turns.put_off_longest(client))
            began = time.monotonic()
            try:
                outcome = self._poster.post(url, body, headers).outcome()
            except (Retry, GiveUp) as error:
                outcome = error
            if isinstance(outcome, Retry) or time.monotonic() - began > SLOW_SECONDS:
                host.circuit.failed()
            elif outcome is None or isinstance(outcome, SinkGone):
                host.circuit.succeeded()  # a refusal of one message says nothing about the host
            if isinstance(outcome, Retry):
                host.down_since = host.down_since or began
            elif outcome is None or isinstance(outcome, SinkGone):  # also a slow one
                host.down_since = None
        # A 410 concerns this URL alone.
        return SinkRefused(str(outcome)) if isinstance(outcome, SinkGone) else outcome

    def _task_and_body(self, event: Event) -> tuple[Task | None, bytes | None]:
        """The task, and the body that tells its client about this event. None also for an event of an earlier, refused
        create with the same id, whose client has its answer.
        """
        with self._database.read() as session:
            task = session.get(Task, event.task_id)
            if task is None:
                return None, None
            of_task = select(Event.id, Event.seq, Event.name).where(Event.task_id == task.id)
            every = session.exec(of_task.order_by(col(Event.seq))).all()
            if any(name == EventName.TASK_CREATED and (number or 0) > (event.id or 0) for number, _, name in every):
                return task, None
            earlier = [name for _, seq, name in every if seq is not None and seq < (event.seq or 0)]
            assets = tasks.assets_of(session, task.id)
        return task, callback_body(
            task, assets, event.name, at=event.at, earlier=earlier, response_format=self._response_format
        )

    def _host(self, name: str) -> _Host:
        with self._lock:
            while name not in self._hosts and len(self._hosts) >= MAX_HOSTS:
                self._hosts.pop(next(iter(self._hosts)))
            return self._hosts.setdefault(name, _Host())

    def check(self) -> str:
        return "each client's own address"

    def close(self) -> None:
        self._poster.close()
