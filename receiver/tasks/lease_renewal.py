"""Renewal of one lease outside of a worker, which renews the leases of its own rows (`receiver/workers/leases.py`)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from storage.background import background_thread
from storage.database.sessions import Database
from storage.errors import DatabaseUnavailable
from storage.rows import claims
from storage.rows.claims import Row

log = structlog.get_logger()


@contextmanager
def renewing_lease(database: Database, row: Row, *, lease_seconds: float) -> Iterator[None]:
    """Renew the claim on `row` every third of `lease_seconds` until the block ends.

    A lost claim stays lost: `claims.settle` raises `LostClaim`, and so does `claims.update_claimed` before. While the
    database is down, renewal is tried again a third later. After a crash the lease runs out. `lease_seconds`: of the
    claim and of each renewal.
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
            log.debug("claim.not_renewed", row=str(row.id), error=str(error))
        except Exception:
            log.exception("claim.not_renewed", row=str(row.id))
