"""A fuzzer for the callback endpoint: bodies grown from recorded ones, headers of every kind, then all rows are
applied.

Bounded and seeded; the suite runs a short form, the long one is a command:

    .venv/bin/python -m tests.fuzz --bodies 100000 --database sqlite:///fuzz.db
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import random
import resource
import tempfile
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from sqlmodel import func, select

from receiver.app.wiring import Parts
from receiver.base import config, telemetry
from receiver.web import app
from storage.rows import migrations
from storage.rows.models import Callback, Task
from storage.states import Step, TaskState

CORPUS = [path.read_bytes() for path in sorted((Path(__file__).parent / "payloads").glob("*.json"))]
BODIES_PER_TASK = 100  # below the limit of one task, so that nearly all are stored
CONCURRENCY = 64
ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 2**64, 10**400, 1e308, "", "\0", "a\0b", "\ud800", "\udfff\ud800", "x" * 70_000, [], {},
    [[]], [None], {"": ""}, "https://p1.klingai.com/\0.png", "https://[::1", "http://169.254.169.254/", "javascript:1",
    "succeed", "failed", "SUCCEED ", "🦀", "\u202e", "NaN", [1] * 2_000, {"a": {"b": {"c": {"d": 1}}}},
)  # fmt: skip
ODD_BODIES = (
    b"", b" ", b"null", b"[]", b"{}", b"0", b'"', b"\xff\xfe\x00", b"\xef\xbb\xbf{}", b"{" * 5_000, b"[" * 100_000,
    b'{"a":' * 20_000 + b"1" + b"}" * 20_000, b"NaN", b"1e999999", b"9" * 5_000, b"<html></html>", b"\x1f\x8b\x08",
    b'{"task_id":"1","task_id":"2","task_status":"succeed"}', b'{"task_status":"succeed"}\0', b'{"task_id":1e400}',
)  # fmt: skip
ODD_HEADERS: tuple[tuple[str, str], ...] = (
    ("content-type", "text/html"), ("content-type", "application/json; charset=utf-16"), ("user-agent", "\xff" * 500),
    ("webhook-id", "x" * 400), ("webhook-timestamp", "99999999999999999999"), ("webhook-signature", "v1,AAAA " * 40),
    ("x-forwarded-for", "127.0.0.1"), ("transfer-encoding", "gzip"), ("expect", "100-continue"), ("cookie", "a=b"),
)  # fmt: skip


def bodies(chance: random.Random, count: int) -> Iterator[bytes]:
    """`count` bodies: recorded ones with values replaced, members dropped or doubled, bytes flipped, ends cut."""
    for _ in range(count):
        kind = chance.random()
        if kind < 0.05:
            yield chance.choice(ODD_BODIES)
        elif kind < 0.25:
            yield _bent(chance, chance.choice(CORPUS))
        else:
            document = json.loads(chance.choice(CORPUS))
            if chance.random() < 0.7:
                _unname(chance, document)
            for _ in range(chance.randint(1, 4)):
                _disturb(chance, document)
            yield json.dumps(document).encode("utf-8", "surrogatepass")


def _unname(chance: random.Random, document: dict[str, Any]) -> None:
    """Remove what contradicts the token, so that the rest is parsed and applied."""
    record = document.get("data", document)
    record.pop("task_info", None)
    record.pop("external_id", None)
    record["task_id" if "task_id" in record else "id"] = str(chance.randrange(10**17, 10**18))


def _bent(chance: random.Random, body: bytes) -> bytes:
    raw = bytearray(body)
    for _ in range(chance.randint(1, 6)):
        raw[chance.randrange(len(raw))] = chance.randrange(256)
    return bytes(raw[: chance.randint(1, len(raw))]) if chance.random() < 0.3 else bytes(raw)


def _disturb(chance: random.Random, node: Any) -> None:
    """Replace, drop or add one value somewhere below `node`."""
    while isinstance(node, dict | list) and node:
        place = chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
        child = node[place]
        if isinstance(child, dict | list) and child and chance.random() < 0.7:
            node = child
            continue
        if chance.random() < 0.2:
            del node[place]
        else:
            node[place] = copy.deepcopy(chance.choice(ODD_VALUES))
        return


def headers(chance: random.Random) -> dict[str, bytes]:
    chosen = chance.sample(ODD_HEADERS, chance.randint(0, 4))
    return {name: value.encode("latin-1") for name, value in chosen if name not in ("transfer-encoding", "expect")}


def insert_row(parts: Parts, count: int) -> list[str]:
    """Insert task rows, and return the paths of their callbacks, of the account's, and of two invalid ones."""
    paths = [f"/callbacks/kling/{parts.tokens.sign('kling', None)}", "/callbacks/kling/bad", "/callbacks/other/x"]
    with parts.database.write() as session:
        now = datetime.now(UTC)
        for number in range(count):
            task = Task(external_task_id=f"fuzz-{number}", provider="kling", created_at=now)
            task.state, task.step, task.due_at = TaskState.SUBMITTED, Step.READ, now + timedelta(days=1)
            session.add(task)
            paths.append(f"/callbacks/kling/{parts.tokens.sign('kling', task.id)}")
    return paths


async def send(parts: Parts, chance: random.Random, count: int) -> Counter[int]:
    """Send them all, 64 at a time. Returns how often each status was answered."""
    web = app.build(parts.database, parts.providers, parts.tokens, parts.schedule)
    paths = insert_row(parts, max(20, count // BODIES_PER_TASK))
    wanted = bodies(chance, count)
    answers: Counter[int] = Counter()
    async with web.lifespan_context(web):
        transport = httpx.ASGITransport(web, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            async def sender() -> None:
                for body in wanted:
                    answer = await client.post(chance.choice(paths), content=body, headers=headers(chance))
                    answers[answer.status_code] += 1

            await asyncio.gather(*(sender() for _ in range(CONCURRENCY)))
    return answers


def drain(parts: Parts) -> Counter[str]:
    """Apply everything. Returns how many deliveries ended in each state, and `retried` for those that met a bug."""
    callbacks = [lane for lane in parts.lanes() if lane.name == "callbacks"]
    parts.worker(callbacks).run_until_idle()
    with parts.database.read() as session:
        ends = Counter({state.value: n for state, n in session.exec(
            select(Callback.state, func.count()).group_by(Callback.state))})  # fmt: skip
        ends["retried"] = session.exec(select(func.count()).where(Callback.attempts > 1)).one()
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bodies", type=int, default=100_000)
    parser.add_argument("--database", default="")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    given = parser.parse_args()
    telemetry.configure("error", "console")
    with tempfile.TemporaryDirectory() as folder:
        url = given.database or f"sqlite:///{folder}/fuzz.db"
        parts = Parts(config.load(database_url=url, s3_bucket="unused", callback_secrets="f" * 40))
        migrations.upgrade(parts.database)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answers = asyncio.run(send(parts, random.Random(given.seed), given.bodies))
        sent = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ends = drain(parts)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"seed {given.seed}: answers {dict(answers)}; inbox {dict(ends)}")  # noqa: T201
    print(f"peak memory: start {before // 1024} MiB, sent {sent // 1024} MiB, drained {after // 1024} MiB")  # noqa: T201


if __name__ == "__main__":
    main()
