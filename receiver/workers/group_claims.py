"""Claims in the transaction that makes rows due, for lanes that wait for rows.

A report makes dispatches and files due, and the same process often has idle threads for them. A claim of its own was
an fsync, a turn at SQLite's lock and two changes of threads. Rows that other processes make due are claimed as before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from sqlmodel import Session, exists, select

from receiver.workers.in_hand import RowsInHand
from receiver.workers.wake_ups import WakeUps
from storage.database.prepared import execute
from storage.database.sessions import Database
from storage.rows import claims

if TYPE_CHECKING:
    from receiver.workers.lanes import Lane


class GroupClaims:
    """What feeders want while they wait, and the rows that groups of writes have claimed for them. Thread-safe.

    `give_back`: releases rows of a lane that has ended.
    """

    def __init__(
        self,
        database: Database,
        lanes: Sequence[Lane],
        in_hand: RowsInHand,
        wake_ups: WakeUps,
        give_back: Callable[[list[Any]], None],
        *,
        lease_seconds: float,
    ) -> None:
        self._database = database
        self._lanes = [lane for lane in lanes if lane.beside is None and lane.slots is None]
        self._in_hand = in_hand
        self._wake_ups = wake_ups
        self._give_back = give_back
        self._lease_seconds = lease_seconds
        self._lock = threading.Lock()
        self._wanted: dict[str, int] = {}
        self._claimed: dict[str, list[Any]] = {lane.name: [] for lane in lanes}
        self._ended = set[str]()
        due = (exists(claims.any_due(lane.model, where=lane.where)) for lane in self._lanes)
        self._statement = select(*due)

    def want(self, lane: Lane, rows: int) -> None:
        """Say that the lane waits, and for how many rows at most."""
        with self._lock:
            self._wanted[lane.name] = rows

    def take(self, lane: Lane) -> list[Any]:
        """The rows that were claimed for the lane. It waits no more."""
        with self._lock:
            self._wanted.pop(lane.name, None)
            rows, self._claimed[lane.name] = self._claimed[lane.name], []
        return rows

    def end(self, lane: Lane) -> None:
        """Release the lane's rows, also those whose transaction is still to be committed."""
        with self._lock:
            self._ended.add(lane.name)
        self._give_back(self.take(lane))

    def claim(self, session: Session) -> Future[bool] | None:
        """Claim rows for the lanes that wait, at the end of a group that made any due.

        Returns what is to be resolved with whether the group was committed.
        """
        if not self._wanted or not self._database.wakes(session):
            return None
        session.flush()
        (are_due,) = execute(session, self._statement).rows
        found = dict[str, list[Any]]()
        with ExitStack() as if_it_fails:
            for lane in [lane for lane, is_due in zip(self._lanes, are_due, strict=True) if is_due]:
                with self._lock:
                    wanted = 0 if lane.circuit.is_open else self._wanted.pop(lane.name, 0)
                if wanted and if_it_fails.enter_context(self._in_hand.claiming(alone=False)):
                    found[lane.name] = claims.claim(
                        session, lane.model, limit=wanted, lease_seconds=self._lease_seconds, where=lane.where
                    )
            claiming = if_it_fails.pop_all()

        def end(is_committed: Future[bool]) -> None:
            with claiming:
                for name, rows in found.items() if is_committed.result() else ():
                    self._hand_over(name, rows)
            self._wake_ups.wake(found.keys())

        is_committed = Future[bool]()
        is_committed.add_done_callback(end)
        return is_committed

    def _hand_over(self, name: str, rows: list[Any]) -> None:
        self._in_hand.add(rows)
        with self._lock:
            has_ended = name in self._ended
            if not has_ended:
                self._claimed[name] += rows
        if has_ended:
            self._give_back(rows)
