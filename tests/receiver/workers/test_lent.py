"""A thread that waits for a commit lends its place: others begin meanwhile, and never more than the lane allows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest

from receiver.app.wiring import Parts
from receiver.workers import worker
from receiver.workers.lanes import Batches, Lane
from storage.database.sessions import Database
from storage.rows.models import Asset
from tests.harness import wait_until
from tests.receiver.workers.test_worker import Desk, assets_lane, running
from tests.receiver.workers.test_worker import desk as desk  # a fixture
from tests.rows import new_assets

THREADS = 2


class Commits:
    """The first `many` rows wait for their commit with their places lent, until `done`. The others keep theirs."""

    def __init__(self, desk: Desk, many: int, most_lent: int) -> None:
        self._desk, self._left = desk, iter(range(many))
        self.batches, self.done, self.begun = Batches(most_lent), threading.Event(), 0

    def work(self, row: Any) -> None:
        waits = next(self._left, None) is not None
        self.begun += 1
        with self.batches.lent() if waits else nullcontext():
            if waits:
                self.done.wait(20)
        self._desk.work(row)

    def lane(self, **options: Any) -> Lane:
        return assets_lane(self.work, THREADS, batches=self.batches, **options)


def settles_at(check: Callable[[], int], count: int) -> None:
    wait_until(lambda: check() == count)
    with pytest.raises(AssertionError):
        wait_until(lambda: check() > count, seconds=0.3)


@pytest.mark.databases("sqlite")
def test_other_rows_begin_while_commits_are_waited_for(database: Database, desk: Desk) -> None:
    assets, commits = new_assets(database, 7), Commits(desk, many=7, most_lent=3)
    with running(database, commits.lane()):
        settles_at(lambda: commits.begun, THREADS + 3)
        commits.done.set()
        wait_until(lambda: len(desk.done) == len(assets))
    assert sorted(desk.done) == sorted(asset.id for asset in assets)


@pytest.mark.databases("sqlite")
def test_at_most_as_many_rows_are_in_work_as_there_are_threads(database: Database, desk: Desk) -> None:
    desk.gate.clear()
    assets, commits = new_assets(database, 7), Commits(desk, many=1, most_lent=4)
    with running(database, commits.lane()):
        settles_at(lambda: commits.begun, 1 + THREADS)
        commits.done.set()  # it goes on beside the others, and no row begins before two are done
        settles_at(lambda: commits.begun, 1 + THREADS)
        desk.gate.set()
        wait_until(lambda: len(desk.done) == len(assets))


@pytest.mark.databases("sqlite")
def test_row_that_waits_for_a_place_goes_to_another_worker(
    database: Database, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "LASTING_SECONDS", 0.3)
    desk.gate.clear()
    new_assets(database, 8)
    commits, other = Commits(desk, many=2, most_lent=4), Desk(database)
    with running(database, commits.lane(ahead=2)):
        wait_until(lambda: len(desk.begun) == THREADS)
        with running(database, assets_lane(other.work, 1)):
            wait_until(lambda: len(other.done) == 8 - 2 - THREADS)
        commits.done.set()
        desk.gate.set()
    assert len(desk.done) == 2 + THREADS


@pytest.mark.databases("sqlite")
def test_a_worker_that_stops_waits_for_lent_rows(database: Database, desk: Desk) -> None:
    new_assets(database, 3)
    commits = Commits(desk, many=3, most_lent=1)
    with running(database, commits.lane()) as at_work:
        wait_until(lambda: commits.begun == THREADS + 1)
        at_work.stop()
        commits.done.set()
    assert len(desk.done) == 3


def test_the_archive_lends_two_places_for_each_download(parts: Parts) -> None:
    own, spare = (lane for lane in parts.lanes() if lane.model is Asset)
    assert (own.threads, own.batches.most_lent) == (parts.settings.worker_threads, 2 * parts.settings.worker_threads)
    assert spare.batches.most_lent == 0
