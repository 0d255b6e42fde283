"""Hold a claim outside a worker process, whose own thread renews those in its hands (see receiver.worker)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from storage.background import background_thread
from storage.errors import DatabaseUnavailable
from storage.rows import claims
from storage.rows.claims import Row
from storage.rows.database import Database

log = structlog.get_logger()


@contextmanager
def renewing_lease(database: Database, row: Row, *, lease_seconds: float) -> Iterator[None]:
    """Renew the claim on `row` every third of its lease, for the first time after a third, until the block ends.

    A claim that is lost is not taken back: whoever settles the row hears `LostClaim`, and whoever must know before
    asks `claims.update_claimed`. While the database is away it is tried again a third later. A crash leaves a lease
    that runs out. `lease_seconds`: what each renewal gives, and what the claim was made for.
    """
    with background_thread("lease-renewal", lambda ended: _renew(database, row, lease_seconds, ended)):
        yield


def _renew(database: Database, row: Row, lease_seconds: float, ended: threading.Event) -> None:
    lease = row.lease
    while lease is not None and not ended.wait(lease_seconds / 3):
        try:
            with database.write() as session:
                claims.renew(session, type(row), [row.id], lease, lease_seconds)
        except DatabaseUnavailable as error:
            log.warning("claim.not_renewed", row=str(row.id), error=str(error))
        except Exception:
            log.exception("claim.not_renewed", row=str(row.id))
