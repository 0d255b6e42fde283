"""Decides which callbacks are sent, how often and in which order. callbacks.py sends them."""

from __future__ import annotations

import json
import random
from dataclasses import replace

from receiver.sandbox.knobs import Knobs
from receiver.sandbox.ledger import Callback
from receiver.sandbox.tasks import Link, Task, callback_body


class Outbox:
    """Batches to send. Those of one batch are sent one after the other. Guarded by the world's lock."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._history: list[Callback] = []
        self._waiting: list[list[Callback]] = []
        self._held: dict[str, list[Callback]] = {}

    def report(self, task: Task, link: Link, knobs: Knobs, webhook_id: str) -> None:
        """Note one status change of a task. Its body is made now, whenever it is sent."""
        url = task.wanted.callback_url
        if url is None:
            return
        body = callback_body(
            task, link, shape=knobs.callback_shape, task_info=knobs.task_info, bare=knobs.callback_without_series
        )
        data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
        if knobs.callback_empty_rate and self._rng.random() < knobs.callback_empty_rate:
            data = b""
        callback = Callback(task.id, task.wanted.external_task_id, url, task.status, data, webhook_id)
        callback.dropped = self._is_dropped(task, knobs)
        # A copy has the same webhook-id, because it is the same message.
        copies = [callback, *(replace(callback, attempts=[]) for _ in range(knobs.callback_duplicates))]
        self._history.extend(copies)
        if not callback.dropped:
            self._post(task, copies, reorder=knobs.callback_reorder)
        elif task.ended:
            self._post(task, [], reorder=knobs.callback_reorder)

    def _is_dropped(self, task: Task, knobs: Knobs) -> bool:
        rate = knobs.callback_drop_rate
        return "[drop]" in task.wanted.prompt or (rate > 0 and self._rng.random() < rate)

    def _post(self, task: Task, copies: list[Callback], *, reorder: bool) -> None:
        if reorder and not task.ended:
            self._held.setdefault(task.id, []).extend(copies)
            return
        held = self._held.pop(task.id, [])
        self._waiting.append([*copies, *reversed(held)])

    def take(self) -> list[list[Callback]]:
        """Return the waiting batches. Each is returned once."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def history(self) -> tuple[Callback, ...]:
        """Copies of all callbacks, in the order of the status changes."""
        return tuple(replace(callback, attempts=list(callback.attempts)) for callback in self._history)
