"""Tokens of the console that are used up, such as ended sessions: one row of `counter` each, until they expire.

A process writes what it uses up at once, and reads what others used up at most every three seconds.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable

import structlog
from sqlmodel import col, delete, select

from storage.database.sessions import Database, insert_or_ignore
from storage.errors import DatabaseUnavailable
from storage.rows.models import Counter

log = structlog.get_logger()

FRESH_SECONDS = 3.0
# Used tokens that are kept of one group. With one more, all tokens of the group that are older than these count as
# used, so that no used one is ever valid again.
MOST_USED = 1_000
# Tokens begin with the time of their expiry, in Unix seconds, so they are in its order.
EXPIRY_BYTES = 8
# They are kept this long after it, because another process's clock may be behind, and one that is ahead is set back.
KEPT_SECONDS = 30 * 86_400
# Rows that one statement deletes. The next one deletes others.
MOST_DELETED = 1_000
_NAME = "console used "


class UsedTokens:
    """The used tokens of each group, such as one person's sessions. Safe for threads. `now`: Unix seconds.

    `database`: what makes them known to other processes and after a restart; None: this process alone knows them. While
    the database is away, tokens are used up in this process, and are written once it is back.
    """

    def __init__(self, database: Database | None = None, now: Callable[[], float] = time.time) -> None:
        self._database = database
        self._now = now
        self._used: defaultdict[str, set[bytes]] = defaultdict(set)
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._fresh_until = -1.0

    def has(self, group: str, token: bytes) -> bool:
        """Whether the token is used up, as far as this process knows."""
        with self._lock:
            used = self._used[group]
            return token in used or (len(used) > MOST_USED and token < min(used))

    def use_up(self, group: str, token: bytes) -> bool:
        """Mark a token as used. Returns False if it was used before, also by another process."""
        is_new = self._add(group, token)
        if is_new and self._database is not None:
            try:
                with self._database.write() as session:
                    is_new = bool(insert_or_ignore(session, Counter, _row(group, token)))
            except DatabaseUnavailable as error:
                log.warning("console.used_token_not_stored", error=str(error))
        return is_new

    @property
    def is_behind(self) -> bool:
        """Whether it is time to catch up."""
        return self._database is not None and time.monotonic() > self._fresh_until

    def catch_up(self) -> None:
        """Read what others used up, write what only this process knows, and delete what has expired.

        Callers that come meanwhile wait for it, so that the first ones of a process know all.
        """
        with self._reading:
            if not self.is_behind:
                return
            try:
                self._read_and_write()
            except DatabaseUnavailable as error:
                log.info("console.used_tokens_not_read", error=str(error))
            self._fresh_until = time.monotonic() + FRESH_SECONDS

    def _read_and_write(self) -> None:
        assert self._database is not None
        own = (col(Counter.name) >= f"{_NAME}0", col(Counter.name) < f"{_NAME}g")  # a hexadecimal digit follows
        with self._database.read() as session:
            stored = set(session.exec(select(Counter.name).where(*own)))
        for name in stored:
            token, _, group = name.removeprefix(_NAME).partition(" ")
            self._add(group, bytes.fromhex(token))
        rows = {row["name"]: row for row in self._rows()}
        new, old = [rows[name] for name in rows.keys() - stored], sorted(stored - rows.keys())[:MOST_DELETED]
        if new or old:
            with self._database.write() as session:
                if new:
                    insert_or_ignore(session, Counter, new)
                session.execute(delete(Counter).where(col(Counter.name).in_(old)))

    def _rows(self) -> list[dict[str, str | int]]:
        """The rows of all used tokens. Those that have expired are forgotten."""
        oldest = max(0, int(self._now() - KEPT_SECONDS)).to_bytes(EXPIRY_BYTES, "big")
        with self._lock:
            for group, used in list(self._used.items()):
                self._used[group] = {token for token in used if token > oldest}
            return [_row(group, token) for group, used in self._used.items() for token in used]

    def _add(self, group: str, token: bytes) -> bool:
        """Whether this process did not know it."""
        with self._lock:
            used = self._used[group]
            is_new = token not in used
            used.add(token)
            if len(used) > MOST_USED + 1:
                used.remove(min(used))
            return is_new


def _row(group: str, token: bytes) -> dict[str, str | int]:
    return {"name": f"{_NAME}{token.hex()} {group}", "value": int.from_bytes(token[:EXPIRY_BYTES], "big")}
