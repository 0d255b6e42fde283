"""`GET /events` on the real server: keys, filters, continuing after a cut, slow readers, the end of the server."""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy.event
from sqlalchemy import delete, text
from sqlmodel import Session

from receiver.app.wiring import Parts
from receiver.web import event_stream, reader_speed
from storage.database.sessions import Database
from storage.rows import events
from storage.rows.events import EventName, record
from storage.rows.models import Event, Task
from tests.harness import wait_until
from tests.pipeline import Web, Wired
from tests.rows import new_task

KEY, OTHER_KEY = "a-key-of-the-client", "another-key"
KEYS = {"Authorization": f"Bearer {KEY}"}
PATIENCE = httpx.Timeout(10)


@pytest.fixture
def database_kind() -> str:
    """The queries are tested on both databases in test_outbox."""
    return "sqlite"


@pytest.fixture
def changes() -> dict[str, Any]:
    return {"api_keys": f"{OTHER_KEY},{KEY}"}


def record_events(parts: Parts, *names: EventName, task: Task | None = None) -> None:
    for name in names:
        with parts.database.write() as session:
            record(session, name, task.id if task else None)
    parts.sequence()


def task_of(parts: Parts) -> Task:
    with parts.database.write() as session:
        return new_task(session, external_task_id=uuid.uuid4().hex)


@contextmanager
def reading(web: Web, query: str = "", **headers: str) -> Iterator[Iterator[dict[str, str]]]:
    """The fields of each event, and each comment and `retry`, in order."""
    with httpx.stream("GET", f"{web.url}/events{query}", headers={**KEYS, **headers}, timeout=PATIENCE) as answer:
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        yield fields(answer.iter_lines())


def fields(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    message: dict[str, str] = {}
    for line in lines:
        if not line and message:
            yield message
            message = {}
        elif line.startswith((":", "retry:")):
            name, _, value = line.partition(":")
            yield {name or "comment": value.strip()}
        elif line:
            name, _, value = line.partition(":")
            message[name] = value.strip()


def take(messages: Iterator[dict[str, str]], count: int) -> list[dict[str, str]]:
    """The next events, without comments and `retry`."""
    found: list[dict[str, str]] = []
    while len(found) < count:
        message = next(messages)
        found += [message] if "id" in message else []
    return found


def numbers(messages: list[dict[str, str]]) -> list[int]:
    return [int(message["id"]) for message in messages]


def status(web: Web, query: str = "", **headers: str) -> int:
    """Reads only the head: a stream has no end."""
    with httpx.stream("GET", f"{web.url}/events{query}", headers=headers, timeout=PATIENCE) as answer:
        return answer.status_code


def is_served(web: Web, key: str = KEY) -> bool:
    """Whether a new stream is served. One that is not ends at once and says when to reconnect."""
    with reading(web, Authorization=f"Bearer {key}") as messages:
        if next(messages) == {"retry": "2000"}:
            return True
        assert list(messages) == [{"retry": "5000"}]
        return False


@pytest.mark.parametrize("shown", ["", "Bearer", "Bearer nobody", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer{KEY}"])
def test_stream_without_a_valid_key_is_refused(web: Web, shown: str) -> None:
    assert status(web, Authorization=shown) == 401


def test_each_configured_key_opens_a_stream(web: Web, parts: Parts) -> None:
    for key in (KEY, OTHER_KEY):
        with reading(web, Authorization=f"Bearer {key}") as messages:
            record_events(parts, EventName.TASK_FAILED)
            assert len(take(messages, 1)) == 1


@pytest.mark.parametrize("query", ["?types=task.done", "?after=x", "?after=-1", "?after=99", "?after=" + "1" * 30])
def test_invalid_filter_or_number_is_refused(web: Web, query: str) -> None:
    assert status(web, query, **KEYS) == 400


def test_head_request_ends(web: Web) -> None:
    assert httpx.head(f"{web.url}/events", headers=KEYS).status_code == 200


def test_new_events_are_streamed_and_old_ones_are_not(web: Web, parts: Parts) -> None:
    task = task_of(parts)
    record_events(parts, EventName.TASK_SUBMITTED)
    with reading(web) as messages:
        record_events(parts, EventName.TASK_ARCHIVED, task=task)
        [message] = take(messages, 1)
    event = json.loads(message["data"])
    assert (message["id"], message["event"]) == ("3", "task.archived")
    assert (event["type"], event["subject"], event["specversion"]) == ("task.archived", task.external_task_id, "1.0")


def test_filter_skips_other_events(web: Web, parts: Parts) -> None:
    record_events(parts, *[EventName.TASK_PROCESSING] * 3, EventName.ASSET_FAILED, EventName.TASK_FAILED)
    for query in ("types=asset.*,task.failed", "types=asset.*&types=task.failed"):
        with reading(web, f"?after=0&{query}") as messages:
            assert [message["event"] for message in take(messages, 2)] == ["asset.failed", "task.failed"]
    with reading(web, "?types=asset.*,task.failed") as messages:
        next(messages)
        record_events(parts, EventName.TASK_PROCESSING, EventName.ASSET_FAILED)
        assert numbers(take(messages, 1)) == [7]


def test_after_accepts_the_sequence_of_an_event(web: Web, parts: Parts) -> None:
    record_events(parts, *[EventName.TASK_PROCESSING] * 3)
    with reading(web, "?after=0") as messages:
        sequence = json.loads(take(messages, 2)[-1]["data"])["sequence"]
    with reading(web, f"?after={sequence}") as messages:
        assert numbers(take(messages, 1)) == [3]


def test_reader_continues_after_a_cut_without_a_gap(web: Web, parts: Parts) -> None:
    """Readers come and go while events are written. Each continues where the last one was cut off."""
    ended = threading.Event()

    def telling() -> None:
        for _ in range(60):
            record_events(parts, *[EventName.TASK_PROCESSING] * 5)
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


def test_reader_continues_after_a_restart_of_the_server(parts: Parts) -> None:
    got: list[int] = []
    for start in range(2):
        record_events(parts, *[EventName.TASK_PROCESSING] * 4)  # while no server runs
        with closing(Wired(parts.settings, bucket=parts.bucket)) as on, Web(on) as web:
            with reading(web, **{"Last-Event-ID": str(got[-1] if got else 0)}) as messages:
                record_events(parts, *[EventName.TASK_PROCESSING] * 2)
                got += numbers(take(messages, 5))  # the last event is left to the next server
        assert len(got) == 5 * (start + 1)
    assert got == list(range(1, 11))


def test_reader_continues_after_its_last_event_was_pruned(web: Web, parts: Parts) -> None:
    record_events(parts, *[EventName.TASK_PROCESSING] * 3)
    with parts.database.write() as session:
        session.execute(delete(Event))
    with reading(web, **{"Last-Event-ID": "3"}) as messages:
        record_events(parts, EventName.TASK_FAILED)
        assert numbers(take(messages, 1)) == [4]


def test_new_request_wakes_the_streams_that_wait(web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "POLL_INTERVAL_SECONDS", 60)  # the new request reads before the poll does
    with reading(web) as messages:
        next(messages)
        record_events(parts, EventName.TASK_FAILED)
        assert httpx.head(f"{web.url}/events", headers=KEYS).status_code == 200
        assert numbers(take(messages, 1)) == [1]


def test_streams_that_follow_live_share_their_reads(web: Web, parts: Parts) -> None:
    pages: list[str] = []
    with ExitStack() as readers:
        streams = [readers.enter_context(reading(web)) for _ in range(8)]
        assert {next(stream)["retry"] for stream in streams} == {"2000"}
        sqlalchemy.event.listen(
            parts.database.reader, "before_cursor_execute",
            lambda *call: pages.append(call[2]) if "event.data" in call[2] else None,
        )  # fmt: skip
        record_events(parts, EventName.TASK_FAILED)
        assert [numbers(take(stream, 1)) for stream in streams] == [[1]] * 8
    assert len(pages) < 4


def test_polling_continues_after_an_unexpected_error(web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    look, bugs = events.newest_seq, [ZeroDivisionError()]
    with reading(web) as messages:

        def look_badly(session: Session) -> int:
            if bugs:
                raise bugs.pop()
            return look(session)

        monkeypatch.setattr(events, "newest_seq", look_badly)
        wait_until(lambda: not bugs)
        record_events(parts, EventName.TASK_FAILED)
        assert len(take(messages, 1)) == 1


def test_idle_stream_has_heartbeats(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "HEARTBEAT_SECONDS", 0.05)
    with reading(web) as messages:
        assert next(messages) == {"retry": "2000"}
        assert [next(messages), next(messages)] == [{"comment": "still there"}] * 2


def test_no_blank_line_makes_an_empty_event(web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """httpx-sse yields an event for each blank line once it has seen an id or a `retry`."""
    monkeypatch.setattr(event_stream, "HEARTBEAT_SECONDS", 0.05)
    record_events(parts, EventName.TASK_FAILED)
    with httpx.stream("GET", f"{web.url}/events?after=0", headers=KEYS, timeout=PATIENCE) as answer:
        lines = answer.iter_lines()
        found = [next(lines).partition(" {")[0] for _ in range(7)]
    heartbeats = [": still there"] * 2
    assert found == ["retry: 2000", "id: 1", "event: task.failed", "data:", "", *heartbeats]


def test_a_stream_that_cannot_be_served_says_when_to_reconnect(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "MAX_STREAMS", 0)
    answer = httpx.get(f"{web.url}/events", headers=KEYS)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert answer.text == ": too many streams are open\nretry: 5000\n"


def test_a_stream_while_the_database_is_away_says_when_to_reconnect(
    web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    away = Database(f"sqlite:///{tmp_path}/none/receiver.db")
    with closing(away), monkeypatch.context() as change:
        change.setattr(parts.database, "reader", away.reader)
        answer = httpx.get(f"{web.url}/events", headers=KEYS)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert answer.text == ": the database is down\nretry: 5000\n"
    assert is_served(web)


def test_one_key_leaves_half_of_the_streams_to_others(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "MAX_STREAMS", 2)
    with reading(web) as messages:
        next(messages)
        assert not is_served(web)
        assert is_served(web, OTHER_KEY)


@pytest.mark.parametrize("changes", [{"api_keys": KEY}], ids=["one key"])
def test_reader_who_leaves_frees_its_stream(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "MAX_STREAMS", 1)
    with reading(web) as messages:
        next(messages)
        assert not is_served(web)
    wait_until(lambda: is_served(web))


@contextmanager
def stuck(web: Web) -> Iterator[None]:
    """A reader that requests all events and reads only the first bytes."""
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        host, _, port = web.url.removeprefix("http://").partition(":")
        reader.connect((host, int(port)))
        reader.sendall(f"GET /events?after=0 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode())
        assert reader.recv(12) == b"HTTP/1.1 200"
        yield


def many_events(parts: Parts, count: int = 2_000) -> None:
    """Far more than the buffers of the connection hold."""
    with parts.database.write() as session:
        for _ in range(count):
            record(session, EventName.ASSET_FAILED, None, {"error": "x" * 4_000})
    parts.sequence()


@pytest.mark.parametrize("changes", [{"api_keys": KEY}], ids=["one key"])
@pytest.mark.parametrize(("seconds", "others"), [(60, False), (0.2, True)], ids=["waited for", "disconnected"])
def test_stuck_reader_holds_no_connection_to_the_database_and_is_disconnected(
    seconds: float, others: bool, web: Web, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`others`: whether other readers are served, which is the case once the stuck one is disconnected."""
    monkeypatch.setattr(reader_speed, "GRACE_SECONDS", seconds)
    monkeypatch.setattr(event_stream, "MAX_STREAMS", 1)
    many_events(parts)
    with stuck(web):
        wait_until(lambda: is_served(web) is others)
        wait_until(lambda: parts.database.reader.pool.checkedout() == 0)  # type: ignore[attr-defined]


def test_server_stops_at_once_while_streams_are_open(parts: Parts) -> None:
    with Web(parts) as web, reading(web) as messages:
        next(messages)
        ending = timed(lambda: web.__exit__())
        assert list(messages) == []  # a clean end, not a broken connection
    assert ending() < 10


def timed(work: Callable[[], Any]) -> Callable[[], float]:
    """Run `work` in a thread. The function returned waits for it and returns its seconds."""
    started, took = time.monotonic(), list[float]()
    thread = threading.Thread(target=lambda: (work(), took.append(time.monotonic() - started)))
    thread.start()
    return lambda: (thread.join(20), took[0])[1]


@pytest.mark.parametrize("changes", [{}], ids=["no key"])
def test_stream_is_404_without_api_keys(web: Web) -> None:
    assert status(web, **KEYS) == 404


@pytest.mark.parametrize("database_kind", ["postgresql"])
def test_waiting_readers_delay_neither_callbacks_nor_readiness(web: Web, parts: Parts) -> None:
    """More readers than Starlette has threads. The lock represents slow statements."""
    task = task_of(parts)
    record_events(parts, EventName.TASK_FAILED)
    with parts.database.write() as session, ExitStack() as readers:
        session.execute(text("LOCK TABLE event"))
        for key in [KEY, OTHER_KEY] * 24:
            readers.enter_context(reading(web, "?after=0", Authorization=f"Bearer {key}"))
        started = time.monotonic()
        path = f"{web.url}/callbacks/kling/{parts.tokens.sign('kling', task.id)}"
        assert httpx.post(path, content=b"{}", timeout=10).status_code == 200
        assert httpx.get(f"{web.url}/readyz", timeout=10).status_code == 200
        assert time.monotonic() - started < 3
