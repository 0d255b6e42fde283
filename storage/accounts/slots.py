"""How many pictures a provider's account may have in work at once, and whose turn it is.

    waits (queued_at set, slots < 0, not due) ──admit──▶ holds (slots > 0, due) ──terminal, refused, silent──▶ slots 0
                    ▲                                            │
                    └──────── refused for want of slots ◀────────┘

Slots are taken under the lock of the account's row alone, so what is held never passes the limit; they are given back
under the task's. One order of locks: the account before any task. Whoever holds a task never waits for the account,
and who holds the account passes over tasks that others hold.
"""

from __future__ import annotations

import time
import uuid
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import structlog
from sqlalchemy import func, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import Session, col

from storage import states
from storage.rows import claims
from storage.rows.database import Database, db_now, db_now_once
from storage.rows.held_slots import SILENT, give_back
from storage.rows.models import Account, Task
from storage.states import Step

log = structlog.get_logger()

# So many tasks of each queue are looked at, and so many silent ones freed, in one transaction.
AT_ONCE = 50
# Where slots are free but too few for whose turn it is, or that one backs off, the queue is not read at every commit.
IN_VAIN_SECONDS = 1.0
# DESIGN: the provider refused for want of slots; a minute without that is a reason to try one more.
RAISE_SECONDS = 60.0
# The provider's tail reaches over an hour (KLING §7); nothing heard for a day is nothing that goes on.
SILENT_SECONDS = 86_400.0


class Waiting(NamedTuple):
    """A task in a queue. `queue`: its batch, None for those outside of batches. `ready`: may be sent by now."""

    id: uuid.UUID
    queue: uuid.UUID | None
    slots: int
    ready: bool


def choose(waiting: Sequence[Waiting], held: Mapping[uuid.UUID | None, int], limit: int | None) -> list[uuid.UUID]:
    """Whose turn it is: always the queue that holds fewest slots, oldest first on a tie, its tasks in their order.

    `waiting`: oldest first. `held`: slots by queue. `limit` None: all are free. Nobody overtakes the one whose turn
    it is, so a large task does not starve; one that is larger than the limit goes when nothing else is held. A queue
    whose first task is not ready waits for it: after a refusal the whole queue backs off.
    """
    queues: dict[uuid.UUID | None, deque[Waiting]] = defaultdict(deque)
    for task in waiting:
        queues[task.queue].append(task)
    holds, total, chosen = dict(held), sum(held.values()), []
    while ready := [queue for queue, tasks in queues.items() if tasks and tasks[0].ready]:
        queue = min(ready, key=lambda each: holds.get(each, 0))
        task = queues[queue].popleft()
        if limit is not None and total and total + task.slots > limit:
            break
        chosen.append(task.id)
        holds[queue] = holds.get(queue, 0) + task.slots
        total += task.slots
    return chosen


def limit_at(setting: int, lowered: int | None, changed_at: datetime, now: datetime) -> int:
    """The limit by now: what a refusal lowered it to, plus one for every minute since, up to the setting."""
    if lowered is None:
        return setting
    return min(setting, lowered + int((now - changed_at).total_seconds() // RAISE_SECONDS))


class Slots:
    """The slots of one provider's account. `setting`: how many there are; None = no limit of our own, no locks.

    Safe to share between threads.
    """

    def __init__(self, provider: str, setting: int | None = None) -> None:
        self.provider = provider
        self.setting = setting
        self._in_vain: tuple[int, int | None] | None = None  # slots held and limit when nobody was next, and
        self._in_vain_until = 0.0  # how long (monotonic) that is taken to be so

    def is_any_next(self, session: Session) -> bool:
        """Whether `admit` may find something: a cheap read, so that nobody takes a lock for nothing."""
        if not self._is_any_queued(session):
            return False
        held, limit = sum(self.held(session).values()), self.limit(session)
        was_in_vain = self._in_vain == (held, limit) and time.monotonic() < self._in_vain_until
        return (limit is None or held < limit) and not was_in_vain

    def reserve(self, session: Session, wanted: int) -> bool:
        """Whether a new task outside of batches may hold `wanted` slots from this transaction on.

        True only when it is its turn. Locks the account until the transaction ends: the caller, who holds no task
        yet, writes the row either way.
        """
        if self.setting is None:
            return True
        limit = self._lock(session, self.setting)
        mine = Waiting(uuid.uuid4(), None, wanted, ready=True)
        return mine.id in choose([*self._heads(session), mine], self.held(session), limit)

    def admit(self, session: Session, at_most: int) -> int:
        """Make queued tasks due whose turn it is, as many as there are slots for, and `at_most`. Returns how many."""
        if not self._is_any_queued(session):
            return 0
        limit = None if self.setting is None else self._lock(session, self.setting)
        held = self.held(session)
        chosen = [] if limit and sum(held.values()) >= limit else choose(self._heads(session), held, limit)[:at_most]
        if not chosen:
            self._in_vain, self._in_vain_until = (sum(held.values()), limit), time.monotonic() + IN_VAIN_SECONDS
            return 0
        # Their rows may be changed by others meanwhile (dismissed, reported of): those are passed over.
        free = select(col(Task.id)).where(col(Task.id).in_(chosen), *self._queued()).with_for_update(skip_locked=True)
        admitted = update(Task).where(col(Task.id).in_(list(session.scalars(free))))
        admitted = admitted.values(slots=-col(Task.slots), queued_at=None, **claims.due())
        result: Any = session.execute(admitted.execution_options(synchronize_session=False))
        return int(result.rowcount)

    def refused(self, session: Session, slots: int) -> int:
        """The provider had no room for a task of `slots`: lower the limit below what was held. Returns the new one.

        Locks the account until the transaction ends, so it comes before any task. The caller puts the task back.
        """
        if self.setting is None:
            return 0
        limit = min(self._lock(session, self.setting), sum(self.held(session).values()))
        lowered = max(limit - slots, 1)
        changed = update(Account).where(col(Account.provider) == self.provider)
        session.execute(changed.values(slot_limit=lowered, changed_at=db_now()))
        return lowered

    def held(self, session: Session) -> dict[uuid.UUID | None, int]:
        """Slots held now, by batch; None: by the tasks outside of batches."""
        holding = (col(Task.provider) == self.provider, col(Task.slots) > 0)
        found = select(col(Task.batch_id), func.sum(col(Task.slots))).where(*holding).group_by(col(Task.batch_id))
        return {batch_id: int(slots) for batch_id, slots in session.execute(found)}

    def limit(self, session: Session) -> int | None:
        """How many may be held now; None = no limit of our own. Locks nothing."""
        if self.setting is None:
            return None
        account = session.get(Account, self.provider, populate_existing=True)
        return self._limit(session, account, self.setting) if account else self.setting

    def count_queued(self, session: Session) -> int:
        """How many tasks wait for their turn."""
        return int(session.execute(select(func.count()).where(*self._queued())).scalar_one())

    def _is_any_queued(self, session: Session) -> bool:
        return session.execute(select(col(Task.id)).where(*self._queued()).limit(1)).first() is not None

    def _queued(self) -> tuple[Any, ...]:
        return col(Task.queued_at).is_not(None), col(Task.provider) == self.provider

    def _heads(self, session: Session) -> list[Waiting]:
        """The first tasks of every queue, oldest first. Reads the whole queue once, without its requests."""
        order = (col(Task.created_at), col(Task.batch_line), col(Task.id))
        place = func.row_number().over(partition_by=col(Task.batch_id), order_by=order).label("place")
        columns: Any = (Task.id, Task.batch_id, Task.slots, Task.queued_at, Task.created_at, Task.batch_line)
        queued = select(*columns, place).where(*self._queued()).subquery()
        mine = queued.c
        ready = (mine.queued_at <= db_now_once()).label("ready")
        heads = select(mine.id, mine.batch_id, -mine.slots, ready).where(mine.place <= AT_ONCE)
        return [Waiting(*row) for row in session.execute(heads.order_by(mine.created_at, mine.batch_line))]

    def _lock(self, session: Session, setting: int) -> int:
        """The limit, with the account's row locked."""
        statement = select(Account).where(col(Account.provider) == self.provider).with_for_update()
        statement = statement.execution_options(populate_existing=True)
        account = session.scalars(statement).one_or_none()
        if account is None:
            dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
            first = dialect.insert(Account).values(provider=self.provider, changed_at=db_now())
            session.execute(first.on_conflict_do_nothing())
            account = session.scalars(statement).one()
        return self._limit(session, account, setting)

    def _limit(self, session: Session, account: Account, setting: int) -> int:
        now: datetime = session.execute(select(db_now())).scalar_one()
        return limit_at(setting, account.slot_limit, account.changed_at, now)


def wait(task: Task, since: datetime) -> datetime:
    """Put the task, new or locked, into its queue: nobody works on it until it is admitted. Returns `since`."""
    task.queued_at, task.slots = since, -abs(task.slots)
    task.sent_at = None
    claims.rest(task)
    return since


def give_back_silent(database: Database) -> int:
    """Free the slots of accepted tasks of which nothing was heard for 24 h since they were sent. Returns how many.

    Reads that bring no end are not heard of: a task that stays in work that long is not worked on. Its row goes on
    being read, and its note says so until it ends or the provider calls back. A task whose create is in doubt keeps its
    slots: it may be sent again.
    """
    heard_at = func.coalesce(Task.called_back_at, Task.sent_at, Task.created_at)
    silent = select(Task).where(
        col(Task.slots) > 0,
        heard_at < db_now_once(-SILENT_SECONDS),
        col(Task.state).not_in(states.TERMINAL),
        col(Task.step) != Step.CREATE,
    )
    with database.read() as session:
        if session.scalars(silent.limit(1)).first() is None:
            return 0
    with database.write() as session:
        rows = list(session.scalars(silent.limit(AT_ONCE).with_for_update(skip_locked=True)))
        for task in rows:
            give_back(task)
            task.note = SILENT
        database.wake(session)
    for task in rows:
        log.error("task.silent", task=task.external_task_id, provider_id=task.provider_task_id, note=SILENT)
    return len(rows)
