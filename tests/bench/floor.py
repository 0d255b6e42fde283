"""The floor of row 1: the bare endpoint and the least that can be called durable intake.

Starlette as the bare endpoint has it, then one thread that commits whatever has queued up with sqlite3 itself, one
statement a batch, `synchronous=FULL`, one table with one unique key. No token, no verdict, no bound, no other index.

    python -m tests.bench.floor PORT FILE
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import sys
import threading
from collections import deque
from itertools import chain

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from receiver.process import web_config

MOST = 256


class Intake:
    """Bodies in, an answer to each once it is durable."""

    def __init__(self, file: str) -> None:
        self._waiting: deque[tuple[asyncio.Future[None], bytes]] = deque()
        self._changed = threading.Condition()
        self._connection = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
        for words in ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL", "CREATE TABLE t (k TEXT UNIQUE, b BLOB)"):
            self._connection.execute(words)
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
            rows = [(hashlib.sha256(body).hexdigest(), body) for _, body in batch]
            places = ", ".join(["(?, ?)"] * len(rows))
            statement = f"INSERT INTO t VALUES {places} ON CONFLICT DO NOTHING"
            self._connection.execute(statement, tuple(chain.from_iterable(rows)))
            batch[0][0].get_loop().call_soon_threadsafe(_end, batch)


def _end(batch: list[tuple[asyncio.Future[None], bytes]]) -> None:
    for done, _ in batch:
        if not done.done():
            done.set_result(None)


def build(file: str) -> Starlette:
    intake = Intake(file)

    async def receive(request: Request) -> Response:
        body = await request.body()
        json.loads(body)
        await intake.put(body)
        return JSONResponse({"status": "ok"})

    return Starlette(routes=[Route("/callbacks/{provider}/{token}", receive, methods=["POST"])])


if __name__ == "__main__":
    uvicorn.Server(web_config(build(sys.argv[2]), "127.0.0.1", int(sys.argv[1]))).run()
