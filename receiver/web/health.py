"""`GET /healthz`, `/readyz` and `/metrics`: whether the process lives, whether it can store deliveries, and metrics."""

from __future__ import annotations

import asyncio
import hmac
import os
import uuid
from collections.abc import Collection
from typing import Any

from anyio import CapacityLimiter, to_thread
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import SecretStr
from sqlalchemy import delete, false
from sqlmodel import Session, col
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from receiver.base import telemetry
from receiver.web.callbacks import Callbacks
from receiver.web.readiness import HANG_SECONDS, Readiness
from storage.accounts import pauses
from storage.accounts.slots import Slots
from storage.archive import continuous_audit
from storage.bucket.availability import NO_ANSWER_YET, BucketAvailability
from storage.bucket.bucket import Bucket
from storage.database.sessions import Database
from storage.errors import DatabaseUnavailable
from storage.operations import heartbeats, measures, outbox
from storage.operations.counted import counted
from storage.operations.ended import EndedLastDay
from storage.rows import events, migrations
from storage.rows.deliveries import Delivery, store
from storage.rows.events import EventName
from storage.rows.group_commit import GroupCommit
from storage.rows.models import Callback, Worker
from storage.states import CallbackState

# What the checks report that is no fault of the receiver: one refused file, a provider that does not answer, or a
# client that refuses its callbacks.
REPORTED = frozenset({"waiting", "clients"})


class Health:
    """The endpoints. `metrics_token`: opens `/metrics` and the details of `/readyz`; None = both are hidden.

    `deadline_seconds`: how long before the provider deletes a file its task counts as near its deadline. `sinks`: those
    of the setting. Another one that is disabled is no fault: it was removed, as `receiver check` advises. None: all.
    """

    def __init__(
        self,
        database: Database,
        group_commit: GroupCommit,
        callbacks: Callbacks,
        metrics_token: SecretStr | None,
        *,
        deadline_seconds: float,
        bucket: Bucket | None = None,
        slots: Slots | None = None,
        sinks: Collection[str] | None = None,
    ) -> None:
        self._database = database
        self._group_commit = group_commit
        self._callbacks = callbacks
        self._metrics_token = metrics_token
        self._deadline_seconds = deadline_seconds
        self._bucket = BucketAvailability(bucket) if bucket else None
        self._slots = slots
        self._sinks = sinks
        self._probe_key = ""
        self._readiness = Readiness(self._check, {"database": f"no answer for {HANG_SECONDS} s", "schema": "unknown"})
        self._number_readiness = Readiness(self._check_numbers, {"numbers": f"no answer for {HANG_SECONDS} s"})
        self._store_readiness = Readiness(self._check_store, {"bucket": NO_ANSWER_YET})
        self._ended = EndedLastDay()
        self._counted_events: int | None = None  # the number of the last event that was counted
        self._measuring = CapacityLimiter(1)  # one scrape at a time

    async def alive(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """200 while deliveries can be stored. Bucket, workers, lateness and deadlines count only with `?strict=1`.

        A delivery that could not be stored decides over the checks, which may succeed where deliveries fail. Only
        callers whose answer shows or follows the state of the bucket and of the large table of events wait for them.
        """
        is_strict, is_permitted = request.query_params.get("strict") == "1", self._is_permitted(request)
        asked, checks = [self._readiness.checks()], dict[str, str]()
        for each in (self._number_readiness, *([self._store_readiness] if self._bucket is not None else [])):
            if is_strict or is_permitted:
                asked.append(each.checks())
            else:
                checks |= each.latest()
        for found in await asyncio.gather(*asked):  # together, because probes may wait for a second only
            checks |= found
        checks["intake"] = self._group_commit.state
        if self._callbacks.fault is not None:
            checks["database"] = f"a delivery was not stored: {self._callbacks.fault.reason}"
        is_down = any(checks[name] != "ok" for name in ("database", "schema", "intake"))
        is_degraded = any(state != "ok" for name, state in checks.items() if name not in REPORTED)
        status = 503 if is_down or (is_degraded and is_strict) else 200
        body: dict[str, Any] = {"status": "unavailable" if is_down else "degraded" if is_degraded else "ok"}
        if is_permitted:
            body["checks"] = checks
        return JSONResponse(body, status_code=status)

    def _check(self) -> dict[str, str]:
        checks: dict[str, str] = {}
        try:
            schema = migrations.current(self._database)
            is_other = schema != migrations.head()
            if (fault := self._callbacks.fault) is not None:
                self._store_probe(fault.body_bytes)
                if self._callbacks.fault is fault:  # unless another delivery has failed meanwhile
                    self._callbacks.fault = None
            elif not is_other:
                with self._database.write() as session:
                    session.execute(delete(Worker).where(false()))  # refused where nothing may be written
            words = "behind: run `receiver migrate`"
            if migrations.is_newer(schema):
                words = f"newer than this version: {migrations.IF_NEWER}"
            checks |= {"database": "ok", "schema": words if is_other else "ok"}
            if not is_other:
                checks["workers"] = "ok" if heartbeats.count_alive(self._database) else "none alive"
                checks |= self._check_lateness()
        except DatabaseUnavailable as error:
            checks |= {"database": str(error), "schema": "unknown"}
        return checks

    def _check_numbers(self) -> dict[str, str]:
        try:
            with self._database.read() as session:
                return {"numbers": measures.unnumbered_fault(session) or "ok"}
        except DatabaseUnavailable:
            return {}  # the check `database` says so

    def _check_store(self) -> dict[str, str]:
        assert self._bucket is not None
        return {"bucket": self._bucket.state()}

    def _store_probe(self, body_bytes: int) -> None:
        """Store a probe delivery of the same length as the one that failed, and delete it.

        No load balancer sends a delivery to a receiver that is not ready. Two transactions, because pages that one
        transaction takes and gives back are never written.
        """
        body = uuid.uuid4().bytes + os.urandom(body_bytes)
        of_nobody = delete(Callback).where(col(Callback.task_id).is_(None))
        probe = Delivery("readiness", "push", None, body, state=CallbackState.REJECTED)
        with self._database.write() as session:
            session.execute(of_nobody.where(col(Callback.delivery_key) == self._probe_key))
            store(session, [probe])
        self._probe_key = probe.key  # key of a probe that could not be deleted
        with self._database.write() as session:
            session.execute(of_nobody.where(col(Callback.delivery_key) == probe.key))

    def _check_lateness(self) -> dict[str, str]:
        with self._database.read() as session:
            overdue = measures.count_overdue(session)
            near = measures.count_deadline_near(session, self._deadline_seconds)
            (dead, clients), disabled = measures.count_dead_events(session), outbox.disabled(session)
            unusable = measures.unusable_files(session)
            waits = measures.waiting_lines(measures.store_waits(session), measures.provider_waits(session))
            paused = [pauses.line(each) for each in pauses.every(session)]
            faults = continuous_audit.standing(session).faults
        undelivered = [f"{dead} were given up"] if dead else []
        undelivered += [f"sink {name} is disabled" for name in disabled if self._sinks is None or name in self._sinks]
        return {
            "events": ", ".join(undelivered) or "ok",
            "clients": counted(clients, "callback was", "callbacks were") + " never accepted" if clients else "ok",
            "work": counted(overdue, "row is overdue", "rows are overdue") if overdue else "ok",
            "deadlines": counted(near, "task is about to lose files", "tasks are about to lose files")
            if near
            else "ok",
            "account": "; ".join(paused) or "ok",
            "files": str(unusable) if unusable.said else "ok",
            "waiting": "; ".join(waits) or "ok",
            "audit": f"{counted(faults, 'fault')}, see receiver status" if faults else "ok",
        }

    async def metrics(self, request: Request) -> Response:
        if self._metrics_token is None:
            raise HTTPException(404)
        if not self._is_permitted(request):
            raise HTTPException(401, headers={"WWW-Authenticate": "Bearer"})
        return Response(
            await to_thread.run_sync(self._measure, limiter=self._measuring), media_type=CONTENT_TYPE_LATEST
        )

    def _measure(self) -> bytes:
        try:
            with self._database.read() as session:
                found = measures.measure(
                    session, deadline_seconds=self._deadline_seconds, slots=self._slots, ended=self._ended
                )
                self._count_events(session)
        except DatabaseUnavailable:
            found = None
        telemetry.update_work_gauges(found.as_dict() if found else None)
        return generate_latest(telemetry.REGISTRY)

    def _count_events(self, session: Session) -> None:
        """Add the events since the last scrape to the counter. The first scrape shows each name with zero."""
        if self._counted_events is None:
            self._counted_events = events.newest_seq(session)
        counts, self._counted_events = events.count_after(session, self._counted_events)
        for name in EventName:
            telemetry.EVENTS.labels(name).inc(counts.get(name, 0))

    def _is_permitted(self, request: Request) -> bool:
        if self._metrics_token is None:
            return False
        given = request.headers.get("authorization", "").encode()
        return hmac.compare_digest(given, b"Bearer " + self._metrics_token.get_secret_value().encode())
