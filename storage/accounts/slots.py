"""Slots: how many pictures a provider's account may have in progress at once, and which queued task is next.

    waits (queued_at set, slots < 0, not due) ──admit──▶ holds (slots > 0, due) ──terminal, refused, silent──▶ slots 0
                    ▲                                            │
                    └──────── refused for lack of slots ◀────────┘

Slots are taken under the lock of the account's row, so the slots held never exceed the limit. They are given back under
the task's lock. The account is always locked before any task: a transaction that holds a task never waits for the
account, and one that holds the account skips locked tasks.
"""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import Any, NamedTuple

import structlog
from sqlalchemy import ColumnElement, bindparam, func, literal_column, or_, select, update
from sqlmodel import Session, col

from storage import states
from storage.accounts import pauses
from storage.database.clock import db_now, db_now_once
from storage.database.sessions import Database, insert_or_ignore, run
from storage.errors import NoSlots
from storage.rows import claims, tasks
from storage.rows.models import LINE, LINE_ORDER, Account, Task
from storage.rows.tasks import SILENT, give_back
from storage.states import Step

log = structlog.get_logger()

# Tasks per line that one transaction considers, and silent tasks whose slots it frees.
BATCH = 50
# Waiting creates of one gateway client and one model while an account resumes carefully: 16 s of its creates.
CLIENT_WAITS = 64
# If the next task needs more slots than are free, or backs off, the queue is not read again for this time, unless the
# number of held slots or the limit changes.
RECHECK_SECONDS = 1.0
# After a refusal for lack of slots the limit grows by one slot in this time.
RAISE_SECONDS = 60.0
# The slowest pictures take over an hour (KLING §7). A task without news for a day counts as ended.
SILENT_SECONDS = 86_400.0
# A task that the provider refused for its rate waits an hour at most. A later time was set before the clock was set
# back.
LATEST_SECONDS = 3_660.0

_TASKS = Task.__table__  # type: ignore[attr-defined]
_WAITS = (_TASKS.c.queued_at.is_not(None), _TASKS.c.provider == bindparam("provider"))
_LINE: ColumnElement[str] = literal_column(LINE.format(""))
_ORDER = [_TASKS.c[name] for name in LINE_ORDER]
_COLUMNS = [_TASKS.c[name] for name in ("id", "batch_id", "slots", "model", "created_at", "batch_line")]
_IS_READY = or_(_TASKS.c.queued_at <= db_now_once(), _TASKS.c.queued_at > db_now_once(LATEST_SECONDS))
_COLUMNS += [_LINE.label("line"), _IS_READY.label("ready")]


@lru_cache(maxsize=16)  # of providers; also of bound parameters
def _first(provider: Any) -> Any:
    """Without an order PostgreSQL may scan the table."""
    waits = (_TASKS.c.queued_at.is_not(None), _TASKS.c.provider == provider)
    return select(_TASKS.c.id).where(*waits).order_by(_LINE, *_ORDER).limit(1)


_FIRST = _first(bindparam("provider"))


def _heads() -> Any:
    """The first task of every line. A search from each finds the next; `row_number()` read the whole queue."""
    heads = select(_FIRST.scalar_subquery().label("id")).cte("heads", recursive=True)
    last = _TASKS.alias("last")
    following = _FIRST.where(literal_column(LINE.format("last.")) < _LINE).scalar_subquery()
    heads = heads.union_all(select(following).select_from(heads.join(last, last.c.id == heads.c.id)))
    return select(*_COLUMNS).join(heads, heads.c.id == _TASKS.c.id)


_HEADS = _heads()
_OF_CLIENT = select(_TASKS.c.id).where(*_WAITS, bindparam("line") == _LINE, _TASKS.c.client == bindparam("client"))
_OF_CLIENT = _OF_CLIENT.limit(CLIENT_WAITS)
_FOLLOWING = select(*_COLUMNS).where(*_WAITS, bindparam("line") == _LINE).order_by(*_ORDER).offset(1).limit(BATCH - 1)


class Waiting(NamedTuple):
    """A queued task. `queue`: its batch, None outside of batches. `ready`: its backoff is over.

    `line`: the tasks of its queue with its model; a paused model holds back its lines alone. `place`: its position in
    the queue.
    """

    id: uuid.UUID
    queue: uuid.UUID | None
    slots: int
    ready: bool
    line: str = ""
    model: str | None = None
    place: tuple[Any, ...] = ()


def choose(
    waiting: Sequence[Waiting],
    held: Mapping[uuid.UUID | None, int],
    limit: int | None,
    *,
    at_most: int | None = None,
    following: Callable[[str], Sequence[Waiting]] = lambda _: (),
) -> list[uuid.UUID]:
    """Choose the tasks to admit: next is always the queue that holds the fewest slots, on a tie the oldest.

    `waiting`: oldest first. `held`: slots by queue. `limit` None: no limit. No task overtakes the next one, so a large
    task does not starve. A task larger than the limit is admitted when no slot is held. A queue whose first task is
    not ready is skipped, so a refusal makes its whole queue back off. `following`: the tasks of a line behind those
    that are given, asked for when these are chosen.
    """
    queues: dict[uuid.UUID | None, list[Waiting]] = defaultdict(list)
    for task in waiting:
        queues[task.queue].append(task)
    holds, total, chosen = dict(held), sum(held.values()), list[uuid.UUID]()
    while ready := [queue for queue, tasks in queues.items() if tasks and tasks[0].ready]:
        queue = min(ready, key=lambda each: holds.get(each, 0))
        task = queues[queue].pop(0)
        if limit is not None and total and total + task.slots > limit:
            break
        chosen.append(task.id)
        if len(chosen) == at_most:
            break
        holds[queue] = holds.get(queue, 0) + task.slots
        total += task.slots
        if not any(other.line == task.line for other in queues[queue]):
            queues[queue] = sorted([*queues[queue], *following(task.line)], key=lambda each: each.place)
    return chosen


def limit_at(setting: int, lowered: int | None, changed_at: datetime, now: datetime) -> int:
    """The current limit: the one that a refusal set, plus one for every minute since, at most the setting.

    If `changed_at` is later than `now`, the clock has been set back since: the setting counts until the next refusal.
    """
    age = (now - changed_at).total_seconds()
    if lowered is None or age < -RAISE_SECONDS:
        return setting
    return min(setting, lowered + max(0, int(age // RAISE_SECONDS)))


class Slots:
    """The slots of one provider's account. `setting`: their number; None = no limit and no locks. Thread-safe."""

    def __init__(self, provider: str, setting: int | None = None) -> None:
        self.provider = provider
        self.setting = setting
        # Slots held, limit and pauses when no task could be admitted, and until when (monotonic) that counts.
        self._none_admitted_at: tuple[int, int | None, pauses.Gate] | None = None
        self._none_admitted_until = 0.0

    def is_any_next(self, session: Session) -> bool:
        """Whether `admit` may find a task. A cheap read without locks."""
        if not self._is_any_queued(session):
            return False
        gate = pauses.gate(session, self.provider)
        held, limit = sum(self.held(session).values()), self.limit(session)
        is_known = self._none_admitted_at == (held, limit, gate) and time.monotonic() < self._none_admitted_until
        return (limit is None or held < limit) and not (is_known or gate.is_closed)

    def reserve(self, session: Session, wanted: int) -> bool:
        """Whether a new task outside of batches may hold `wanted` slots at once: True if it would be admitted next.

        Locks the account until the transaction ends, in which the caller writes the task's row. The caller holds no
        task yet.
        """
        if self.setting is None:
            return True
        limit = self._lock(session, self.setting)
        mine = Waiting(uuid.uuid4(), None, wanted, ready=True, line="mine", place=(datetime.max.replace(tzinfo=UTC),))
        heads, following = self._heads(session), partial(self._following, session)
        return mine.id in choose([*heads, mine], self.held(session), limit, following=following)

    def is_late(self, session: Session, task: Task) -> bool:
        """Whether a new create of an account that was refused lately waits in the queue, where it overtakes no other.

        Otherwise the creates of a few clients would take all room, and queued tasks would never be sent. Locks the
        account's pause. Raises `NoSlots` if too many of this client's creates wait already.
        """
        if not pauses.is_careful(session, self.provider):
            return False
        if not self._is_any_queued(session) and pauses.has_room(session, self.provider, task.id):
            return False
        if task.client is not None:
            line = {"provider": self.provider, "line": f" {task.model or ''}", "client": task.client}
            if len(session.execute(_OF_CLIENT, line).all()) >= CLIENT_WAITS:
                raise NoSlots(f"{CLIENT_WAITS} creates of this client wait already")
        return True

    def admit(self, session: Session, at_most: int) -> int:
        """Make the next queued tasks due, as far as slots are free, `at_most` so many. Returns how many.

        None while the account is paused, and none of a paused model, except when a trial is due.
        """
        gate = pauses.gate(session, self.provider)
        if gate.is_closed or not self._is_any_queued(session):
            return 0
        limit = None if self.setting is None else self._lock(session, self.setting)
        held = self.held(session)
        is_full = limit and sum(held.values()) >= limit
        chosen: list[uuid.UUID] = []
        if not is_full:
            heads = [head for head in self._heads(session) if head.model not in gate.held_back]
            following = partial(self._following, session)
            most = at_most if gate.room is None else min(at_most, gate.room)
            chosen = choose(heads, held, limit, at_most=most, following=following)
        if not chosen:
            self._none_admitted_at = sum(held.values()), limit, gate
            self._none_admitted_until = time.monotonic() + RECHECK_SECONDS
            return 0
        # Another transaction may be changing some of them (dismiss, a report); those are skipped. The condition uses
        # `slots`, because for `queued_at` SQLite would search the queue.
        waiting = (col(Task.id).in_(chosen), col(Task.slots) < 0)
        free = select(col(Task.id)).where(*waiting).with_for_update(skip_locked=True)
        admitted = update(Task).where(col(Task.id).in_(list(session.scalars(free))))
        admitted = admitted.values(slots=-col(Task.slots), queued_at=None, **claims.due())
        return run(session, admitted).rowcount

    def refused(self, session: Session, slots: int) -> int:
        """Lower the limit after the provider had no room for a task of `slots`. Returns the new limit.

        Locks the account until the transaction ends, so call it before locking a task. The caller then queues
        the task again.
        """
        if self.setting is None:
            return 0
        limit = min(self._lock(session, self.setting), sum(self.held(session).values()))
        lowered = max(limit - slots, 1)
        changed = update(Account).where(col(Account.provider) == self.provider)
        session.execute(changed.values(slot_limit=lowered, changed_at=db_now()))
        return lowered

    def held(self, session: Session) -> dict[uuid.UUID | None, int]:
        """Slots held now, by batch; under None those of tasks outside of batches."""
        holding = (col(Task.provider) == self.provider, col(Task.slots) > 0)
        found = select(col(Task.batch_id), func.sum(col(Task.slots))).where(*holding).group_by(col(Task.batch_id))
        return {batch_id: int(slots) for batch_id, slots in session.execute(found)}

    def limit(self, session: Session) -> int | None:
        """The current limit, None = no limit. Takes no lock."""
        if self.setting is None:
            return None
        account = session.get(Account, self.provider, populate_existing=True)
        return self._limit(session, account, self.setting) if account else self.setting

    def count_queued(self, session: Session) -> int:
        """How many tasks are queued."""
        queued = col(Task.queued_at).is_not(None), col(Task.provider) == self.provider
        return int(session.execute(select(func.count()).where(*queued)).scalar_one())

    def _is_any_queued(self, session: Session) -> bool:
        return session.execute(_FIRST, {"provider": self.provider}).first() is not None

    def first_queued(self) -> Any:
        """A statement that finds a task while any is queued."""
        return _first(self.provider)

    def _heads(self, session: Session) -> list[Waiting]:
        """The first task of every line, oldest first."""
        return self._waiting(session, _HEADS, {"provider": self.provider})

    def _following(self, session: Session, line: str) -> list[Waiting]:
        """The next tasks of a line after its first one."""
        return self._waiting(session, _FOLLOWING, {"provider": self.provider, "line": line})

    def _waiting(self, session: Session, statement: Any, values: Mapping[str, Any]) -> list[Waiting]:
        rows = session.execute(statement, values).all()
        places = [(row.created_at, row.batch_line or 0, row.id.hex) for row in rows]
        found = [
            Waiting(row.id, row.batch_id, -row.slots, row.ready, row.line, row.model, place)
            for row, place in zip(rows, places, strict=True)
        ]
        return sorted(found, key=lambda each: each.place)

    def _lock(self, session: Session, setting: int) -> int:
        """Lock the account's row. Returns the current limit."""
        statement = select(Account).where(col(Account.provider) == self.provider).with_for_update()
        statement = statement.execution_options(populate_existing=True)
        account = session.scalars(statement).one_or_none()
        if account is None:
            insert_or_ignore(session, Account, {"provider": self.provider, "changed_at": db_now()})
            account = session.scalars(statement).one()
        return self._limit(session, account, setting)

    def _limit(self, session: Session, account: Account, setting: int) -> int:
        now: datetime = session.execute(select(db_now())).scalar_one()
        return limit_at(setting, account.slot_limit, account.changed_at, now)


def wait(task: Task, since: datetime) -> datetime:
    """Queue a new or locked task: it is not due until it is admitted. Returns `since`."""
    task.queued_at, task.slots = since, -abs(task.slots)
    task.sent_at = None
    claims.rest(task)
    return since


def give_back_silent(database: Database) -> int:
    """Free the slots of accepted tasks without a callback for 24 h. Returns how many.

    A read that finds the task still in progress does not count: after a day the provider is not working on it. The row
    keeps being read, and its note says so until the task ends or the provider calls back. A task whose create is not
    settled keeps its slots, because it may be sent again.
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
        rows = list(session.scalars(silent.limit(BATCH).with_for_update(skip_locked=True)))
        for task in rows:
            give_back(task)
            task.note = SILENT
        database.wake(session)
    for task in rows:
        log.error("task.not_reported", **tasks.named(task), provider_id=task.provider_task_id, note=SILENT)
    return len(rows)
