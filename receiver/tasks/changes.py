"""What a verb did to rows: one transaction that a dry run takes back, and the tally that the verb prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sqlmodel import Session

from storage.database.sessions import Database


@dataclass
class Tally:
    """What a verb did, counted, and what it was asked for by name and did not do: `{name: why}`."""

    counts: Counter[str] = field(default_factory=Counter)
    left: dict[str, str] = field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        return not self.left


@contextmanager
def change(database: Database, *, dry_run: bool) -> Iterator[Session]:
    """One transaction that wakes the workers, or that comes to nothing in a dry run."""
    with database.write() as session:
        yield session
        database.wake(session)
        session.flush()
        if dry_run:
            session.rollback()
