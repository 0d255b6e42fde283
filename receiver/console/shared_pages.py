"""Pages that live consoles fetch again. Consoles that look at the same view share one rendering per tick.

Ten consoles at 50 callbacks a second took 27 ms of CPU a second without sharing.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from starlette.responses import Response

from receiver.console.access import Session
from receiver.console.visit import Visit
from storage.background import RestingTurns, Turn, while_connected

# Numbers that change with time alone, and the pages of a process without open streams, are at most this old.
FRESH_SECONDS = 3.0
# Views that are kept; each has less than 100 kB.
MAX_KEPT = 64
RETRY_AFTER_SECONDS = 3  # the script fetches a page as often


class _Shared(NamedTuple):
    tick: int
    at: float
    turn: Turn[Response]


class SharedPages:
    """`tick`: a number that grows with every change that live consoles are informed of."""

    def __init__(self, tick: Callable[[], int]) -> None:
        self._tick = tick
        # Stands for the reader's CSRF token, has its length, and cannot be guessed by those who send us text. It is
        # replaced in the field of a form alone, whose quotes no escaped text contains.
        self._token = secrets.token_hex(16)
        self._kept: OrderedDict[tuple[str, str, bool], _Shared] = OrderedDict()
        self._turns = RestingTurns()

    async def answer(self, visit: Visit, make: Callable[[Visit], Response]) -> Response:
        """The page for this reader, from a rendering that is as new as the last change; 503 if too many wait.

        The key contains everything that the page shows, except the CSRF token, which is filled in here, and the
        reader's name, which no live part shows. The first reader's turn serves all, and ends with the last one.
        """
        key = (str(visit.request.url), visit.language, visit.session.may_act)
        found = self._kept.pop(key, None)
        is_old = found is None or found.tick != self._tick() or found.at < time.monotonic() - FRESH_SECONDS
        if found is None or is_old or found.turn.is_given_up:
            anyone = dataclasses.replace(visit, session=Session("", visit.session.may_act, b"", self._token))
            turn = self._turns.queue(visit.session.name, partial(make, anyone))
            if turn is None:
                return Response(status_code=503, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})
            found = _Shared(self._tick(), time.monotonic(), turn)
        self._kept[key] = found
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        answer = await while_connected(visit.request.receive, found.turn.result())
        if answer is None:
            return Response(status_code=503)  # nobody reads it
        anyones, own = (f'name="csrf" value="{token}"'.encode() for token in (self._token, visit.session.csrf))
        return Response(bytes(answer.body).replace(anyones, own), answer.status_code, answer.headers)

    def forget(self) -> None:
        """Render all pages again from now on, because a person acts."""
        self._kept.clear()
