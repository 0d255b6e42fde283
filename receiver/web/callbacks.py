"""`POST /callbacks/{provider}/{token}`: check the token, read the body within bounds, commit it, then answer 200.

404 bad token (no body read, no query) · 408 body slower than 10 s · 413 over 256 KiB, or over 64 KiB at the account's
URL · 401 bad signature (kept) · 429 the task, or the account's URL, has all the deliveries it may keep, or too many at
once; a proxy does not repeat it · 503 we could not store it in time · 200 committed, whatever it says. Never 4xx for
our own fault.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import structlog
from anyio import CapacityLimiter, to_thread
from prometheus_client import Counter
from sqlalchemy import func, text
from sqlmodel import Session, select
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from receiver.base import telemetry
from receiver.base.tokens import NO_TASK, Tokens
from receiver.providers.base import BadSignature, Provider
from receiver.tasks import apply_deliveries
from receiver.web.account_budget import (
    FULL_RETRY_AFTER_SECONDS,
    AccountBudget,
    AccountOverdrawn,
    AccountRefused,
    of_nobody,
)
from receiver.web.headers import HEADER_PAIRS, SECURITY_HEADERS
from receiver.web.joined_writes import WholeAnswer, arrived_body
from receiver.web.rate_limits import KEYLESS_STATUSES, REMEMBERED_TASKS, KeylessAnswers, RateLimit, hold_back
from receiver.web.refusals import AT_ONCE, LATE, RETRY_SOON, Refused
from storage import states
from storage.database.sessions import Database
from storage.errors import DatabaseUnavailable, ReportUnreadable
from storage.rows import reports, tasks
from storage.rows.deliveries import Delivery, store
from storage.rows.events import EventName, record
from storage.rows.group_commit import GroupCommit, Intake, QueueFull, TaskFull
from storage.rows.models import Callback
from storage.states import CallbackState

log = structlog.get_logger()

# A delivery has about 1 kB per result URL, and 32 kB are planned for (KLING §5). No honest callback has eight times
# that.
MAX_BODY_BYTES = 256 * 1024
# For the account URL, whose token names no task: twice the planned size.
MAX_ACCOUNT_BODY_BYTES = 64 * 1024
# The bodies of one URL may use this much memory at a time. 1,000 bodies that lacked a byte took 225 MB for ten seconds.
# This is room for eight of a task's largest, or for 256 at the account URL, which takes those of all tasks. What has
# arrived counts, not what heads announce: eight silent heads would keep a task's own callback out.
MAX_TASK_BYTES, MAX_ACCOUNT_BYTES = 2 * 2**20, 16 * 2**20
BODY_SECONDS = 10.0
# How long a refusal at the account URL is held back. Eight connections that repeat it at once took half a processor.
# The number of connections bounds how many wait: they keep no body, and make room before honest ones.
TARPIT_SECONDS = 1.0
# The evidence of a wrong signature is worth storing a few times, not without bound.
MAX_REJECTED_PER_TASK = 20
# Rejected deliveries are counted among this many of the newest: all of a task's own, and a moving window of the account
# URL's that match no task, which can have more than a write transaction should scan.
NEWEST = 500
# Limits per task: at most one extra read and one log line in these intervals.
READ_SOON_SECONDS, SAY_SECONDS = 10.0, 60.0
# Threads for refused deliveries, separate from those of pages and event readers.
THREADS = 4
# The interval after which the account URL is checked again for room for evidence of wrong signatures.
RECHECK_SECONDS = 10.0
# Headers stored beside the body to tell senders apart. Every other header may contain a secret.
KEPT_HEADERS = {
    name.encode(): name
    for name in ("content-type", "content-encoding", "user-agent", "webhook-id", "webhook-timestamp")
}
# Stored for a refused delivery too, so that `receiver replay` can verify it once the right secret is set. The signature
# is no secret: it signs this body alone, and is valid for minutes.
SIGNATURE_HEADER = "webhook-signature"
MAX_HEADER_CHARACTERS = 200
_WORDS = b'{"status":"accepted"}'
_FIELDS = [(b"content-length", b"%d" % len(_WORDS)), (b"content-type", b"application/json"), *HEADER_PAIRS]
ACCEPTED = WholeAnswer(
    {"type": "http.response.start", "status": 200, "headers": _FIELDS},
    {"type": "http.response.body", "body": _WORDS},
)
MAX_SIGNATURE_CHARACTERS = 500  # ten signatures


@dataclass(frozen=True)
class Fault:
    """Why a delivery was not stored, and the size of the largest of these. A database may accept small rows alone."""

    reason: str
    body_bytes: int = 0


class Callbacks:
    """The endpoint. `schedule`: decides when a task is read whose delivery was refused."""

    def __init__(
        self,
        database: Database,
        group_commit: GroupCommit,
        providers: Mapping[str, Provider],
        tokens: Tokens,
        schedule: reports.Schedule,
    ) -> None:
        self._database = database
        self._group_commit = group_commit
        self._providers = providers
        self._tokens = tokens
        self._schedule = schedule
        self.fault: Fault | None = None  # why a delivery was not stored; None once one of its size is
        self._may_read_soon, self._may_say = RateLimit(READ_SOON_SECONDS), RateLimit(SAY_SECONDS)
        self._refused = _Refused()
        self._in_hand: dict[str, int] = {}  # bytes of bodies, by the token of their URL
        self._account = AccountBudget(database, self._ids)
        self._keyless = KeylessAnswers()
        self._threads = CapacityLimiter(THREADS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take one delivery. Answers 200 only after its row is committed with full synchronisation.

        This is an ASGI application of its own: Starlette's wrapper around a function cost as much as all the rest here.
        """
        answer: ASGIApp = ACCEPTED
        status, is_delayed = 200, False
        try:
            await self._take(scope, receive)
        except Refused as error:  # it refers to the body, which is not to be held while the answer waits
            answer, status, is_delayed = _answer(error), error.status, isinstance(error, AccountRefused)
        if is_delayed:
            await hold_back(scope, receive, TARPIT_SECONDS, MAX_ACCOUNT_BODY_BYTES)
        if status in KEYLESS_STATUSES:
            await self._keyless.wait(scope)
        await answer(scope, receive, send)

    async def _take(self, scope: Scope, receive: Receive) -> None:
        """Store the delivery. Raises Refused if it is not stored."""
        if scope["method"] != "POST":
            raise Refused(405, "method not allowed", "method", {"Allow": "POST"})
        path = scope["path_params"]
        provider = self._providers.get(path["provider"])
        named = self._tokens.read(provider.name, path["token"]) if provider else None
        if provider is None or named is None:
            raise Refused(404, "not found", "bad_token")
        task_id = None if named == NO_TASK else named
        most = MAX_BODY_BYTES if task_id else MAX_ACCOUNT_BODY_BYTES
        announced = int(dict(scope["headers"]).get(b"content-length", 0))  # 0: in chunks
        if announced > most:
            raise _too_long(most)
        if task_id is None:
            self._account.check_length(announced)
        pieces: list[bytes] = []
        try:
            await self._read_body(scope, receive, task_id, most, pieces)
            await self._verify_and_store(scope, provider, task_id, pieces[0])
        finally:
            if left := self._in_hand.pop(path["token"], 0) - sum(map(len, pieces)):
                self._in_hand[path["token"]] = left

    async def _read_body(
        self, scope: Scope, receive: Receive, task_id: uuid.UUID | None, most: int, pieces: list[bytes]
    ) -> None:
        """Read the body into `pieces`, which count as in hand: at the end as one piece."""
        piece, is_more = arrived_body(scope)
        token = scope["path_params"]["token"]
        size, at_once = 0, MAX_TASK_BYTES if task_id else MAX_ACCOUNT_BYTES
        ends_at = asyncio.get_running_loop().time() + BODY_SECONDS
        while True:
            pieces.append(piece)
            size += len(piece)
            self._in_hand[token] = in_hand = self._in_hand.get(token, 0) + len(piece)
            if size > most:
                raise _too_long(most)
            if in_hand > at_once:
                raise AccountOverdrawn if task_id is None else Refused(429, AT_ONCE, "many_at_once", RETRY_SOON)
            if not is_more:
                break
            piece, is_more = await _next_piece(receive, ends_at)
        pieces[:] = [b"".join(pieces)]  # they would stay in memory until the commit

    async def _verify_and_store(self, scope: Scope, provider: Provider, task_id: uuid.UUID | None, body: bytes) -> None:
        headers = {
            KEPT_HEADERS[name]: value[:MAX_HEADER_CHARACTERS].decode("latin-1")
            for name, value in scope["headers"]
            if name in KEPT_HEADERS and value
        }
        try:
            webhook_id = provider.verify(Headers(scope=scope), body)
        except BadSignature as error:
            if signature := Headers(scope=scope).get(SIGNATURE_HEADER):
                headers[SIGNATURE_HEADER] = signature[:MAX_SIGNATURE_CHARACTERS]
            await self._keep_evidence(provider, task_id, headers, body, str(error))
            raise Refused(401, "the signature is missing or wrong", "bad_signature") from error
        delivery = Delivery(provider.name, "push", task_id, body, headers, webhook_id)
        await (self._store(delivery) if task_id else self._store_at_account(delivery))

    async def _store_at_account(self, delivery: Delivery) -> None:
        """Store a delivery of the account URL. Raises AccountRefused, which is answered 429: the shipped Traefik
        repeats a 503 at once, which would make no room.
        """
        task_id, is_new = await self._account.take(delivery), False
        try:
            is_new = await self._store(delivery) is Intake.NEW
        finally:
            self._account.settle(delivery, task_id, is_new=is_new)

    def _ids(self, delivery: Delivery) -> tuple[str | None, str | None]:
        """The external id and the provider's own in its body."""
        with suppress(ReportUnreadable):
            return self._providers[delivery.provider].ids(delivery.body)
        return None, None

    def close(self) -> None:
        """Call it when no more deliveries come."""
        self._account.close()

    async def _store(self, delivery: Delivery) -> Intake:
        try:
            intake = await self._group_commit.commit(delivery)
        except Exception as error:
            raise await self._not_stored(delivery, error) from error
        if self.fault is not None and len(delivery.body) >= self.fault.body_bytes:
            self.fault = None
        _counter("new" if intake is Intake.NEW else "duplicate").inc()
        return intake

    async def _not_stored(self, delivery: Delivery, error: Exception) -> Refused:
        """The answer to a delivery that was not stored because of `error`."""
        words, outcome = "could not be stored, try again", "database"
        if isinstance(error, TaskFull):
            if self._may_read_soon.now(delivery.task_id):
                try:
                    await to_thread.run_sync(self._read_soon, delivery, limiter=self._threads)
                except DatabaseUnavailable as outage:  # not 429: no read will find what this delivery says
                    self._may_read_soon.take_back(delivery.task_id)
                    return await self._not_stored(delivery, outage)
            words = "this task has more deliveries than can be kept; it is read instead"
            return Refused(429, words, "task_full", {"Retry-After": str(FULL_RETRY_AFTER_SECONDS)})
        if isinstance(error, QueueFull):
            words, outcome = "busy, try again", "full"
        elif isinstance(error, TimeoutError):
            self.fault = self.fault or Fault(str(error))
            words, outcome = LATE, "late"
        elif isinstance(error, DatabaseUnavailable):  # it has logged the outage once
            most = max(len(delivery.body), self.fault.body_bytes if self.fault else 0)
            self.fault = Fault(str(error), most)
        else:
            log.error("callback.not_stored", exc_info=error)  # our own fault: the sender keeps it and tries again
            outcome = "bug"
        return Refused(503, words, outcome, RETRY_SOON)

    async def _keep_evidence(
        self, provider: Provider, task_id: uuid.UUID | None, headers: dict[str, str], body: bytes, reason: str
    ) -> None:
        """Store a refused delivery and make the task due for a read, so that a misconfiguration costs seconds, not
        pictures. Both are limited per task.
        """
        state = CallbackState.REJECTED
        delivery = Delivery(provider.name, "push", task_id, body, headers, None, state, f"signature: {reason}")
        try:
            is_kept = self._refused.take(task_id) and await to_thread.run_sync(
                self._keep_refused, delivery, limiter=self._threads
            )
        except DatabaseUnavailable as error:
            self._refused.give_back(task_id)
            raise await self._not_stored(delivery, error) from error
        if not is_kept and self._may_say.now(task_id):
            said = str(task_id) if task_id else None
            log.warning("callback.refusal_not_stored", task_id=said, reason=reason, kept=MAX_REJECTED_PER_TASK)

    def _keep_refused(self, delivery: Delivery) -> bool:
        """Store a refused delivery. Returns False if enough are stored already."""
        with self._database.write() as session:
            is_kept = count_rejected(session, delivery.task_id) < MAX_REJECTED_PER_TASK
            if is_kept and store(session, [delivery]):
                record(session, EventName.CALLBACK_REJECTED, delivery.task_id, {"reason": delivery.reason})
            if is_kept:
                self._make_due(session, delivery)
        self._refused.note(delivery.task_id, is_kept=is_kept)
        return is_kept

    def _read_soon(self, delivery: Delivery) -> None:
        with self._database.write() as session:
            self._make_due(session, delivery)

    def _make_due(self, session: Session, delivery: Delivery) -> None:
        """Make the task due for a read. Deliveries cause a limited number of reads of a task, whether they are refused,
        too many, or not believed.
        """
        task = tasks.lock(session, delivery.task_id) if delivery.task_id else None
        if task is None or task.state in states.TERMINAL or reports.waits_for(session, task, states.READ_NOW):
            return
        if task.callback_reads < apply_deliveries.MAX_READS_PER_TASK and reports.read_soon(session, task):
            task.callback_reads += 1
            self._database.wake(session)


class _Refused:
    """Decides which tasks may store another refused delivery: a number in this process, until the rows have enough.

    At the account URL, where the window of counted deliveries moves, the rows are checked again after a while, one at a
    time.
    """

    def __init__(self) -> None:
        self._counts: dict[uuid.UUID | None, int] = {}
        self._look_at = 0.0

    def take(self, task_id: uuid.UUID | None) -> bool:
        """Whether one more may be stored. It counts from now on, so that simultaneous ones are counted too."""
        if task_id is None:
            is_time = time.monotonic() >= self._look_at
            self._look_at = time.monotonic() + RECHECK_SECONDS if is_time else self._look_at
            return is_time
        count = self._counts.pop(task_id, 0)
        while len(self._counts) >= REMEMBERED_TASKS:
            self._counts.pop(next(iter(self._counts)))
        self._counts[task_id] = min(count + 1, MAX_REJECTED_PER_TASK)
        return count < MAX_REJECTED_PER_TASK

    def give_back(self, task_id: uuid.UUID | None) -> None:
        """Uncount one that could not be checked."""
        if task_id is None:
            self._look_at = 0.0
        elif task_id in self._counts:
            self._counts[task_id] -= 1

    def note(self, task_id: uuid.UUID | None, *, is_kept: bool) -> None:
        if task_id is None:
            self._look_at = 0.0 if is_kept else self._look_at
        elif not is_kept:
            self._counts[task_id] = MAX_REJECTED_PER_TASK


async def _next_piece(receive: Receive, ends_at: float) -> tuple[bytes, bool]:
    """The next piece of a body, and whether more come."""
    try:
        async with asyncio.timeout_at(ends_at):
            message = await receive()
    except TimeoutError:
        raise Refused(408, f"the body took longer than {BODY_SECONDS:.0f} s", "slow_body") from None
    if message["type"] == "http.disconnect":
        raise Refused(400, "the body ended early", "cut_body")
    return message.get("body", b""), message.get("more_body", False)


def count_rejected(session: Session, task_id: uuid.UUID | None) -> int:
    """The number of rejected deliveries of a task, or among the newest at the account URL that match none."""
    if task_id is None:
        rows = text(f"{of_nobody(session, 'state')} ORDER BY received_at DESC LIMIT {NEWEST}")
        newest = rows.columns(Callback.__table__.c.state).subquery()  # type: ignore[attr-defined]
    else:
        newest = select(Callback.state).where(Callback.task_id == task_id).limit(NEWEST).subquery()
    return session.exec(select(func.count()).where(newest.c.state == CallbackState.REJECTED)).one()


def _too_long(most: int) -> Refused:
    return Refused(413, f"the body is longer than {most} bytes", "long_body")


def _answer(refused: Refused) -> Response:
    _counter(refused.outcome).inc()
    headers = {**SECURITY_HEADERS, **refused.headers}
    return JSONResponse({"error": str(refused)}, status_code=refused.status, headers=headers)


@cache
def _counter(outcome: str) -> Counter:
    return telemetry.DELIVERIES.labels(outcome)
