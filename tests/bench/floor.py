"""The floor of rows 1 to 3: the minimal durable intake, with nothing around it.

An ASGI application that commits like the product: SQLite in the event loop, two turns after the first delivery of a
batch arrived, PostgreSQL over psycopg's async connection. One statement a batch, `synchronous=FULL` or PostgreSQL's
own, one table with one unique key. No token, no verdict, no bound, no other index, no lock against other writers.

    python -m tests.bench.floor PORT sqlite:///FILE
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import sqlite3
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import uvicorn

from receiver.app.process import web_config

MOST = 256
ANSWER = b'{"status":"accepted"}'
HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(ANSWER))]
Rows = list[tuple[str, bytes]]


class Intake:
    """Takes bodies, and answers each once it is durable."""

    def __init__(self, insert: Callable[[Rows], Awaitable[None]]) -> None:
        self._insert = insert
        self._waiting: list[tuple[asyncio.Future[None], bytes]] = []
        self._writing: asyncio.Task[None] | None = None

    async def put(self, body: bytes) -> None:
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((durable, body))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())
        await durable

    async def _write(self) -> None:
        while self._waiting:
            await asyncio.sleep(0)  # the second of two turns; the task began in the first
            batch, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
            await self._insert([(hashlib.sha256(body).hexdigest(), body) for _, body in batch])
            for durable, _ in batch:
                if not durable.done():
                    durable.set_result(None)


def sqlite_insert(file: str) -> Callable[[Rows], Awaitable[None]]:
    connection = sqlite3.connect(file, isolation_level=None)
    for words in ("journal_mode=WAL", "synchronous=FULL", "wal_autocheckpoint=16384"):
        connection.execute(f"PRAGMA {words}")
    connection.execute("CREATE TABLE floor (k TEXT UNIQUE, b BLOB)")

    async def insert(rows: Rows) -> None:
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("INSERT INTO floor VALUES (?, ?) ON CONFLICT DO NOTHING", rows)
        connection.execute("COMMIT")

    return insert


def postgresql_insert(url: str) -> Callable[[Rows], Awaitable[None]]:
    with psycopg.connect(url, autocommit=True) as first:
        first.execute("CREATE TABLE floor (k text UNIQUE, b bytea)")
    connection: psycopg.AsyncConnection[Any] | None = None

    async def insert(rows: Rows) -> None:
        nonlocal connection
        if connection is None:
            connection = await psycopg.AsyncConnection.connect(url, autocommit=True)
        statement = "INSERT INTO floor SELECT * FROM unnest(%s::text[], %s::bytea[]) ON CONFLICT DO NOTHING"
        await connection.execute(statement, tuple(map(list, zip(*rows, strict=True))), binary=True)

    return insert


def build(url: str) -> Any:
    is_sqlite = url.startswith("sqlite")
    intake = Intake(sqlite_insert(url.removeprefix("sqlite:///")) if is_sqlite else postgresql_insert(url))

    async def application(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for word in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{word}.complete"})
            return
        if scope["method"] == "POST":
            body, is_more = b"", True
            while is_more:
                message = await receive()
                body += message.get("body", b"")
                is_more = message.get("more_body", False)
            json.loads(body)
            await intake.put(body)
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        await send({"type": "http.response.body", "body": ANSWER})

    return application


if __name__ == "__main__":
    gc.freeze()
    uvicorn.Server(web_config(build(sys.argv[2]), "127.0.0.1", int(sys.argv[1]))).run()
