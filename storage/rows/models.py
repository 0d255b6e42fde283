"""The tables. A row that waits for work is the job itself: due time, attempts and lease are columns of it.

`due_at` set: the row waits for a worker from then on. NULL: nothing to do. A claim moves `due_at` to the end of its
lease, so a row whose lease ran out is due again. Settling sets it to NULL or to a later time.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, Text, UniqueConstraint, false, text
from sqlmodel import Field

from storage.rows.columns import (
    Claimable,
    Json,
    KeyText,
    Row,
    Word,
    due_indexes,
    partial_index,
    text_column,
    time_column,
)
from storage.states import (
    GIVEN_UP,
    PARKED,
    RARE_EVENT,
    UNMATCHED,
    ArchiveState,
    AssetState,
    CallbackState,
    DispatchState,
    Step,
    TaskState,
)

# SQLite autoincrements INTEGER primary keys only.
BigId = BigInteger().with_variant(Integer(), "sqlite")

# The line in which a queued task waits for slots (accounts/slots.py): its batch and its model, and the order in it. An
# index of this expression finds the first task of each line. NULL becomes an empty text, because no
# comparison finds NULL. `{0}`: the table or alias of the columns.
LINE = "coalesce(CAST({0}batch_id AS TEXT), '') || ' ' || coalesce({0}model, '')"
LINE_ORDER = ("created_at", "batch_line", "id")


class TaskColumns(Claimable):
    """One request to a provider. `state` and `archive` change under this row's lock alone.

    Such a row belongs to no session and nothing tracks it: `tasks.save` writes its changes.
    """

    id: uuid.UUID = Field(default_factory=uuid.uuid4, primary_key=True)
    external_task_id: str = Field(sa_type=Text, unique=True)
    provider: str = Field(sa_type=Text)
    provider_task_id: str | None = text_column()
    request: dict[str, Any] = Field(default_factory=dict, sa_type=Json, repr=False)
    request_hash: str = text_column("")
    callback_url: str | None = text_column(repr=False)
    adopt: bool = False

    state: TaskState = Field(default=TaskState.CREATED, sa_type=Word(TaskState))
    archive: ArchiveState = Field(default=ArchiveState.NONE, sa_type=Word(ArchiveState))
    series: bool | None = None
    expected: int | None = None
    contradicted: bool = False
    error: str | None = text_column()
    note: str | None = text_column()
    units: str | None = text_column()

    step: Step | None = Field(default=None, sa_type=Word(Step), nullable=True)
    sent_at: datetime | None = time_column()
    missed_at: datetime | None = time_column()
    polls: int = 0
    completeness_reads: int = 0
    reported_at: datetime | None = time_column()
    called_back_at: datetime | None = time_column()
    end_called_back_at: datetime | None = time_column()  # when the first callback reported the end, believed or not

    created_at: datetime = time_column(nullable=False)
    submitted_at: datetime | None = time_column()
    completed_at: datetime | None = time_column()
    archived_at: datetime | None = time_column()
    files_expire_at: datetime | None = time_column()
    deadline_near_at: datetime | None = time_column()
    manifest_key: str | None = Field(default=None, sa_type=KeyText, nullable=True)
    manifest_digest: str | None = text_column()
    manifests: int = 0
    deleted_at: datetime | None = time_column()  # set when its objects are deleted; later reports are ignored

    # account slots that it holds; negative: slots that it waits for (accounts/slots.py)
    slots: int = Field(default=0, sa_column_kwargs={"server_default": "0"})
    queued_at: datetime | None = time_column()  # since when the task waits for slots; its create is not due
    batch_id: uuid.UUID | None = None
    batch_line: int | None = None
    client: str | None = text_column()  # fingerprint of the gateway client's API key
    client_callback_url: str | None = text_column(repr=False)  # where a client of the gateway is called back
    model: str | None = text_column()  # the provider's name of the model; a paused model holds back only its own tasks
    # reads that unconfirmed deliveries caused; bounded, because anyone with the callback URL can send them
    callback_reads: int = Field(default=0, sa_column_kwargs={"server_default": "0"})


class Task(TaskColumns, table=True):
    """The table of tasks, and a row that SQLAlchemy tracks."""

    __tablename__: ClassVar[str] = "task"
    __table_args__ = (
        *due_indexes("task", lane="step", expires=True),
        partial_index("task_deadline", "archive = 'archiving'", "files_expire_at"),
        Index("task_newest", "created_at", "id"),
        Index("task_completed", "completed_at"),
        Index("task_manifest_key", "manifest_key"),
        Index("task_batch", "batch_id"),
        partial_index("task_queue", "queued_at IS NOT NULL", "provider", text(f"({LINE.format('')})"), *LINE_ORDER),
        partial_index("task_of_client", "client IS NOT NULL", "client", "created_at", "id"),
        partial_index("task_parked", PARKED, "created_at", "id"),
        partial_index("task_failed", "state = 'failed'", "created_at", "id"),
        partial_index("task_incomplete", "archive = 'incomplete'", "created_at", "id"),
        partial_index("task_slots", "slots > 0", "provider", "batch_id", "slots"),
    )


class TaskAlias(Row, table=True):
    """Every id that the provider, or a gateway in front of it, has used for a task.

    `unsigned`: a process of an earlier release took it from an unsigned delivery. The provider's own word replaces it.
    """

    __tablename__: ClassVar[str] = "task_alias"
    __table_args__ = (Index("task_alias_task", "task_id"),)

    provider: str = Field(sa_type=Text, primary_key=True)
    provider_task_id: str = Field(sa_type=Text, primary_key=True)
    task_id: uuid.UUID = Field(foreign_key="task.id")
    unsigned: bool = Field(default=False, sa_column_kwargs={"server_default": false()})


class Callback(Claimable, table=True):
    """One raw delivery. `task_id`: the task that its token names; this database may have no row for it.

    `external_task_id`, `provider_task_id`: the ids in the body of an unmatched delivery, to find its task later. Of a
    matched one at the account's URL, whose token names no task, `external_task_id` is its task's.
    """

    __tablename__: ClassVar[str] = "callback"
    __table_args__ = (
        *due_indexes("callback", lane="state"),
        partial_index("callback_unmatched_external", "state = 'unmatched'", "external_task_id"),
        partial_index("callback_unmatched_provider", "state = 'unmatched'", "provider_task_id"),
        partial_index("callback_unmatched_open", UNMATCHED, "received_at"),
        # A key differs for each task. An index of keys alone had its entry in another place than one of tasks, so a
        # delivery wrote 2.3 pages instead of 1.7.
        Index("callback_delivery", "task_id", "delivery_key", unique=True),
        partial_index("callback_delivery_at_account", "task_id IS NULL", "delivery_key", unique=True),
        partial_index("callback_unreadable", "state = 'unreadable'", "delivery_key"),
        Index("callback_newest", "received_at"),
        partial_index("callback_of_nobody", "task_id IS NULL AND state <> 'applied'", "received_at"),
        partial_index("callback_at_account", "task_id IS NULL", "external_task_id"),
    )

    id: int | None = Field(default=None, sa_column=Column(BigId, primary_key=True))
    delivery_key: str = Field(sa_type=Text)
    provider: str = Field(sa_type=Text)
    source: str = Field(sa_type=Text)  # push, poll
    task_id: uuid.UUID | None = None
    webhook_id: str | None = text_column()  # set = the signature was verified
    headers: dict[str, Any] = Field(default_factory=dict, sa_type=Json)
    body: bytes = Field(sa_type=LargeBinary, repr=False)
    received_at: datetime = time_column(nullable=False)
    state: CallbackState = Field(default=CallbackState.RECEIVED, sa_type=Word(CallbackState))
    reason: str | None = text_column()
    external_task_id: str | None = text_column()
    provider_task_id: str | None = text_column()
    applied_at: datetime | None = time_column()


class Asset(Claimable, table=True):
    """One file to archive. `key`, `sha256`, `size` are written before the put, so that the next worker finds it."""

    __tablename__: ClassVar[str] = "asset"
    __table_args__ = (
        *due_indexes("asset", expires=True),
        partial_index("asset_given_up", GIVEN_UP, "created_at"),
        partial_index("asset_unusable", "unusable_since IS NOT NULL", "task_id"),
        Index("asset_key", "key"),
        UniqueConstraint("task_id", "kind", "index", "original", name="asset_name"),
    )

    id: uuid.UUID = Field(primary_key=True)
    task_id: uuid.UUID = Field(foreign_key="task.id")
    kind: str = Field(sa_type=Text)
    index: int
    original: str = text_column("")
    source_url: str = Field(sa_type=Text, repr=False)
    state: AssetState = Field(default=AssetState.DUE, sa_type=Word(AssetState))
    files_expire_at: datetime | None = time_column()
    key: str | None = Field(default=None, sa_type=KeyText, nullable=True)
    sha256: str | None = text_column()
    size: int | None = Field(default=None, sa_type=BigInteger)
    media_type: str | None = text_column()
    width: int | None = None
    height: int | None = None
    verified: bool | None = None
    # bytes of `size` behind the picture's end; harmless oddities; NULL = none
    trailing_bytes: int | None = Field(default=None, sa_type=BigInteger)
    notes: list[str] | None = Field(default=None, sa_type=Json, nullable=True)
    accept_unverified: bool = False
    # since when, and how often in a row, its host has answered with an unusable file
    unusable_since: datetime | None = time_column()
    unusable_tries: int = Field(default=0, sa_column_kwargs={"server_default": "0"})
    # the link comes from an unsigned delivery that no read has confirmed: its redirects stay within the trusted hosts
    unconfirmed: bool = Field(default=False, sa_column_kwargs={"server_default": false()})
    fetched: dict[str, Any] = Field(default_factory=dict, sa_type=Json)  # the file's host and some of its headers
    superseded: list[str] = Field(default_factory=list, sa_type=Json)
    error: str | None = text_column()
    # the last tries that failed, oldest first: {"at": ISO time, "error": text}; NULL = none
    failed_tries: list[dict[str, str]] | None = Field(default=None, sa_type=Json, nullable=True)
    created_at: datetime = time_column(nullable=False)
    archived_at: datetime | None = time_column()

    # of its task; only a claimed row has them
    task_created_at: ClassVar[datetime]
    task_external_task_id: ClassVar[str]
    task_provider: ClassVar[str]
    task_provider_task_id: ClassVar[str | None]


class Event(Row, table=True):
    """One event, written in the transaction that made it true.

    `seq` is assigned after that commit, under a lock, because on PostgreSQL a smaller `id` may commit later. Readers go
    by `seq` and miss nothing. NULL = not yet assigned.
    """

    __tablename__: ClassVar[str] = "event"
    __table_args__ = (
        Index("event_task", "task_id"),
        Index("event_seq", "seq", unique=True),
        partial_index("event_unsequenced", "seq IS NULL", "id"),
        partial_index("event_rare", RARE_EVENT, "seq", "name"),
    )

    id: int | None = Field(default=None, sa_column=Column(BigId, primary_key=True))
    task_id: uuid.UUID | None = None
    name: str = Field(sa_type=Text)
    at: datetime = time_column(nullable=False)
    data: dict[str, Any] = Field(default_factory=dict, sa_type=Json)
    seq: int | None = Field(default=None, sa_type=BigInteger)


class Dispatch(Claimable, table=True):
    """One event on its way to one sink. For each sink and task they are sent in the order of their ids."""

    __tablename__: ClassVar[str] = "dispatch"
    __table_args__ = (
        *due_indexes("dispatch", lane="sink"),
        partial_index("dispatch_dead", "state = 'dead'", "sink"),
        partial_index("dispatch_open", "state = 'due'", "task_id"),
        UniqueConstraint("sink", "event_id", name="dispatch_once"),
        Index("dispatch_event", "event_id"),
    )

    id: int | None = Field(default=None, sa_column=Column(BigId, primary_key=True))
    sink: str = Field(sa_type=Text)
    event_id: int = Field(sa_type=BigInteger)
    task_id: uuid.UUID | None = None
    state: DispatchState = Field(default=DispatchState.DUE, sa_type=Word(DispatchState))
    tries: int = 0  # sends that were answered or failed; `attempts` counts claims
    error: str | None = text_column()
    created_at: datetime = time_column(nullable=False)
    settled_at: datetime | None = time_column()


class Sink(Row, table=True):
    """The state of a sink; its address is a setting. `disabled_at`: when it answered 410."""

    __tablename__: ClassVar[str] = "sink"

    name: str = Field(sa_type=Text, primary_key=True)
    disabled_at: datetime | None = time_column()
    reason: str | None = text_column()


class Counter(Row, table=True):
    """A number that one transaction at a time increments: its row is the lock."""

    __tablename__: ClassVar[str] = "counter"

    name: str = Field(sa_type=Text, primary_key=True)
    value: int = Field(sa_type=BigInteger)


class Batch(Row, table=True):
    """Requests submitted together, under one name."""

    __tablename__: ClassVar[str] = "batch"

    id: uuid.UUID = Field(default_factory=uuid.uuid4, primary_key=True)
    name: str = Field(sa_type=Text, unique=True)
    created_at: datetime = time_column(nullable=False)


class Account(Row, table=True):
    """A provider's account. Its row is locked while slots are assigned.

    `slot_limit`: lowered when the provider refuses a create for lack of slots; NULL = the setting.
    """

    __tablename__: ClassVar[str] = "account"

    provider: str = Field(sa_type=Text, primary_key=True)
    slot_limit: int | None = None
    changed_at: datetime = time_column(nullable=False)


class AccountPause(Row, table=True):
    """Creates that wait because the provider refuses an account, whatever the request. `model` "": all of the
    account's.

    `said`: the provider's message; `trial_at`: when the next create may try again.
    """

    __tablename__: ClassVar[str] = "account_pause"

    provider: str = Field(sa_type=Text, primary_key=True)
    model: str = Field(sa_type=Text, primary_key=True)
    code: int | None = None
    http_status: int | None = None
    said: str = text_column("")
    since: datetime = time_column(nullable=False)
    trial_at: datetime = time_column(nullable=False)


class Idempotency(Row, table=True):
    """The first answer for an `Idempotency-Key` of a gateway client. `answer` NULL: not answered yet."""

    __tablename__: ClassVar[str] = "idempotency"
    __table_args__ = (Index("idempotency_newest", "created_at"),)

    client: str = Field(sa_type=Text, primary_key=True)  # a fingerprint of the API key
    key: str = Field(sa_type=Text, primary_key=True)
    body_hash: str = Field(sa_type=Text)
    task_id: uuid.UUID
    status: int | None = None
    answer: dict[str, Any] | None = Field(default=None, sa_type=Json, nullable=True)
    created_at: datetime = time_column(nullable=False)


class Worker(Row, table=True):
    """One worker process and when it was last alive."""

    __tablename__: ClassVar[str] = "worker"

    id: uuid.UUID = Field(default_factory=uuid.uuid4, primary_key=True)
    host: str = Field(sa_type=Text)
    pid: int
    threads: int
    started_at: datetime = time_column(nullable=False)
    seen_at: datetime = time_column(nullable=False)


class RollingAudit(Row, table=True):
    """The state of the audit in the workers (`storage/archive/continuous_audit.py`): one row with a claim of its own.

    `cursor`: the last task that was audited, NULL = at the start of a round. `checked`: counts of the round under way,
    {} = none. `last`: those of the last complete round. `findings`: the newest faults.
    """

    __tablename__: ClassVar[str] = "rolling_audit"

    name: str = Field(sa_type=Text, primary_key=True)
    due_at: datetime = time_column(nullable=False)
    lease: uuid.UUID | None = None
    cursor: uuid.UUID | None = None
    round_started_at: datetime | None = time_column()
    round_ended_at: datetime | None = time_column()
    checked: dict[str, Any] = Field(default_factory=dict, sa_type=Json)
    last: dict[str, Any] | None = Field(default=None, sa_type=Json, nullable=True)
    findings: list[dict[str, Any]] = Field(default_factory=list, sa_type=Json)


class ProviderRate(Row, table=True):
    """When a process may next read from a provider's account."""

    __tablename__: ClassVar[str] = "pace"

    account: str = Field(sa_type=Text, primary_key=True)
    next_free_at: datetime = time_column(nullable=False)
