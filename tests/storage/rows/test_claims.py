"""A row has one owner at a time, and an owner that lost its claim changes nothing. On both databases."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text

from storage.database.sessions import Database
from storage.errors import LostClaim
from storage.rows import claims
from storage.rows.deliveries import rematch
from storage.rows.models import Asset, Callback, Task
from storage.states import CallbackState
from tests.rows import LONG_AGO, new_asset, new_assets, new_task, stored

LEASE_SECONDS = 600  # never ends within a test
EXPIRED = -1  # a lease that has run out as soon as it is given


def claim(
    database: Database, model: Any = Asset, limit: int = 10, lease: float = LEASE_SECONDS, **how: Any
) -> list[Any]:
    with database.write() as session:
        return claims.claim(session, model, limit=limit, lease_seconds=lease, **how)


def test_files_that_expire_soonest_are_claimed_first(database: Database) -> None:
    with database.write() as session:
        task = new_task(session, due_at=None)
        for index, days in enumerate((3, None, 1, 2)):
            expiry = None if days is None else LONG_AGO + timedelta(days=days)
            new_asset(session, task, index, files_expire_at=expiry)
    order = [row.index for _ in range(4) for row in claim(database, limit=1)]
    assert order == [2, 3, 0, 1]


def test_callbacks_are_claimed_in_the_order_they_became_due(database: Database) -> None:
    with database.write() as session:
        for place in (2, 0, 1):
            due_at = LONG_AGO + timedelta(seconds=place)
            row = Callback(delivery_key=str(place), provider="k", source="push", body=b"", received_at=due_at)
            row.due_at = due_at
            session.add(row)
    assert [row.delivery_key for _ in range(3) for row in claim(database, Callback, 1)] == ["0", "1", "2"]


def test_claim_takes_due_rows_under_one_fresh_lease(database: Database) -> None:
    assets = new_assets(database, 3)
    with database.write() as session:
        new_asset(session, new_task(session), 9, due_at=LONG_AGO + timedelta(days=365_000))
    rows = claim(database)
    assert {row.id for row in rows} == {asset.id for asset in assets}
    assert len({row.lease for row in rows}) == 1
    assert {(row.attempts, row.losses) for row in rows} == {(1, 0)}
    assert claim(database) == []
    assert rows[0].lease is not None
    assert claim(database, where=[Asset.index == 0]) == []


def test_two_claimers_never_get_the_same_row(database: Database) -> None:
    new_assets(database, 60)
    taken: Counter[uuid.UUID] = Counter()

    def drain(_: int) -> None:
        while rows := claim(database, limit=3):
            taken.update(row.id for row in rows)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(drain, range(6)))
    # SKIP LOCKED may skip a row whose claimer has just ended, so the rest is claimed here.
    drain(0)
    assert (len(taken), set(taken.values())) == (60, {1})


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_locked_rows_are_skipped(database: Database) -> None:
    new_assets(database, 2)
    with database.write() as holder:
        claims.claim(holder, Asset, limit=1, lease_seconds=LEASE_SECONDS)
        assert [row.index for row in claim(database)] == [1]


def test_expired_lease_is_claimable_and_counts_as_a_loss(database: Database) -> None:
    new_assets(database, 1)
    seen = [(row.attempts, row.losses) for _ in range(3) for row in claim(database, lease=EXPIRED)]
    assert seen == [(1, 0), (2, 1), (3, 2)]


def test_delivery_whose_claim_is_taken_away_has_no_losses(database: Database) -> None:
    with database.write() as session:
        row = Callback(delivery_key="1", provider="k", source="push", body=b"", received_at=LONG_AGO, due_at=LONG_AGO)
        row.state, row.external_task_id = CallbackState.UNMATCHED, "known"
        session.add(row)
    assert [row.losses for _ in range(3) for row in claim(database, Callback, lease=EXPIRED)] == [0, 1, 2]
    with database.write() as session:
        assert rematch(session, uuid.uuid4(), "k", external_task_id="known") == 1
    assert [(row.attempts, row.losses) for row in claim(database, Callback)] == [(1, 0)]


@pytest.mark.parametrize("take_away", [claims.rest, claims.make_due])
def test_task_whose_claim_is_taken_away_has_no_losses(database: Database, take_away: Callable[[Task], None]) -> None:
    with database.write() as session:
        task = new_task(session)
    for _ in range(3):
        claim(database, Task, lease=EXPIRED)
    with database.write() as session:
        row = session.get_one(Task, task.id)
        take_away(row)
    assert (row.lease, row.attempts, row.losses) == (None, 0, 0)
    assert len(claim(database, Task)) == (take_away is claims.make_due)


def test_settling_resets_losses_and_sets_the_next_due_time(database: Database) -> None:
    new_assets(database, 2)
    claim(database, lease=EXPIRED)
    once, again = claim(database)
    with database.write() as session:
        claims.settle(session, once, due_in=None, error="no")
        claims.settle(session, again, due_in=-1)
    row = stored(database, once)
    assert (row["due_at"], row["lease"], row["losses"], row["error"]) == (None, None, 0, "no")
    assert [(row.id, row.losses) for row in claim(database)] == [(again.id, 0)]


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_renewal_skips_locked_rows(database: Database) -> None:
    new_assets(database, 3)
    rows = claim(database)
    with database.write() as settling, database.write() as renewing:
        claims.settle(settling, rows[1], due_in=None)
        renewing.execute(text("SET LOCAL lock_timeout = '5s'"))
        assert claims.renew(renewing, Asset, [row.id for row in rows], rows[0].lease, LEASE_SECONDS) == 2


def test_update_and_renewal_keep_the_claim(database: Database) -> None:
    new_assets(database, 2)
    rows = claim(database, lease=EXPIRED)
    with database.write() as session:
        claims.update_claimed(session, rows[0], key="k", size=2**40)
        assert claims.renew(session, Asset, [row.id for row in rows], rows[0].lease, LEASE_SECONDS) == 2
    assert claim(database) == []
    row = stored(database, rows[0])
    assert (row["key"], row["size"], row["lease"]) == ("k", 2**40, rows[0].lease)


def test_released_row_is_due_at_once_and_counts_no_attempt(database: Database) -> None:
    new_assets(database, 1)
    with database.write() as session:
        claims.release(session, *claims.claim(session, Asset, limit=1, lease_seconds=LEASE_SECONDS))
    (row,) = claim(database)
    assert (row.attempts, row.losses) == (1, 0)


@pytest.mark.parametrize("successor", ["holds it", "settled it"])
def test_owner_whose_lease_ran_out_changes_nothing(database: Database, successor: str) -> None:
    new_assets(database, 1)
    (frozen,) = claim(database, lease=EXPIRED)
    (owner,) = claim(database)
    if successor == "settled it":
        with database.write() as session:
            claims.settle(session, owner, due_in=None, sha256="good")
    before = stored(database, owner)
    for write in (claims.settle, claims.update_claimed):
        due_in = {"due_in": 0} if write is claims.settle else {}
        with pytest.raises(LostClaim), database.write() as session:
            write(session, frozen, sha256="bad", **due_in)
    with database.write() as session:
        claims.release(session, frozen)
        assert claims.renew(session, Asset, [frozen.id], frozen.lease, LEASE_SECONDS) == 0
    assert stored(database, owner) == before


def test_lost_claim_rolls_its_transaction_back(database: Database) -> None:
    new_assets(database, 2)
    first, second = claim(database)

    def settle(*rows: Asset) -> None:
        with database.write() as session:
            for row in rows:
                claims.settle(session, row, due_in=None)

    settle(second)
    with pytest.raises(LostClaim):
        settle(first, second)
    assert stored(database, first)["lease"] == first.lease


def test_unclaimed_row_cannot_be_settled(database: Database) -> None:
    (asset,) = new_assets(database, 1)
    with pytest.raises(LostClaim), database.write() as session:
        claims.settle(session, asset, due_in=None)
    assert stored(database, asset)["due_at"] == LONG_AGO


def test_row_that_lost_two_leases_is_not_in_quarantine(database: Database) -> None:
    new_assets(database, 1, losses=claims.QUARANTINE_AFTER - 1)
    with database.autocommit_reader() as connection:
        assert connection.execute(claims.any_due(Asset)).first()
        assert not connection.execute(claims.any_due(Asset, alone=True)).first()


def test_claim_in_turn_takes_the_row_that_has_waited_longest(database: Database) -> None:
    soonest, longest = new_assets(database, 2)
    with database.write() as session:
        session.get_one(Asset, soonest.id).due_at = LONG_AGO + timedelta(days=1)
        session.flush()
        for in_turn, first in ((True, longest), (False, soonest)):
            (row,) = claims.claim(session, Asset, limit=1, lease_seconds=60, in_turn=in_turn)
            assert row.id == first.id


def test_row_is_in_quarantine_after_three_losses(database: Database) -> None:
    new_assets(database, 1)
    for _ in range(claims.QUARANTINE_AFTER):
        assert claim(database, alone=True) == []
        assert len(claim(database, lease=EXPIRED)) == 1
    assert claim(database) == []
    losses = [row.losses for _ in range(4) for row in claim(database, lease=EXPIRED, alone=True)]
    assert losses == [3, 4, 5, claims.PARK_LOSSES]


@given(attempts=st.integers(0, 10_000), cap=st.floats(1, 1e6))
def test_backoff_is_bounded(attempts: int, cap: float) -> None:
    seconds = claims.backoff(attempts, cap=cap)
    assert 0.5 <= seconds <= max(0.5, min(cap, claims.BACKOFF_BASE_SECONDS * 2.0 ** min(attempts, 30)))
