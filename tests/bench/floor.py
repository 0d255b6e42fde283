"""The floor of rows 1 to 3: the bare endpoint and the least that can be called durable intake.

Starlette as the bare endpoint has it, then one thread that commits whatever has queued up with the driver itself, one
statement a batch, `synchronous=FULL` or PostgreSQL's own, one table with one unique key. No token, no verdict, no
bound, no other index.

    python -m tests.bench.floor PORT sqlite:///FILE
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import sys
import threading
from collections import deque
from collections.abc import Callable
from itertools import chain

import psycopg
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from receiver.app.process import web_config

MOST = 256
Insert = Callable[[list[tuple[str, bytes]]], None]


class Intake:
    """Bodies in, an answer to each once it is durable."""

    def __init__(self, url: str) -> None:
        self._waiting: deque[tuple[asyncio.Future[None], bytes]] = deque()
        self._changed = threading.Condition()
        self._insert = _postgresql(url) if url.startswith("postgresql") else _sqlite(url.removeprefix("sqlite:///"))
        threading.Thread(target=self._run, daemon=True).start()

    async def put(self, body: bytes) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._changed:
            self._waiting.append((done, body))
            self._changed.notify()
        await done

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MOST))]
            self._insert([(hashlib.sha256(body).hexdigest(), body) for _, body in batch])
            batch[0][0].get_loop().call_soon_threadsafe(_end, batch)


def _sqlite(file: str) -> Insert:
    connection = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    for words in ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL", "CREATE TABLE floor (k TEXT UNIQUE, b BLOB)"):
        connection.execute(words)

    def insert(rows: list[tuple[str, bytes]]) -> None:
        places = ", ".join(["(?, ?)"] * len(rows))
        connection.execute(
            f"INSERT INTO floor VALUES {places} ON CONFLICT DO NOTHING", tuple(chain.from_iterable(rows))
        )

    return insert


def _postgresql(url: str) -> Insert:
    connection = psycopg.connect(url, autocommit=True)
    connection.execute("CREATE TABLE floor (k text UNIQUE, b bytea)")
    statement = "INSERT INTO floor SELECT * FROM unnest(%s::text[], %s::bytea[]) ON CONFLICT DO NOTHING"

    def insert(rows: list[tuple[str, bytes]]) -> None:
        connection.execute(statement, tuple(map(list, zip(*rows, strict=True))), binary=True)

    return insert


def _end(batch: list[tuple[asyncio.Future[None], bytes]]) -> None:
    for done, _ in batch:
        if not done.done():
            done.set_result(None)


def build(url: str) -> Starlette:
    intake = Intake(url)

    async def receive(request: Request) -> Response:
        body = await request.body()
        json.loads(body)
        await intake.put(body)
        return JSONResponse({"status": "ok"})

    return Starlette(routes=[Route("/callbacks/{provider}/{token}", receive, methods=["POST"])])


if __name__ == "__main__":
    uvicorn.Server(web_config(build(sys.argv[2]), "127.0.0.1", int(sys.argv[1]))).run()
