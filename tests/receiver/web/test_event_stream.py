"""`GET /events` on the real server: who may read, what comes, going on after a cut, slow readers, the end."""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from sqlalchemy import delete
from sqlmodel import Session

from receiver.app.wiring import Parts
from receiver.web import event_stream
from storage.rows import events
from storage.rows.events import EventName, record
from storage.rows.models import Event, Task
from tests.harness import wait_until
from tests.pipeline import Web
from tests.rows import new_task

KEY, OTHER_KEY = "a-key-of-the-client", "another-key"
KEYS = {"Authorization": f"Bearer {KEY}"}
PATIENCE = httpx.Timeout(10)


@pytest.fixture
def database_kind() -> str:
    """What is read is tested on both databases in test_outbox."""
    return "sqlite"


@pytest.fixture
def changes() -> dict[str, Any]:
    return {"api_keys": f"{OTHER_KEY},{KEY}"}


def tell(parts: Parts, *names: EventName, task: Task | None = None) -> None:
    for name in names:
        with parts.database.write() as session:
            record(session, name, task.id if task else None)
    parts.sequence()


def task_of(parts: Parts) -> Task:
    with parts.database.write() as session:
        return new_task(session, external_task_id=uuid.uuid4().hex)


@contextmanager
def reading(web: Web, query: str = "", **headers: str) -> Iterator[Iterator[dict[str, str]]]:
    """The fields of each message as they come."""
    with httpx.stream("GET", f"{web.url}/events{query}", headers={**KEYS, **headers}, timeout=PATIENCE) as answer:
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        yield fields(answer.iter_lines())


def fields(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    message: dict[str, str] = {}
    for line in lines:
        if not line and message:
            yield message
            message = {}
        elif line:
            name, _, value = line.partition(":")
            message[name or "comment"] = value.strip()


def take(messages: Iterator[dict[str, str]], count: int) -> list[dict[str, str]]:
    """The next events; what else is said is left out."""
    found: list[dict[str, str]] = []
    while len(found) < count:
        message = next(messages)
        found += [message] if "id" in message else []
    return found


def numbers(messages: list[dict[str, str]]) -> list[int]:
    return [int(message["id"]) for message in messages]


def status(web: Web, query: str = "", **headers: str) -> int:
    """Only the head is waited for: a stream has no end."""
    with httpx.stream("GET", f"{web.url}/events{query}", headers=headers, timeout=PATIENCE) as answer:
        return answer.status_code


@pytest.mark.parametrize("shown", ["", "Bearer", "Bearer nobody", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer{KEY}"])
def test_without_a_key_of_ours_nothing_is_told(web: Web, shown: str) -> None:
    assert status(web, Authorization=shown) == 401


def test_both_keys_open_it(web: Web, parts: Parts) -> None:
    for key in (KEY, OTHER_KEY):
        with reading(web, Authorization=f"Bearer {key}") as messages:
            tell(parts, EventName.TASK_FAILED)
            assert len(take(messages, 1)) == 1


@pytest.mark.parametrize("query", ["?types=task.done", "?after=x", "?after=-1", "?after=99", "?after=" + "1" * 30])
def test_what_makes_no_sense_is_refused(web: Web, query: str) -> None:
    assert status(web, query, **KEYS) == 400


def test_a_head_request_ends(web: Web) -> None:
    assert httpx.head(f"{web.url}/events", headers=KEYS).status_code == 200


def test_events_come_as_they_happen_and_none_from_before(web: Web, parts: Parts) -> None:
    task = task_of(parts)
    tell(parts, EventName.TASK_SUBMITTED)
    with reading(web) as messages:
        tell(parts, EventName.TASK_ARCHIVED, task=task)
        [message] = take(messages, 1)
    told = json.loads(message["data"])
    assert (message["id"], message["event"]) == ("3", "task.archived")
    assert (told["type"], told["subject"], told["specversion"]) == ("task.archived", task.external_task_id, "1.0")


def test_a_filter_leaves_the_rest_out_and_does_not_stop_at_it(web: Web, parts: Parts) -> None:
    tell(parts, *[EventName.TASK_PROCESSING] * 3, EventName.ASSET_FAILED, EventName.TASK_FAILED)
    with reading(web, "?after=0&types=asset.*,task.failed") as messages:
        assert [message["event"] for message in take(messages, 2)] == ["asset.failed", "task.failed"]
        tell(parts, EventName.TASK_PROCESSING, EventName.ASSET_FAILED)
        assert numbers(take(messages, 1)) == [7]


def test_after_a_cut_it_goes_on_without_a_gap(web: Web, parts: Parts) -> None:
    """Readers come and go while events are told; each goes on where the last one was cut off."""
    ended = threading.Event()

    def telling() -> None:
        for _ in range(60):
            tell(parts, *[EventName.TASK_PROCESSING] * 5)
        ended.set()

    teller = threading.Thread(target=telling)
    teller.start()
    got, cuts = [0], 0
    while len(got) <= 300:
        with reading(web, **{"Last-Event-ID": str(got[-1])}) as messages:
            got += numbers(take(messages, min(37, 301 - len(got))))
            cuts += 1
    teller.join()
    assert ended.is_set()
    assert got == list(range(301))
    assert cuts >= 8


def test_who_has_seen_all_goes_on_after_it_was_forgotten(web: Web, parts: Parts) -> None:
    tell(parts, *[EventName.TASK_PROCESSING] * 3)
    with parts.database.write() as session:
        session.execute(delete(Event))
    with reading(web, **{"Last-Event-ID": "3"}) as messages:
        tell(parts, EventName.TASK_FAILED)
        assert numbers(take(messages, 1)) == [4]


def test_one_that_comes_takes_no_news_from_those_that_wait(
    web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_stream, "POLL_INTERVAL_SECONDS", 60)  # so that it looks before the look-out of all does
    with reading(web) as messages:
        next(messages)
        tell(parts, EventName.TASK_FAILED)
        assert httpx.head(f"{web.url}/events", headers=KEYS).status_code == 200
        assert numbers(take(messages, 1)) == [1]


def test_a_bug_met_while_looking_out_ends_no_look_out(web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    look, bugs = events.newest_seq, [ZeroDivisionError()]
    with reading(web) as messages:

        def look_badly(session: Session) -> int:
            if bugs:
                raise bugs.pop()
            return look(session)

        monkeypatch.setattr(events, "newest_seq", look_badly)
        wait_until(lambda: not bugs)
        tell(parts, EventName.TASK_FAILED)
        assert len(take(messages, 1)) == 1


def test_silence_is_broken_now_and_then(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "HEARTBEAT_SECONDS", 0.05)
    with reading(web) as messages:
        assert next(messages) == {"retry": "2000"}
        assert [next(messages), next(messages)] == [{"comment": "still there"}] * 2


def test_there_are_only_so_many_at_once_and_who_leaves_makes_room(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "MAX_STREAMS", 1)
    with reading(web) as messages:
        next(messages)
        assert status(web, **KEYS) == 503
    wait_until(lambda: status(web, **KEYS) == 200)


@contextmanager
def stuck(web: Web) -> Iterator[None]:
    """A reader that asks for everything, is let in, and reads nothing."""
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        host, _, port = web.url.removeprefix("http://").partition(":")
        reader.connect((host, int(port)))
        reader.sendall(f"GET /events?after=0 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode())
        assert reader.recv(12) == b"HTTP/1.1 200"
        yield


def much(parts: Parts, count: int = 2_000) -> None:
    """Far more than the sockets between us hold."""
    with parts.database.write() as session:
        for _ in range(count):
            record(session, EventName.ASSET_FAILED, None, {"error": "x" * 4_000})
    parts.sequence()


@pytest.mark.parametrize(("seconds", "others"), [(60, 503), (0.2, 200)], ids=["waited for", "let go"])
def test_a_reader_that_does_not_read_holds_nothing_and_is_let_go(
    seconds: float, others: int, web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`others`: how they are answered while it counts, and afterwards."""
    monkeypatch.setattr(event_stream, "SEND_SECONDS", seconds)
    monkeypatch.setattr(event_stream, "MAX_STREAMS", 1)
    much(parts)
    with stuck(web):
        wait_until(lambda: status(web, **KEYS) == others)
        wait_until(lambda: parts.database.reader.pool.checkedout() == 0)  # type: ignore[attr-defined]


def test_the_server_ends_at_once_whoever_reads(parts: Parts) -> None:
    with Web(parts) as web, reading(web) as messages:
        next(messages)
        ending = timed(lambda: web.__exit__())
        assert list(messages) == []  # a clean end, not a broken connection
    assert ending() < 10


def timed(work: Callable[[], Any]) -> Callable[[], float]:
    """Do it in a thread; returns how to wait for how long it took."""
    started, took = time.monotonic(), list[float]()
    thread = threading.Thread(target=lambda: (work(), took.append(time.monotonic() - started)))
    thread.start()
    return lambda: (thread.join(20), took[0])[1]


@pytest.mark.parametrize("changes", [{}], ids=["no key"])
def test_without_keys_it_is_not_there(web: Web) -> None:
    assert status(web, **KEYS) == 404
