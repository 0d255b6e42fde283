"""Limits live streams and zip downloads. One person has at most half of them, in all sessions together."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from functools import partial
from typing import Any

from anyio import CancelScope, to_thread
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from receiver.console.visit import Visit


class Shares:
    """Safe for threads."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open = Counter[str]()
        self._lock = threading.Lock()

    def stream(self, visit: Visit, content: AsyncIterator[Any] | Iterator[Any], **options: Any) -> Response:
        """Stream the answer, and free its place however it ends. Raises HTTPException 503 if no place is free.

        HEAD needs no place.
        """
        person = visit.session.name
        if visit.request.method == "HEAD":
            return Streamed(iter(()), **options)
        with self._lock:
            if self._open.total() >= self._most or self._open[person] >= max(self._most // 2, 1):
                raise HTTPException(503, headers={"Retry-After": "30"})
            self._open[person] += 1
        return Streamed(content, partial(self.end, person), **options)

    def end(self, person: str) -> None:
        with self._lock:
            self._open[person] -= 1


class Streamed(StreamingResponse):
    """Closes a generator however the answer ends. A reader who leaves early would leave its connections open."""

    def __init__(
        self, content: AsyncIterator[Any] | Iterator[Any], on_end: Callable[[], None] = lambda: None, **options: Any
    ) -> None:
        super().__init__(content, **options)
        self._content, self._on_end = content, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()
            if isinstance(self._content, Generator):
                with CancelScope(shield=True):
                    await to_thread.run_sync(self._content.close)
