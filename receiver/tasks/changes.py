"""Changes by an operator's command: one transaction that a dry run rolls back, and the tally that is printed."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sqlmodel import Session

from storage.database.sessions import Database


@dataclass
class Tally:
    """What a command did, counted, and the names it did nothing for: `{name: why}`. `tasks`: those that a batch's retry
    changed.
    """

    counts: Counter[str] = field(default_factory=Counter)
    left: dict[str, str] = field(default_factory=dict)
    tasks: list[uuid.UUID] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return not self.left


@contextmanager
def change(database: Database, *, dry_run: bool) -> Iterator[Session]:
    """A transaction that wakes the workers at its commit. A dry run rolls it back."""
    with database.write() as session:
        yield session
        database.wake(session)
        session.flush()
        if dry_run:
            session.rollback()
