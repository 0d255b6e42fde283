"""The provider's state: tasks and their lives, requests, callbacks to send. No sockets; `now` is an argument."""

from __future__ import annotations

import heapq
import random
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

from receiver.sandbox import cdn, checks
from receiver.sandbox.access import check_credentials
from receiver.sandbox.answers import Answer, Breakage, Refused, success
from receiver.sandbox.gallery import Gallery
from receiver.sandbox.knobs import STARTUP_ONLY, Knobs
from receiver.sandbox.ledger import Asset, Callback, Create, Ledger, TaskEntry
from receiver.sandbox.outbox import Outbox
from receiver.sandbox.tasks import Name, Task, create_data, new_record, old_record

MAX_IDS = 20  # the most ids of one query of /tasks
MAX_KEPT_BODY_BYTES = 256 * 1024 * 1024
RISK_MESSAGE = "Failure to pass the risk control system"
RANDOM_CREATE_FAULTS = ("5000", "5000:created", "5002", "5002:created", "5001", "5001:created")


class Download(NamedTuple):
    """The target of a result URL. `fault`: as in cdn.Fault. `redirect`: the next hop, None = the file itself."""

    task: Task
    name: Name
    fault: cdn.Fault
    redirect: str | None = None
    seconds: float = 0


class World:
    """Safe for threads: every public method holds the one lock, and draws pictures outside it."""

    def __init__(self, knobs: Knobs) -> None:
        self.lock = threading.RLock()
        self.knobs = knobs.model_copy(deep=True)
        self.reset()

    def reset(self) -> None:
        """Forget all tasks and restart the random choices from the seed. The knobs stay."""
        with self.lock:
            self._rng = random.Random(self.knobs.seed)  # noqa: S311 – repeatable choices, not secrets
            self._key = self._rng.randbytes(32)
            self.gallery = Gallery(self.knobs.seed)
            self.outbox = Outbox(self._rng)
            self.tasks: dict[str, Task] = {}
            self._known: dict[str, Task] = {}  # by task id, alias and external id
            self._due: list[tuple[float, int, str]] = []  # (seconds since 1970, number, task id)
            self._numbers = 0
            self._slots_held = self._slots_peak = 0
            self._creates: list[Create] = []
            self._kept_bytes = 0
            self._counts: Counter[str] = Counter()
            self._hits: Counter[tuple[str, Name]] = Counter()
            self._served: Counter[tuple[str, Name]] = Counter()

    def set(self, changes: Mapping[str, Any], *, remote: bool = False) -> Knobs:
        """Change some knobs. Returns a copy of all. `remote`: the change came over HTTP.

        Raises pydantic.ValidationError (unknown or out of range), PermissionError (not to be changed over HTTP).
        """
        with self.lock:
            if remote and STARTUP_ONLY & changes.keys():
                raise PermissionError(f"{', '.join(sorted(STARTUP_ONLY & changes.keys()))}: only at start")
            self.knobs = self.knobs.merged(dict(changes))
            return self.knobs.model_copy(deep=True)

    # -- create -----------------------------------------------------------------------------------------------------

    def create(self, raw: bytes, authorization: str | None, origin: str, now: float) -> Answer:
        """Answer `POST …/omni-image`. `origin`: scheme and host under which the caller reached us, for result URLs."""
        entry = Create(raw=raw, body=None, at_ms=_ms(now))
        with self.lock:
            self._log_create(entry)
            request_id = self._uuid()
        try:
            check_credentials(authorization, self.knobs)
            entry.body = checks.parse(raw)
            wanted = checks.read(entry.body, self.knobs)
            with self.lock:
                return self._admit(entry, wanted, origin, now, request_id)
        except Refused as refusal:
            entry.code = refusal.code
            with self.lock:
                self._counts[f"create:{refusal.code}"] += 1
            return Answer(refusal.http_status, refusal.body(request_id))

    def _admit(self, entry: Create, wanted: checks.Wanted, origin: str, now: float, request_id: str) -> Answer:
        word, created = self._create_fault()
        if word and not created:
            return self._spoilt(word, entry, request_id)
        if self.knobs.balance == 0:
            raise Refused(1102)
        if wanted.external_task_id in self._known:
            raise Refused(1201, f"External_task_id {wanted.external_task_id} already exists")
        task = self._task(wanted, origin, now)
        entry.task_id = task.id
        if word:
            return self._spoilt(word, entry, request_id, task)
        self._counts["create:0"] += 1
        return Answer(200, success(request_id, create_data(task, task_info=self.knobs.task_info)))

    def _create_fault(self) -> tuple[str, bool]:
        fault = ""
        if self.knobs.create_faults:
            fault = self.knobs.create_faults.pop(0)
        elif self._chance(self.knobs.create_fault_rate):
            fault = self._rng.choice(RANDOM_CREATE_FAULTS)
        if fault:
            self._counts[f"fault:create:{fault}"] += 1
        word, _, created = fault.partition(":")
        return word, bool(created)

    def _spoilt(self, word: str, entry: Create, request_id: str, task: Task | None = None) -> Answer:
        if word.isdigit():
            raise Refused(int(word))
        entry.code = -1
        if task is None:
            refusal = Refused(5000)
            return Answer(refusal.http_status, refusal.body(request_id), cast(Breakage, word))
        data = create_data(task, task_info=self.knobs.task_info)
        return Answer(200, success(request_id, data), cast(Breakage, word))

    def _task(self, wanted: checks.Wanted, origin: str, now: float) -> Task:
        knobs = self.knobs
        slots = wanted.pictures or self._rng.randint(2, 9)
        if knobs.concurrency_limit and self._slots_held + slots > knobs.concurrency_limit:
            raise Refused(1303)
        task = Task(
            id=self._task_id(),
            wanted=wanted,
            origin=origin,
            slots=slots,
            fails="[fail]" in wanted.prompt or self._chance(knobs.fail_rate),
            created_ms=_ms(now),
            updated_ms=_ms(now),
            visible_ms=_ms(now + knobs.query_lag_seconds),
            picture_bytes=knobs.picture_bytes,
            alias=self._task_id() if knobs.gateway_ids else None,
        )
        self.tasks[task.id] = task
        if knobs.balance is not None:
            knobs.balance -= 1
        self._slots_held += slots
        self._slots_peak = max(self._slots_peak, self._slots_held)
        for name in (task.id, task.alias, wanted.external_task_id if knobs.external_ids else None):
            if name:
                self._known[name] = task
        self._wake_at(now + self._delay(knobs.submitted_seconds), task)
        self._report(task)
        return task

    # -- the life of a task -----------------------------------------------------------------------------------------

    def advance(self, now: float) -> float | None:
        """Move every task whose time has come. Returns the time of the next one, None = none waits."""
        with self.lock:
            while self._due and self._due[0][0] <= now:
                due, _, task_id = heapq.heappop(self._due)
                self._step(self.tasks[task_id], due, now)
            return self._due[0][0] if self._due else None

    def take_callbacks(self) -> list[list[Callback]]:
        """The callbacks to send now, each returned once. Those of one batch are sent one after the other."""
        with self.lock:
            return self.outbox.take()

    def _step(self, task: Task, due: float, now: float) -> None:
        task.updated_ms = max(_ms(now), task.updated_ms + 1)
        if task.status == "submitted":
            task.status = "processing"
            self._wake_at(due + self._delay(self.knobs.processing_seconds), task)
        elif task.fails:
            task.status, task.message = "failed", RISK_MESSAGE
        else:
            task.status = "succeed"
            task.pictures = max(0, task.slots - self.knobs.deliver_fewer)
            task.expires = task.updated_ms // 1000 + self.knobs.result_lifetime_seconds
            task.live_from = int(self.knobs.first_urls_dead or "[expire]" in task.wanted.prompt)
        if task.ended:
            self._slots_held -= task.slots
        self._report(task)

    def _report(self, task: Task) -> None:
        self.outbox.report(task, self._link, self.knobs, self._uuid())

    def _wake_at(self, due: float, task: Task) -> None:
        self._numbers += 1
        heapq.heappush(self._due, (due, self._numbers, task.id))

    def _delay(self, seconds: float) -> float:
        share = self.knobs.delay_jitter
        return seconds * self._rng.uniform(1 - share, 1 + share) if share else seconds

    # -- queries ----------------------------------------------------------------------------------------------------

    def query(self, name: str, authorization: str | None, now: float) -> Answer:
        """Answer `GET …/omni-image/{task_id or external_task_id}`."""
        return self._query(authorization, partial(self._one, name, now))

    def query_page(self, page: str, size: str, authorization: str | None, now: float) -> Answer:
        """Answer `GET …/omni-image?pageNum=&pageSize=`: newest first."""
        return self._query(authorization, partial(self._page, page, size, now))

    def query_many(self, params: Mapping[str, str], authorization: str | None, now: float) -> Answer:
        """Answer `GET /tasks?task_ids=` or `?external_task_ids=`, in the new shape. Refuses a JWT."""
        return self._query(authorization, partial(self._many, params, now), jwt_allowed=False)

    def _query(self, authorization: str | None, answer: Callable[[], Any], *, jwt_allowed: bool = True) -> Answer:
        with self.lock:
            request_id = self._uuid()
            self._counts["query"] += 1
            try:
                check_credentials(authorization, self.knobs, jwt_allowed=jwt_allowed)
                word = self._query_fault()
                if word.isdigit():
                    raise Refused(int(word))
                return Answer(200, success(request_id, answer()), cast(Breakage, word))
            except Refused as refusal:
                self._counts[f"query:{refusal.code}"] += 1
                return Answer(refusal.http_status, refusal.body(request_id))

    def _query_fault(self) -> str:
        fault = ""
        if self.knobs.query_faults:
            fault = self.knobs.query_faults.pop(0)
        elif self._chance(self.knobs.query_503_rate):
            fault = "5001"
        if fault:
            self._counts[f"fault:query:{fault}"] += 1
        return fault

    def _find(self, name: str, now: float) -> Task | None:
        task = self._known.get(name)
        return task if task and task.visible_ms <= _ms(now) else None

    def _one(self, name: str, now: float) -> dict[str, Any]:
        task = self._find(name, now)
        if task is None:
            raise Refused(1201, f"Task not found by id/external id: {name}")
        return self._read(task, now)

    def _page(self, page: str, size: str, now: float) -> list[dict[str, Any]]:
        number, length = _whole("pageNum", page, 1_000), _whole("pageSize", size, 500)
        newest_first = [task for task in reversed(self.tasks.values()) if task.visible_ms <= _ms(now)]
        return [self._read(task, now) for task in newest_first[(number - 1) * length : number * length]]

    def _many(self, params: Mapping[str, str], now: float) -> list[dict[str, Any]]:
        by_id, by_external = params.get("task_ids"), params.get("external_task_ids")
        if bool(by_id) == bool(by_external):
            raise Refused(1201, "Give either task_ids or external_task_ids")
        names = [name for name in (by_id or by_external or "").split(",") if name]
        if len(names) > MAX_IDS:
            raise Refused(1201, f"At most {MAX_IDS} ids per query")
        found = [task for name in names if (task := self._find(name, now))]
        fitting = [task for task in found if (task.id in names or task.alias in names) == bool(by_id)]
        return [self._read(task, now, new_shape=True) for task in fitting]

    def _read(self, task: Task, now: float, *, new_shape: bool = False) -> dict[str, Any]:
        """The record for a reader. Reading may make dead URLs work."""
        if task.ended:
            task.revision = max(task.live_from, task.revision + int(self.knobs.fresh_urls_on_read))
            if self.knobs.fresh_urls_on_read:
                task.expires = int(now) + self.knobs.result_lifetime_seconds
        if new_shape:
            return new_record(task, self._link)
        return old_record(task, self._link, task_info=self.knobs.task_info)

    # -- result files -----------------------------------------------------------------------------------------------

    def _link(self, task: Task, name: Name) -> str:
        return cdn.url(task, name, self._key, self.knobs.cdn_link_form)

    def download(self, path: str, query: Mapping[str, str], now: float) -> Download | None:
        """The answer to `GET /cdn/…`; None = 403. `query` may hold `hop`, the number of redirects followed so far."""
        with self.lock:
            match = cdn.PATH.match(path)
            task = self.tasks.get(match["task_id"]) if match else None
            if match is None or task is None or not cdn.is_valid(task, f"/cdn/{match['file']}", query, self._key, now):
                self._counts["cdn:403"] += 1
                return None
            name = Name(match["kind"], int(match["index"]))
            if name not in task.files():
                return None
            seconds = max(0.0, now - task.updated_ms / 1000)  # `advance` may have set tasks whose end is in the future
            self._hits[task.id, name] += 1
            if redirect := self._redirect(task.origin + path, query):
                self._counts["fault:cdn:redirect"] += 1
                return Download(task, name, "", redirect)
            fault = cdn.next_fault(self.knobs, self._rng, seconds)
            self._counts[f"fault:cdn:{fault}" if fault else "cdn:200"] += 1
            own_link = f"{task.origin}{path}?{_joined(query)}" if fault == "self_redirect" else None
            return Download(task, name, fault, own_link, seconds)

    def _redirect(self, url: str, query: Mapping[str, str]) -> str | None:
        if self.knobs.cdn_redirect_to:
            return self.knobs.cdn_redirect_to
        hop = int(query["hop"]) if query.get("hop", "").isdecimal() else 0
        if hop >= self.knobs.cdn_redirects:
            return None
        return f"{url}?{_joined({**query, 'hop': str(hop + 1)})}"

    def served(self, download: Download) -> None:
        """Note that the whole file was sent."""
        with self.lock:
            self._served[download.task.id, download.name] += 1

    # -- the ledger -------------------------------------------------------------------------------------------------

    def ledger(self) -> Ledger:
        """A copy of everything received and done so far. Draws pictures that were never requested, for their hashes."""
        with self.lock:
            tasks, gallery = list(self.tasks.values()), self.gallery
            creates, callbacks = tuple(self._creates), self.outbox.history()
            counts = self._counts.copy()
            held, peak = self._slots_held, self._slots_peak
        counts["fault:callback:dropped"] = sum(callback.dropped for callback in callbacks)
        return Ledger(creates, tuple(self._entry(task, gallery) for task in tasks), callbacks, counts, held, peak)

    def _entry(self, task: Task, gallery: Gallery) -> TaskEntry:
        assets = tuple(self._asset(task, name, gallery) for name in task.files())
        external = task.wanted.external_task_id
        return TaskEntry(task.id, external, task.status, task.created_ms, task.updated_ms, assets)

    def _asset(self, task: Task, name: Name, gallery: Gallery) -> Asset:
        facts, key = gallery.facts(task, name), (task.id, name)
        return Asset(
            external_task_id=task.key,
            task_id=task.id,
            kind=name.kind,
            index=name.index,
            sha256=facts.sha256,
            size=facts.size,
            path=cdn.path(task, name),
            hits=self._hits[key],
            served=self._served[key],
        )

    def _log_create(self, entry: Create) -> None:
        """Log a create. Bodies can be large, so the oldest are dropped beyond a limit."""
        self._creates.append(entry)
        self._kept_bytes += len(entry.raw)
        for old in self._creates:
            if self._kept_bytes <= MAX_KEPT_BODY_BYTES or old is entry:
                break
            self._kept_bytes -= len(old.raw)
            old.raw, old.body = b"", None

    # -- chance -----------------------------------------------------------------------------------------------------

    def _chance(self, rate: float) -> bool:
        return rate > 0 and self._rng.random() < rate

    def _uuid(self) -> str:
        return str(uuid.UUID(int=self._rng.getrandbits(128), version=4))

    def _task_id(self) -> str:
        while True:
            number = str(self._rng.randrange(10**17, 10**18))
            if number not in self._known:
                return number


def _joined(query: Mapping[str, str]) -> str:
    return "&".join(f"{key}={value}" for key, value in query.items())


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


def _whole(name: str, text: str, most: int) -> int:
    if not text.isdecimal() or not 1 <= int(text[:9]) <= most:
        raise Refused(1201, f"{name} must be an integer from 1 to {most}")
    return int(text)
