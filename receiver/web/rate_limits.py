"""Rate limits: one action per task and interval, and delayed answers."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import AbstractContextManager, nullcontext, suppress

from starlette.types import Receive, Scope

from receiver.tasks.allowance import Allowance
from storage.background import CONNECTION

REMEMBERED_TASKS = 10_000
# How many answers that need no key are sent at once, each second and after a pause; health checks ask once a second.
# Others are held this long. Together with the wait of `/readyz` that is less than a load balancer waits.
KEYLESS_A_SECOND, MOST_KEYLESS = 50, 200
HOLD_SECONDS = 0.25
# Refusals that need no key. A client of the gateway that asks for an unknown task gets a 400.
KEYLESS_STATUSES = (401, 404, 405)


class RateLimit:
    """Allows one action per task and interval, so that refusing a delivery never costs more than accepting one."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._not_before: dict[uuid.UUID | None, float] = {}

    def now(self, task_id: uuid.UUID | None) -> bool:
        now = time.monotonic()
        if now < self._not_before.get(task_id, now):
            return False
        while len(self._not_before) >= REMEMBERED_TASKS:
            self._not_before.pop(next(iter(self._not_before)))
        self._not_before[task_id] = now + self._seconds
        return True

    def take_back(self, task_id: uuid.UUID | None) -> None:
        """Call it if the action failed."""
        self._not_before.pop(task_id, None)


def held(scope: Scope) -> AbstractContextManager[None]:
    """A block that delays an answer. Its connection makes room for others if the server supports that."""
    connection = scope.get("extensions", {}).get(CONNECTION)
    return connection.hold() if connection else nullcontext()


async def hold_back(scope: Scope, receive: Receive, seconds: float, most_body_bytes: int) -> None:
    """Delay a refusal, and read the rest of its request's body, which then takes no memory. Ends early if the client
    leaves, or sends more than `most_body_bytes`: then the answer ends the connection.
    """
    with held(scope), suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while most_body_bytes >= 0 and (message := await receive())["type"] != "http.disconnect":
                most_body_bytes -= len(message.get("body", b""))


class KeylessAnswers:
    """Holds answers that need no key back while there are many of them, refusals included.

    A client that waits sends no next request on its connection, so the number of connections bounds the CPU of a flood.
    It bounds their memory too, as these connections make room before honest ones.
    """

    def __init__(self) -> None:
        self._prompt = Allowance(KEYLESS_A_SECOND, MOST_KEYLESS)

    async def wait(self, scope: Scope) -> None:
        """Delay an answer that needs no key if there were too many this second."""
        if self._prompt.is_spent:
            with held(scope):
                await asyncio.sleep(HOLD_SECONDS)
        else:
            self._prompt.spend(1)
