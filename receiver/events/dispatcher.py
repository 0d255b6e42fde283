"""Delivering events: claimed dispatches become messages, a sink sends them, the rows note the outcome.

    dispatch (claimed) ─▶ CloudEvent ─▶ Sink.send ─┬─ None ─────────▶ delivered, the task's next one is due
                                                   ├─ Retry ────────▶ due by the schedule; after its end: dead
                                                   ├─ NotTried ─────▶ due again, not counted as a try
                                                   └─ GiveUp ───────▶ dead (SinkGone: the sink is disabled)

Delivery is at least once: after a crash between sending and settling the message is sent again under the same id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog
from sqlmodel import Session, col, select

from receiver.base.retry_schedule import retry_delay
from receiver.events.cloudevents import Envelope, event_id
from storage.circuit import Circuit
from storage.database.sessions import Database
from storage.errors import GiveUp, LostClaim, Retry
from storage.operations import outbox
from storage.rows import claims
from storage.rows.models import Dispatch, Event, Task

log = structlog.get_logger()


class SinkUnavailable(Retry):
    """The sink is down or slow, or answered that it did not accept the message."""


class SinkSilent(SinkUnavailable):
    """There was no answer. The messages behind this one would wait as long."""


class NotTried(Retry):
    """The message was held back and not sent. `after`: seconds until it may be tried, None = at once."""


class SinkRefused(GiveUp):
    """This message will never be accepted."""


class Unsure(GiveUp):
    """Whether the sink would accept a message cannot be found out without sending one."""


class SinkGone(GiveUp):
    """The sink wants no more messages (410)."""


@dataclass(frozen=True)
class Message:
    """One event for one sink. `id`: the same at every try. `body`: a CloudEvent as one line of UTF-8 JSON."""

    id: str
    event: Event
    external_task_id: str | None
    body: bytes = field(repr=False)

    @property
    def group(self) -> str:
        """Messages of one group are delivered in order: the task's, or the message alone if it has no task."""
        return str(self.event.task_id or self.id)


Outcome = Exception | None


class Sink(Protocol):
    """A destination of events. Safe to share between threads.

    `batch`: the most messages of one call, no two of the same task. `threads`: how many parallel calls are useful.
    """

    @property
    def batch(self) -> int: ...

    @property
    def threads(self) -> int: ...

    def send(self, messages: Sequence[Message]) -> Sequence[Outcome]:
        """Send each message within a bounded time, and return the outcomes in their order.

        None: the receiver has it for good. `Retry`: perhaps later. `NotTried`: it was not sent. `GiveUp`: never. An
        exception raised instead is a bug.
        """
        ...

    def check(self) -> str:
        """Check within a bounded time whether messages could be delivered, without delivering any.

        Returns a line for people. Raises `Retry` or `GiveUp` as `send` would return them, and `Unsure` if only a
        message would tell.
        """
        ...

    def close(self) -> None: ...


class Dispatcher:
    """The work of one sink's lane.

    `name`: the sink's. `retry_seconds`: from each failed try to the next. `circuit`: the lane's; None for a sink with
    many receivers (every gateway client is one).
    """

    def __init__(
        self,
        database: Database,
        name: str,
        sink: Sink,
        envelope: Envelope,
        *,
        retry_seconds: Sequence[float],
        circuit: Circuit | None = None,
    ) -> None:
        self._database = database
        self._name = name
        self._sink = sink
        self._envelope = envelope
        self._retry_seconds = retry_seconds
        self._circuit = circuit

    def work(self, row: Dispatch) -> None:
        self.work_many([row])

    def work_many(self, rows: list[Dispatch]) -> None:
        """Send these claimed dispatches, and settle them in one transaction, which other threads share."""
        with self._database.read() as session:
            found = self._messages(session, rows)
        sendable = [row for row in rows if row.id in found and row.losses < claims.PARK_LOSSES]
        outcomes = self._sink.send([found[row.id] for row in sendable]) if sendable else []
        self._count(outcomes)
        known = {row.id: outcome for row, outcome in zip(sendable, outcomes, strict=True)}
        ends = [(row, known.get(row.id, _unsendable(row))) for row in rows]

        def settle(session: Session) -> list[str]:
            self._database.wake(session)
            return [self._settle(session, row, outcome) for row, outcome in ends]

        done = self._database.write_in_group(settle, task_id=rows[0].task_id)
        for (row, outcome), word in zip(ends, done, strict=True):
            if word == "dead":
                log.error("event.dead_lettered", sink=self._name, dispatch=row.id, tries=row.tries + 1,
                          error=str(outcome))  # fmt: skip
        counts = {word: done.count(word) for word in sorted({*done})}
        if [*counts] == ["put_off"]:  # messages of a slow host are postponed many times
            log.debug("events.deferred", sink=self._name, **counts)
        else:
            log.info("events.sent", sink=self._name, **counts)
        self._end_if_gone(outcomes)

    def _messages(self, session: Session, rows: Sequence[Dispatch]) -> dict[int | None, Message]:
        wanted = select(Event, Task.external_task_id).outerjoin(Task, col(Task.id) == col(Event.task_id))
        found = session.exec(wanted.where(col(Event.id).in_([row.event_id for row in rows])))
        by_id = {event.id: (event, external_id) for event, external_id in found}
        return {row.id: self._message(*by_id[row.event_id]) for row in rows if row.event_id in by_id}

    def _message(self, event: Event, external_task_id: str | None) -> Message:
        return Message(event_id(event), event, external_task_id, self._envelope.encode(event, external_task_id))

    def _count(self, outcomes: Sequence[Outcome]) -> None:
        """Count the outcome in the circuit. A refusal of one message does not count: it may have been refused before
        sending.
        """
        for outcome in outcomes if self._circuit else ():
            assert self._circuit is not None
            if outcome is None or isinstance(outcome, SinkGone):
                self._circuit.succeeded()
            elif isinstance(outcome, Retry) and not isinstance(outcome, NotTried):
                self._circuit.failed()

    def _settle(self, session: Session, row: Dispatch, outcome: Outcome) -> str:
        """Write the outcome to the row. Returns its name for the log."""
        try:
            match outcome:
                case None:
                    outbox.delivered(session, row)
                    return "delivered"
                case NotTried():
                    outbox.put_off(session, row, outcome.after or 0)
                    return "put_off"
                case Retry() if (delay := retry_delay(self._retry_seconds, row.tries, outcome.after)) is not None:
                    outbox.failed(session, row, str(outcome), delay)
                    return "later"
                case _:
                    outbox.dead(session, row, str(outcome))
                    return "dead"
        except LostClaim:
            return "lost"

    def _end_if_gone(self, outcomes: Sequence[Outcome]) -> None:
        gone = next((outcome for outcome in outcomes if isinstance(outcome, SinkGone)), None)
        if gone is None:
            return
        with self._database.write() as session:
            outbox.disable(session, self._name, str(gone))
        ended = outbox.end_disabled(self._database)
        log.error("sink.disabled", sink=self._name, reason=str(gone), dead=ended)


def _unsendable(row: Dispatch) -> GiveUp:
    if row.losses >= claims.PARK_LOSSES:
        return SinkRefused(f"ended its worker {row.losses} times")
    return SinkRefused("its event was removed")


def one_by_one(
    messages: Sequence[Message], send: Callable[[Message], Outcome], *, until: Callable[[], bool]
) -> list[Outcome]:
    """Send one after the other, for sinks without batches. The rest is `NotTried` after a silence, a request to wait, a
    410, or once `until()` is true.
    """
    outcomes: list[Outcome] = []
    for message in messages:
        if outcomes and until():
            break
        outcomes.append(send(message))
        last = outcomes[-1]
        if isinstance(last, SinkSilent | SinkGone) or (isinstance(last, Retry) and last.after):
            break
    return outcomes + [NotTried("not tried") for _ in messages[len(outcomes) :]]
