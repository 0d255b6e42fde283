"""A gateway's clients: each is called back in Kling's words at the address it gave with its task.

Unlike the other sinks it is many: every host has a circuit of its own, so that one that is down holds up nobody else.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from urllib.parse import urlsplit

from sqlmodel import col, select

from receiver.base.signature import Signer
from receiver.events.dispatcher import Message, NotTried, Outcome, SinkGone, SinkRefused
from receiver.events.http_post import Poster
from receiver.gateway.answers import ENDS_OF_ARCHIVE, STATUS_OF_EVENT, ResponseFormat, callback_body
from storage.circuit import PAUSE_CAP_SECONDS, Circuit
from storage.errors import GiveUp, Retry
from storage.rows import tasks
from storage.rows.database import Database
from storage.rows.models import Event, Task

NAME = "client"
# The facts that may tell a client something; `callback_body` says which do.
EVENTS = frozenset(str(name) for name in (*STATUS_OF_EVENT, *ENDS_OF_ARCHIVE))
MEDIA_TYPE = "application/json; charset=utf-8"
THREADS = 4
# Of hosts; whoever makes up more names than that only loses the memory of which of them were down.
MAX_CIRCUITS = 1_000


class Clients:
    """A `dispatcher.Sink`. Signed when there are secrets: Kling's own callbacks are not, and clients know that."""

    batch = 1
    threads = THREADS

    def __init__(self, database: Database, poster: Poster, signer: Signer, response_format: ResponseFormat) -> None:
        self._database = database
        self._poster = poster
        self._signer = signer
        self._response_format = response_format
        self._circuits: dict[str, Circuit] = {}
        self._lock = threading.Lock()

    def send(self, messages: Sequence[Message]) -> list[Outcome]:
        return [self._send(message) for message in messages]

    def _send(self, message: Message) -> Outcome:
        task, body = self._told(message.event)
        if body is None or task is None or not task.client_callback_url:
            return None  # nothing new to tell
        url = task.client_callback_url
        circuit = self._circuit(urlsplit(url).netloc)
        with circuit.grant(1) as grant:
            if not grant.count:
                return NotTried("its host is down", after=PAUSE_CAP_SECONDS)
            headers = {"Content-Type": MEDIA_TYPE, **self._signer.headers(message.id, body, datetime.now(UTC))}
            return self._post(circuit, url, body, headers)

    def _post(self, circuit: Circuit, url: str, body: bytes, headers: Mapping[str, str]) -> Outcome:
        try:
            with circuit.watching(Retry, SinkGone):
                outcome = self._poster.post(url, body, headers).outcome()
                if outcome is not None:
                    raise outcome
        except SinkGone as error:
            return SinkRefused(str(error))  # it speaks for this address alone
        except (Retry, GiveUp) as error:
            return error
        return None

    def _told(self, event: Event) -> tuple[Task | None, bytes | None]:
        """The task, and what its client is to be told of this fact."""
        with self._database.read() as session:
            task = session.get(Task, event.task_id)
            if task is None:
                return None, None
            before = select(Event.name).where(Event.task_id == task.id, col(Event.seq) < event.seq)
            earlier = list(session.exec(before.order_by(col(Event.seq))))
            assets = tasks.assets_of(session, task.id)
        return task, callback_body(
            task, assets, event.name, at=event.at, earlier=earlier, response_format=self._response_format
        )

    def _circuit(self, host: str) -> Circuit:
        with self._lock:
            while host not in self._circuits and len(self._circuits) >= MAX_CIRCUITS:
                self._circuits.pop(next(iter(self._circuits)))
            return self._circuits.setdefault(host, Circuit())

    def look(self) -> str:
        return "each client's own address"

    def close(self) -> None:
        self._poster.close()
