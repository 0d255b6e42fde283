"""Creates through the gateway: read the request, commit a row, answer with its outcome.

body ─▶ request ─▶ begin: row (and Idempotency-Key) committed ─▶ send ─┬─ refused ─▶ row failed, refusal passed on
                    │                                                  └─ else ────▶ 200 submitted, the row goes on
                    └─ the key is taken ─▶ its first answer, once there is one
"""

from __future__ import annotations

import hashlib
import json
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog
from sqlmodel import Session

from receiver.gateway.answers import (
    Refused,
    Reply,
    ResponseFormat,
    already_exists,
    away,
    bad_parameter,
    created,
    passed_on,
    status_of,
    success,
    too_fast,
)
from receiver.gateway.create_body import read_fields
from receiver.providers.base import RequestInvalid, is_storable, plain
from receiver.providers.kling.request import OmniImageRequest, parse_request
from receiver.tasks.create_outcome import CreateOutcome, Refusal
from receiver.tasks.submit import Submitter
from storage.accounts import idempotency
from storage.accounts.idempotency import Key
from storage.database.sessions import Database, again_on_new_session
from storage.errors import AccountRefused, DatabaseUnavailable, FetchRefused, NoRoom, NoSlots, ProviderThrottled
from storage.fetch.addresses import AddressPolicy, check_url
from storage.keys import check_new_id
from storage.rows import tasks
from storage.rows.models import Idempotency, Task
from storage.states import Step

log = structlog.get_logger()

# Kling's documented default.
DEFAULT_MODEL = "kling-image-o1"
DEFAULT_MODEL_NOTE = f"{tasks.DEFAULTED}the request named no model_name, so it is for {DEFAULT_MODEL}"
# A UUID has 36. A longer key can be hashed by the client.
MAX_KEY_CHARS = 255
# A duplicate waits this long for the first's answer: while it is being sent, and then for its commit.
UNDER_WAY_SECONDS, ANSWER_SECONDS = 20.0, 2.0
# The time of a create and, after an unclear answer, of its read: 20 s each, and the commits around them.
SEND_SECONDS = 45.0
# More faults than a person reads. A request may have a fault in each of its fields.
MAX_MESSAGE_CHARS = 1_000


@dataclass(frozen=True)
class CreateRequest:
    """One valid create. `client`: the fingerprint of its API key. `callback_url`: the client's own, a secret. `key`:
    its Idempotency-Key, if given. `note`: for the row, about an assumed default.
    """

    request: OmniImageRequest = field(repr=False)
    client: str
    external_task_id: str | None
    callback_url: str | None = field(repr=False)
    key: Key | None = None
    note: str | None = None


@dataclass(frozen=True)
class StartedCreate:
    """A committed row. `first` False: this request, or an equal one, took the key before; nothing is sent."""

    task: Task
    first: bool


@dataclass
class DuplicateWait:
    """How long a duplicate waits for the first request's answer, in monotonic seconds."""

    began_at: float
    _ended_at: float | None = None

    def is_over(self, *, is_under_way: bool, now: float) -> bool:
        """Whether the wait is over. A duplicate waits as long as the first create is being sent. Afterwards it waits a
        short time, because the answer is about to be committed.
        """
        if self._ended_at is None and not is_under_way:
            self._ended_at = now
        if self._ended_at is None:
            return now - self.began_at >= UNDER_WAY_SECONDS
        return now - self._ended_at >= ANSWER_SECONDS


class Creates:
    """The synchronous half of `POST …/omni-image`. Safe for threads.

    `callback_policy`: the hosts that clients may name for callbacks. `own_only`: see `ApiKeys`.
    """

    def __init__(
        self,
        database: Database,
        submitter: Submitter,
        response_format: ResponseFormat,
        callback_policy: AddressPolicy,
        *,
        own_only: bool = False,
    ) -> None:
        self._database = database
        self._submitter = submitter
        self._response_format = response_format
        self._callback_policy = callback_policy
        self._own_only = own_only
        self._sends, self._send_ended = 0, threading.Condition()

    def read(self, body: bytes | bytearray, client: str, key_word: str) -> CreateRequest:
        """Read the request. `client`: the fingerprint of its API key. `key_word`: its Idempotency-Key, empty = none.

        Raises `Refused`, which names the field.
        """
        fields = read_fields(body)
        external_task_id = _text(fields, "external_task_id")
        if external_task_id is not None:
            _check_id(external_task_id)
        callback_url = _text(fields, "callback_url")
        if callback_url is not None:
            callback_url = self._checked_url(callback_url)
        rest = {name: value for name, value in fields.items() if name not in ("external_task_id", "callback_url")}
        note = None
        if rest.get("model_name") in (None, ""):
            rest["model_name"], note = DEFAULT_MODEL, DEFAULT_MODEL_NOTE
        try:
            request = parse_request(rest)
        except RequestInvalid as error:
            raise _invalid(error) from None
        key = _key(client, key_word, fields) if key_word else None
        return CreateRequest(request, client, external_task_id, callback_url, key, note)

    def _checked_url(self, url: str) -> str:
        try:
            return check_url(url, self._callback_policy).url
        except FetchRefused as error:
            raise bad_parameter(f"callback_url: {error}") from None

    def begin(self, ask: CreateRequest) -> StartedCreate:
        """Commit the row together with the key. After a crash a worker continues the row.

        Raises `Refused` and keeps nothing if the id exists, the key was used for another body, no slots are free, the
        account is paused, or the disk has no room for the callback.
        """
        try:
            return again_on_new_session(lambda: self._commit(ask))
        except RequestInvalid as error:
            raise _invalid(error) from None
        except AccountRefused as error:  # the provider's last answer; a trial follows once a minute
            raise passed_on(error) from None
        except NoRoom as error:
            raise away(str(error)) from None
        except NoSlots as error:
            raise Refused(429, 1303, f"parallel task over resource pack limit: {error}", after=1) from None

    def _commit(self, ask: CreateRequest) -> StartedCreate:
        wanted = self._submitter.row(ask.request, ask.external_task_id)
        wanted.client, wanted.client_callback_url, wanted.note = ask.client, ask.callback_url, ask.note

        def commit(session: Session) -> StartedCreate:
            known = idempotency.take(session, ask.key, wanted.id) if ask.key else None
            if known is not None and ask.key is not None:
                _check_same(known, ask.key)
                return StartedCreate(session.get_one(Task, known.task_id), first=False)
            return StartedCreate(self._insert(session, wanted, ask.key), first=True)

        if self._database.is_sqlite:
            return self._database.write_in_group(commit)
        with self._database.write() as session:  # it may wait for the account's row or for the key
            return commit(session)

    def _insert(self, session: Session, wanted: Task, key: Key | None) -> Task:
        """The row of a new id, or of one whose create was refused: Kling lets such an id be used again."""
        if self._submitter.insert(session, wanted):
            return wanted
        again = self._submitter.insert_again(session, wanted, of_client=wanted.client if self._own_only else None)
        if again is None:
            raise already_exists(wanted.external_task_id)
        if key:
            idempotency.point_to(session, key, again.id)
        return again

    def send(self, begun: StartedCreate, outcome_listener: CreateOutcome) -> None:
        if begun.task.queued_at is not None:
            return  # a worker sends it
        with self._send_ended:
            self._sends += 1
        try:
            self._submitter.create_step.send(begun.task, outcome_listener)
        finally:
            with self._send_ended:
                self._sends -= 1
                self._send_ended.notify_all()

    def join(self) -> None:
        """Wait until the answers to all creates that are being sent are in their rows, at most `SEND_SECONDS`."""
        with self._send_ended:
            self._send_ended.wait_for(lambda: not self._sends, SEND_SECONDS)

    def conclude(self, ask: CreateRequest, begun: StartedCreate, refusal: Refusal | None, request_id: str) -> Reply:
        """The answer to a create that was sent. It is stored under its key.

        An answer "slow down" is not stored: nothing was made, and the client asks again. Never raises for our own
        faults: the create was sent, and a client that got 503 would send it twice. If the answer could not be stored,
        the key answers with the row's state, as after a crash.
        """
        refused = passed_on(refusal) if refusal else None
        reply = refused.reply(request_id) if refused else success(created(self._latest(begun)), request_id)
        if ask.key:
            try:
                self._remember(ask.key, begun.task.id, refusal, reply)
            except DatabaseUnavailable as error:
                log.error("gateway.answer_not_stored", **tasks.named(begun.task), error=str(error))
            except Exception:
                log.exception("gateway.answer_not_stored", **tasks.named(begun.task))
        return reply

    def _latest(self, begun: StartedCreate) -> Task:
        """The current row, or the row as it was committed if it cannot be read."""
        try:
            return self._row(begun)
        except DatabaseUnavailable as error:
            log.error("gateway.row_not_read", **tasks.named(begun.task), error=str(error))
        except Exception:
            log.exception("gateway.row_not_read", **tasks.named(begun.task))
        return begun.task

    def _remember(self, key: Key, task_id: uuid.UUID, refusal: Refusal | None, reply: Reply) -> None:
        with self._database.write() as session:
            if isinstance(refusal, ProviderThrottled):
                idempotency.give_back(session, key, task_id)
            else:
                idempotency.answer(session, key, task_id, reply.http_status, reply.body)

    def replay(
        self, ask: CreateRequest, begun: StartedCreate, request_id: str, duplicate_wait: DuplicateWait, *, now: float
    ) -> Reply | None:
        """The stored answer of the key; None: it may come soon, so look again.

        `duplicate_wait`: the same at every call. `now`: monotonic seconds. If no answer comes (after a crash), the
        answer is the row's state. Raises `Refused` if the key was given back, also if a later create has taken it.
        """
        assert ask.key is not None
        with self._database.read() as session:
            first = idempotency.find(session, ask.key)
        task = self._row(begun)
        if first is None or first.task_id != task.id or first.status is not None:
            return _answered(first, task)
        is_under_way = task.step is Step.CREATE and task.lease is not None
        if not duplicate_wait.is_over(is_under_way=is_under_way, now=now):
            return None
        reply = success(created(task, status_of(task, self._response_format.results)), request_id)
        with self._database.write() as session:
            idempotency.answer(session, ask.key, task.id, reply.http_status, reply.body)
            first = idempotency.find(session, ask.key)  # the first create's own answer, if it came meanwhile
        return _answered(first, task)

    def _row(self, begun: StartedCreate) -> Task:
        with self._database.read() as session:
            return session.get_one(Task, begun.task.id)


def _answered(first: Idempotency | None, task: Task) -> Reply:
    if first is None or first.task_id != task.id or first.status is None:
        raise too_fast("the first request with this Idempotency-Key was not accepted; send it again")
    return Reply(first.status, first.answer or {})


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    """A text. An empty one counts as left out, as the provider's own example sends it."""
    value = fields.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str) or not is_storable(value):
        raise bad_parameter(f"{name}: must be text, without NUL and lone surrogates")
    return value


def _invalid(error: RequestInvalid) -> Refused:
    return bad_parameter(plain("; ".join(error.faults), MAX_MESSAGE_CHARS))


def _check_id(external_task_id: str) -> None:
    try:
        check_new_id(external_task_id)
    except ValueError as error:
        raise bad_parameter(str(error)) from None


def _key(client: str, word: str, fields: Mapping[str, Any]) -> Key:
    """Bodies with equal JSON have the same hash, however they are written."""
    if len(word) > MAX_KEY_CHARS or not is_storable(word):
        raise bad_parameter(f"Idempotency-Key: at most {MAX_KEY_CHARS} characters")
    digest = hashlib.sha256()
    for piece in json.JSONEncoder(sort_keys=True, separators=(",", ":")).iterencode(
        fields
    ):  # hash one picture at a time
        digest.update(piece.encode())
    return Key(client, word, digest.hexdigest())


def _check_same(known: Idempotency, key: Key) -> None:
    if known.body_hash != key.body_hash:
        raise Refused(409, 1201, "Idempotency-Key: was used with another request body; choose another key")
