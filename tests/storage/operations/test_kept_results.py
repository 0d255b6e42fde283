"""Results that are kept for pages: a page never waits for a long reading, and slow results are read less often."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from sqlmodel import Session

from storage.database.sessions import Database
from storage.errors import DatabaseUnavailable
from storage.operations import kept_results
from storage.operations.kept_results import KeptResults
from tests.harness import wait_until


class Reading:
    """Reads slowly: each key when it is let through. `begun`: all keys that were asked for."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.may = threading.Semaphore(0)

    def __call__(self, _session: Session, key: int) -> int:
        self.begun.append(key)
        assert self.may.acquire(timeout=60)
        return key * 10


@pytest.fixture
def reading() -> Reading:
    return Reading()


@pytest.fixture
def kept(database: Database, reading: Reading, monkeypatch: pytest.MonkeyPatch) -> Iterator[KeptResults[int, int]]:
    monkeypatch.setattr(kept_results, "FRESH_SECONDS", 3_600.0)
    made = KeptResults[int, int](database, reading, most=3)
    yield made
    reading.may.release(1_000)
    made.close()


@pytest.mark.databases("sqlite")
def test_a_reading_that_got_no_thread_is_tried_again(
    kept: KeptResults[int, int], reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as without:
        without.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="new thread"):
            kept.of([1])
    reading.may.release(1)
    wait_until(lambda: kept.of([1]) == {1: 10})


def all_of(kept: KeptResults[int, int], *keys: int) -> dict[int, int]:
    return wait_until(lambda: (found := kept.of(keys)) and len(found) == len(keys) and found, seconds=60)


def test_page_gets_known_results_and_a_thread_reads_the_rest(kept: KeptResults[int, int], reading: Reading) -> None:
    reading.may.release(1)
    wait_until(lambda: kept.of([1, 2]) == {1: 10}, seconds=60)
    reading.may.release(1)
    assert all_of(kept, 1, 2) == {1: 10, 2: 20}


def test_results_that_take_long_are_read_less_often(
    kept: KeptResults[int, int], reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading.may.release(1_000)
    all_of(kept, 1)
    monkeypatch.setattr(kept_results, "FRESH_SECONDS", 0.0)
    monkeypatch.setattr(kept_results, "RESTS", 1e9)
    assert kept.of([1]) == {1: 10} and reading.begun == [1]
    monkeypatch.setattr(kept_results, "RESTS", 0)
    wait_until(lambda: kept.of([1]) and len(reading.begun) > 1, seconds=60)


def test_forgotten_result_is_read_again(kept: KeptResults[int, int], reading: Reading) -> None:
    reading.may.release(1_000)
    all_of(kept, 1)
    kept.forget(1)
    all_of(kept, 1)
    assert reading.begun == [1, 1]


def test_number_of_kept_results_is_bounded(kept: KeptResults[int, int], reading: Reading) -> None:
    reading.may.release(1_000)
    for key in range(5):
        all_of(kept, key)
    assert set(kept.of([2, 3, 4])) == {2, 3, 4} and reading.begun == list(range(5))


def test_closing_ends_the_reading(kept: KeptResults[int, int], reading: Reading) -> None:
    wait_until(lambda: kept.of([1, 2]) == {} and reading.begun, seconds=60)
    reading.may.release(1_000)
    kept.close()
    assert kept.of([1, 2, 3]).keys() <= {1} and reading.begun == [1]


def test_freshness_is_decided_for_each_key(database: Database, reading: Reading) -> None:
    kept = KeptResults[int, int](database, reading, 3, lambda key: 0.0 if key == 1 else 3_600.0)
    reading.may.release(1_000)
    all_of(kept, 1, 2)
    wait_until(lambda: kept.of([1, 2]) and reading.begun.count(1) > 1, seconds=60)
    kept.close()
    assert reading.begun.count(2) == 1


def test_outage_ends_the_reading_and_a_later_call_restarts_it(database: Database) -> None:
    fails = iter((True, False))

    def read(_session: Session, key: int) -> int:
        if next(fails, False):
            raise DatabaseUnavailable("away")
        return key

    kept = KeptResults[int, int](database, read, 3)
    assert kept.of([7]) == {}
    assert all_of(kept, 7) == {7: 7}
    kept.close()
