"""Every kind of sink with its other side, for one suite over all of them."""

from __future__ import annotations

import json
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import update
from sqlmodel import col, select

from receiver.base.config import private_pairs
from receiver.base.signature import Signer
from receiver.events.cloudevents import Envelope, event_id
from receiver.events.dispatcher import Dispatcher, Message, Sink
from receiver.events.http_post import Poster
from receiver.events.lines import Lines
from receiver.events.sqs import Sqs
from receiver.events.webhook import Webhook
from receiver.gateway.answers import ResponseFormat
from receiver.gateway.client_callback import Clients, callback_id
from receiver.workers.lanes import Lane
from receiver.workers.worker import Worker
from storage.circuit import Circuit
from storage.database.sessions import Database
from storage.fetch.addresses import AddressPolicy
from storage.operations import outbox
from storage.operations.outbox import Subscription
from storage.rows.events import EventName, record
from storage.rows.models import Dispatch, Event
from tests.loopback import Listener
from tests.pipeline import running
from tests.rows import LONG_AGO, new_task
from tests.webhook_receiver import SECRET, Hook

STEPS = (EventName.TASK_SUBMITTED, EventName.TASK_PROCESSING, EventName.TASK_FAILED)
NAMES = frozenset(map(str, STEPS))
ENVELOPE = Envelope("https://pictures.example.com", "pictures")
WORDING = ResponseFormat("archived", lambda _: None)
RETRY_SECONDS = (60.0,) * 3
Arrival = tuple[str, str, str]


@dataclass
class Case:
    """One kind of sink with its other side. `arrived`: (id, external id, event name) in the order of arrival."""

    kind: str
    sink: Sink
    arrived: Callable[[], list[Arrival]]
    fail: Callable[[], None]
    heal: Callable[[], None]
    url: str = ""
    id_of: Callable[[str], str] = lambda event_id: event_id


def arrival(line: str | bytes) -> Arrival:
    event = json.loads(line)
    return event["id"], event["subject"], event["type"]


def poster(*hooks: Hook, seconds: float = 5) -> Poster:
    policy = AddressPolicy(private_hosts=private_pairs(tuple(hook.host for hook in hooks)))
    return Poster(policy, connections=8, timeout_seconds=seconds)


def signer(*secrets: str) -> Signer:
    return Signer([SecretStr(secret) for secret in secrets or (SECRET,)])


@contextmanager
def webhook_to(
    url: str, hook: Hook | None = None, *, seconds: float = 5, secrets: Sequence[str] = ()
) -> Iterator[Webhook]:
    """A webhook; `hook` is allowed to be private."""
    with closing(Webhook(url, poster(*([hook] if hook else []), seconds=seconds), signer(*secrets))) as sink:
        yield sink


@contextmanager
def webhook_case(_: Any) -> Iterator[Case]:
    with Hook() as hook, webhook_to(hook.url, hook) as sink:
        yield Case("webhook", sink, lambda: [arrival(got.body) for got in hook.taken], *failing(hook), hook.url)


@contextmanager
def client_case(request: pytest.FixtureRequest) -> Iterator[Case]:
    with client_case_of(request.getfixturevalue("database")) as (case, _):
        yield case


@contextmanager
def client_case_of(database: Database, *others: Hook) -> Iterator[tuple[Case, Hook]]:
    """Clients that may be called back at this hook, and at `others`."""
    with Hook() as hook, closing(Clients(database, poster(hook, *others), [SecretStr(SECRET)], WORDING)) as sink:
        yield (
            Case(
                "client", sink, lambda: [called_back(got) for got in hook.taken], *failing(hook), hook.url, callback_id
            ),
            hook,
        )


def failing(hook: Hook) -> tuple[Callable[[], None], Callable[[], None]]:
    return lambda: setattr(hook, "answer", lambda: 500), lambda: setattr(hook, "answer", lambda: 204)


def called_back(got: Any) -> Arrival:
    record = got.json
    return got.headers["webhook-id"], record["task_info"]["external_task_id"], f"task.{record['task_status']}"


@contextmanager
def lines_case(request: pytest.FixtureRequest) -> Iterator[Case]:
    folder: Path = request.getfixturevalue("tmp_path") / "there"
    folder.mkdir()
    file, away = folder / "events.jsonl", folder.with_name("away")

    def arrived() -> list[Arrival]:
        return [arrival(line) for line in file.read_bytes().splitlines()] if file.exists() else []

    yield Case("file", Lines(file), arrived, lambda: folder.rename(away) and None, lambda: away.rename(folder) and None)


@contextmanager
def sqs_case(request: pytest.FixtureRequest) -> Iterator[Case]:
    queues = request.getfixturevalue("queues")
    url = queues.create_queue(QueueName=uuid.uuid4().hex)["QueueUrl"]
    bodies: list[Arrival] = []

    def arrived() -> list[Arrival]:
        while found := queues.receive_message(QueueUrl=url, MaxNumberOfMessages=10).get("Messages"):
            bodies.extend(arrival(each["Body"]) for each in found)
            for each in found:
                queues.delete_message(QueueUrl=url, ReceiptHandle=each["ReceiptHandle"])
        return bodies

    name = url.rpartition("/")[2]
    with closing(Sqs(url)) as sink:
        yield Case(
            "sqs",
            sink,
            arrived,
            lambda: queues.delete_queue(QueueUrl=url) and None,
            lambda: queues.create_queue(QueueName=name) and None,
        )


CASES = {"webhook": webhook_case, "client": client_case, "file": lines_case, "sqs": sqs_case}


def record_steps(database: Database, case: Case, *steps: EventName, client: str | None = None) -> str:
    """Record these events of one task. Returns its external id."""
    with database.write() as session:
        task = new_task(session, client_callback_url=case.url or None, client=client)
    for step in steps:
        with database.write() as session:
            record(session, step, task.id, {"error": "no luck"} if step is EventName.TASK_FAILED else None)
    outbox.sequence_all(database, [Subscription("it", NAMES)])
    return task.external_task_id


def run(database: Database, case: Case, *, make_due_now: bool = False, circuit: Circuit | None = None) -> None:
    """Send what is due, like a worker. `make_due_now`: also what waits for a later time."""
    if make_due_now:
        with database.write() as session:
            session.execute(update(Dispatch).where(col(Dispatch.due_at).is_not(None)).values(due_at=LONG_AGO))
    work = Dispatcher(database, "it", case.sink, ENVELOPE, retry_seconds=RETRY_SECONDS, circuit=circuit)
    lane = Lane(
        "it", Dispatch, work.work, 1, circuit=circuit or Circuit(), work_many=work.work_many,
        batch=lambda: case.sink.batch,
    )  # fmt: skip
    Worker(database, [lane], lease_seconds=60, grace_seconds=0).run_until_idle()


@contextmanager
def sending(database: Database, case: Case) -> Iterator[None]:
    """Send like a worker process, with all of the sink's threads. At the end what is being sent has five seconds
    to end, so that no thread opens a connection of a sink that is closed.
    """
    work = Dispatcher(database, "it", case.sink, ENVELOPE, retry_seconds=RETRY_SECONDS)
    worker = Worker(database, [Lane("it", Dispatch, work.work, case.sink.threads)], lease_seconds=60, grace_seconds=5)
    with running(worker):
        yield


def dispatches(database: Database) -> list[Dispatch]:
    with database.read() as session:
        return list(session.exec(select(Dispatch).order_by(col(Dispatch.id))))


def ids(database: Database, case: Case) -> dict[str, str]:
    """{id: event name} of all expected messages."""
    with database.read() as session:
        return {case.id_of(event_id(event)): event.name for event in session.exec(select(Event)) if event.name in NAMES}


def of(arrivals: list[Arrival], external_task_id: str) -> list[str]:
    return [name for _, subject, name in arrivals if subject == external_task_id]


@contextmanager
def silent() -> Iterator[str]:
    """HOST:PORT that accepts connections and sends nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def endless(size: int) -> Iterator[str]:
    """HOST:PORT with one answer: 200, a part of a far longer body, and then nothing."""

    def answer(connection: socket.socket) -> None:
        connection.recv(65_536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n" + b"x" * size)
        while connection.recv(65_536):
            pass  # the rest of the request, until the client gives up

    with closing(Listener(answer)) as listener:
        yield f"127.0.0.1:{listener.port}"


def messages(count: int, **data: Any) -> list[Message]:
    made = []
    for number in range(count):
        event = Event(id=number + 1, seq=number + 1, name="task.failed", at=LONG_AGO, data=data, task_id=uuid.uuid4())
        made.append(Message(event_id(event), event, f"t{number}", ENVELOPE.encode(event, f"t{number}")))
    return made
