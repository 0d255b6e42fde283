"""A report applied to rows: its writes, what it does not change, and the task's next step. On both databases."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import event
from sqlmodel import Session, col, select, update

from storage.database.sessions import Database
from storage.errors import LostClaim
from storage.rows import aliases, claims, reports, tasks
from storage.rows.models import Asset, Task, TaskAlias
from storage.rows.reports import Schedule
from storage.states import (
    ArchiveState,
    AssetName,
    AssetState,
    Output,
    Report,
    Step,
    TaskState,
)
from tests.rows import LONG_AGO, event_names, new_task, stored, wait_until_blocked

SECONDS = 30  # a thread that takes longer hangs
LEASE_SECONDS = 600  # never ends within a test
LIFETIME = timedelta(seconds=Schedule().result_lifetime_seconds)


def pictures(count: int, host: str = "a", **values: Any) -> Report:
    outputs = tuple(Output("image", f"https://{host}/{index}", index) for index in range(count))
    return Report("p1", None, TaskState.SUCCEEDED, outputs=outputs, **values)


FAILED = Report("p1", None, TaskState.FAILED, message="content policy")
PROCESSING = Report("p1", None, TaskState.PROCESSING)
UNKNOWN = Report("p1", None, None, raw_status="resting")


def sent(database: Database, **values: Any) -> Task:
    """A task that the provider accepted."""
    start = {"expected": 2, "series": False, "state": TaskState.SUBMITTED, "step": Step.READ}
    with database.write() as session:
        return new_task(session, **{**start, **values})


def hear(
    database: Database, task: Task, report: Report, *, pushed: bool = True, schedule: Schedule | None = None
) -> None:
    """Apply one report in a transaction of its own."""
    now = database.now()
    with database.write() as session:
        locked = tasks.lock(session, task.id)
        assert locked
        reports.apply(session, locked, report, schedule or Schedule(), now=now, pushed=pushed)


def claim(database: Database, model: Any = Task, lease: float = LEASE_SECONDS) -> Any:
    with database.write() as session:
        (row,) = claims.claim(session, model, limit=1, lease_seconds=lease)
        return row


def assets(database: Database, task: Task) -> list[Asset]:
    with database.read() as session:
        return tasks.assets_of(session, task.id)


def change_assets(database: Database, task: Task, **values: Any) -> None:
    with database.write() as session:
        session.execute(update(Asset).where(col(Asset.task_id) == task.id).values(**values))


def waits(database: Database, task: Task) -> tuple[Step | None, float | None]:
    """The step the task waits for and in how many seconds from now."""
    row = stored(database, task)
    return row["step"], row["due_at"] and (row["due_at"] - database.now()).total_seconds()


def test_an_external_id_is_inserted_once_however_many_try(database: Database) -> None:
    def insert(number: int) -> bool:
        task = Task(external_task_id="one", provider="kling", created_at=LONG_AGO, note=str(number))
        with database.write() as session:
            return tasks.insert_new(session, task)

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(insert, range(12)))
    with database.read() as session:
        (task,) = session.exec(select(Task))
        assert tasks.by_external_id(session, "one") == task
        assert tasks.by_external_id(session, "two") is None
    assert won.count(True) == 1
    assert (task.note, event_names(database, task)) == (str(won.index(True)), ["task.created"])


def test_task_is_stored_with_the_given_values(database: Database) -> None:
    request = {"prompt": "É \U0001f600", "n": 2, "element_list": [{"element_id": 2**60}]}
    task = sent(database, request=request, callback_url="https://u", sent_at=datetime(2026, 1, 2, 3, 4, 5, 6, UTC))
    row = stored(database, task)
    assert row == {name: getattr(task, name) for name in row}


def test_a_success_writes_state_assets_facts_and_alias(database: Database) -> None:
    task = sent(database)
    hear(database, task, pictures(2, units="8", updated_ms=1_700_000_000_000))
    row = stored(database, task)
    assert (row["state"], row["archive"], row["units"]) == (TaskState.SUCCEEDED, ArchiveState.ARCHIVING, "8")
    assert row["provider_task_id"] == "p1"
    assert all(row[name] for name in ("submitted_at", "completed_at", "reported_at", "called_back_at"))
    assert [(asset.index, asset.source_url, asset.state) for asset in assets(database, task)] == [
        (0, "https://a/0", AssetState.DUE),
        (1, "https://a/1", AssetState.DUE),
    ]
    assert event_names(database, task) == ["task.created", "task.succeeded"]
    with database.read() as session:
        assert aliases.by_provider_id(session, "kling", "p1") == task.id
        assert aliases.by_provider_id(session, "fal", "p1") is None
    assert claim(database, Asset).source_url.startswith("https://a/")


def test_a_failure_keeps_its_reason_until_a_success_wins(database: Database) -> None:
    task = sent(database)
    hear(database, task, FAILED)
    assert (stored(database, task)["error"], waits(database, task)) == ("content policy", (None, None))
    hear(database, task, pictures(2))
    hear(database, task, FAILED)
    row = stored(database, task)
    assert (row["state"], row["error"], row["contradicted"]) == (TaskState.SUCCEEDED, None, True)
    assert event_names(database, task)[1:] == ["task.failed", "task.contradicted", "task.succeeded"]


def test_repeating_a_report_changes_no_fact_and_no_asset(database: Database) -> None:
    task = sent(database)
    hear(database, task, pictures(2))
    before = [stored(database, asset) for asset in assets(database, task)]
    for pushed in (True, False):
        hear(database, task, pictures(2), pushed=pushed)
    assert [stored(database, asset) for asset in assets(database, task)] == before
    assert event_names(database, task) == ["task.created", "task.succeeded"]


def test_a_contradiction_causes_one_read_now(database: Database) -> None:
    task = sent(database)
    hear(database, task, pictures(2))
    assert waits(database, task) == (None, None)
    hear(database, task, FAILED)
    assert stored(database, task)["step"] is Step.READ
    assert claim(database).id == task.id  # due now
    hear(database, task, pictures(2), pushed=False)
    hear(database, task, FAILED)
    assert waits(database, task) == (None, None)


def test_every_id_of_a_task_is_an_alias_and_keeps_its_owner(database: Database) -> None:
    first, second = sent(database), sent(database)
    for task, name in ((first, "p1"), (first, "gateway-7"), (second, "p1"), (first, "p1")):
        hear(database, task, replace(PROCESSING, provider_task_id=name))
    hear(database, first, replace(PROCESSING, provider_task_id=None))
    with database.read() as session:
        found = {alias.provider_task_id: alias.task_id for alias in session.exec(select(TaskAlias))}
    assert found == {"p1": first.id, "gateway-7": first.id}
    assert stored(database, first)["provider_task_id"] == "p1"


def test_fresh_urls_reach_only_what_is_not_archived(database: Database) -> None:
    task = sent(database)
    hear(database, task, pictures(2))
    done = assets(database, task)[0]
    with database.write() as session:
        changes = {"state": AssetState.ARCHIVED, "due_at": None}
        session.execute(update(Asset).where(col(Asset.id) == done.id).values(**changes))
    later = LONG_AGO + timedelta(days=36_500)
    with database.write() as session:
        waiting = update(Asset).where(col(Asset.task_id) == task.id, col(Asset.id) != done.id)
        session.execute(waiting.values(due_at=later, attempts=7, error="expired"))
    hear(database, task, pictures(2, host="b"))
    archived, due = assets(database, task)
    assert (archived.source_url, archived.due_at) == ("https://a/0", None)
    assert (due.source_url, due.attempts, due.error) == ("https://b/1", 0, None)
    assert claim(database, Asset).id == due.id


def test_a_fresh_url_leaves_a_failed_asset_for_the_operator(database: Database) -> None:
    task = sent(database)
    hear(database, task, pictures(2))
    change_assets(database, task, state=AssetState.FAILED, due_at=None)
    hear(database, task, pictures(2, host="b"))
    assert {(row.source_url[:9], row.state, row.due_at) for row in assets(database, task)} == {
        ("https://b", AssetState.FAILED, None)
    }


@pytest.mark.parametrize("moment", ["before the report", "while it is applied"])
def test_a_fresh_url_does_not_end_a_claim(database: Database, moment: str) -> None:
    if moment == "while it is applied" and database.is_sqlite:
        pytest.skip("SQLite writes one transaction at a time")
    task = sent(database, expected=1)
    hear(database, task, pictures(1))
    owners = [claim(database, Asset)] if moment == "before the report" else []

    def url_expiry(_: str) -> None:  # called after the assets were read and before they are written
        owners.extend([] if owners else [claim(database, Asset)])

    hear(database, task, pictures(1, host="b"), schedule=Schedule(url_expiry=url_expiry))
    (asset,) = assets(database, task)
    assert (asset.source_url, asset.lease, asset.due_at) == ("https://b/0", owners[0].lease, owners[0].due_at)


def test_a_late_picture_reopens_a_finished_archive(database: Database) -> None:
    task = sent(database, expected=1)
    hear(database, task, pictures(1))
    change_assets(database, task, state=AssetState.ARCHIVED, due_at=None)
    with database.write() as session:
        session.execute(update(Task).values(archive=ArchiveState.ARCHIVED, step=None, due_at=None))
    hear(database, task, pictures(2))
    assert stored(database, task)["archive"] is ArchiveState.ARCHIVING
    assert [asset.state for asset in assets(database, task)] == [AssetState.ARCHIVED, AssetState.DUE]


def milliseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)


ENDED = datetime(2026, 2, 3, 4, 5, 6, 789_000, UTC)
SIGNED_UNTIL = datetime(2026, 3, 1, tzinfo=UTC)
FAR = datetime(2100, 1, 1, tzinfo=UTC)


def test_files_expire_when_the_url_says_or_a_lifetime_after_the_end(database: Database) -> None:
    own_word = Schedule(url_expiry=lambda url: SIGNED_UNTIL if url.endswith("/1") else None)
    task = sent(database)
    hear(database, task, pictures(2, updated_ms=milliseconds(ENDED)), schedule=own_word)
    assert [asset.files_expire_at for asset in assets(database, task)] == [ENDED + LIFETIME, SIGNED_UNTIL]
    assert stored(database, task)["files_expire_at"] == SIGNED_UNTIL


@pytest.mark.parametrize("updated_ms", [None, milliseconds(FAR)])
def test_files_never_live_longer_than_a_lifetime_from_now(database: Database, updated_ms: int | None) -> None:
    task = sent(database)
    before = database.now()
    hear(database, task, pictures(1, updated_ms=updated_ms))
    (asset,) = assets(database, task)
    assert asset.files_expire_at
    assert before + LIFETIME <= asset.files_expire_at <= database.now() + LIFETIME


def test_an_unfinished_task_is_polled_later_and_later(database: Database) -> None:
    schedule = Schedule(poll_after_seconds=1_000, poll_max_seconds=8_000)
    task = sent(database)
    for polls, wanted in ((0, 1_000), (2, 4_000), (50, 8_000)):
        with database.write() as session:
            session.execute(update(Task).values(polls=polls))
        hear(database, task, PROCESSING, pushed=False, schedule=schedule)
        step, delay = waits(database, task)
        assert step is Step.READ
        assert delay is not None
        assert wanted * 0.7 < delay <= wanted * 1.2
    hear(database, task, PROCESSING, schedule=schedule)
    assert stored(database, task)["polls"] == 0


def test_first_reads_come_soon_where_nothing_calls_back(database: Database) -> None:
    schedule = Schedule(poll_after_seconds=1_000, first_poll_seconds=(5, 10))
    task = sent(database)
    for polls, wanted in ((0, 5), (1, 10), (2, 1_000), (3, 2_000), (50, 3_600)):
        with database.write() as session:
            session.execute(update(Task).values(polls=polls, step=None))
        hear(database, task, PROCESSING, pushed=False, schedule=schedule)
        step, delay = waits(database, task)
        assert step is Step.READ
        assert delay is not None
        assert wanted * 0.8 - 3 < delay <= wanted * 1.2


def test_an_unknown_status_keeps_the_row_and_the_polls(database: Database) -> None:
    task = sent(database)
    hear(database, task, PROCESSING)
    hear(database, task, UNKNOWN)
    assert (stored(database, task)["state"], waits(database, task)[0]) == (TaskState.PROCESSING, Step.READ)
    assert event_names(database, task) == ["task.created", "task.processing"]


@pytest.mark.parametrize(
    ("before", "after"),
    [("unknown status 'resting'; the task is read again", None), (f"{tasks.DEFAULTED}n 1", f"{tasks.DEFAULTED}n 1")],
)
@pytest.mark.parametrize("end", [FAILED, pictures(1)], ids=lambda each: each.status)
def test_a_tasks_end_clears_what_was_noted_of_its_reads(
    database: Database, before: str, after: str | None, end: Report
) -> None:
    task = sent(database, note=before)
    hear(database, task, end)
    assert stored(database, task)["note"] == after


def test_a_shortfall_is_read_three_times_and_then_finished(database: Database) -> None:
    task = sent(database, expected=2)
    hear(database, task, pictures(1))
    change_assets(database, task, state=AssetState.ARCHIVED, due_at=None)
    seen = []
    for _ in range(4):
        row = stored(database, task)
        seen.append((row["step"], row["completeness_reads"]))
        hear(database, task, pictures(1), pushed=False)
        hear(database, task, pictures(1))  # a push is no read
    assert seen == [(Step.READ, 0), (Step.READ, 1), (Step.READ, 2), (Step.FINISH, 3)]


def test_missing_file_that_arrives_ends_the_reads(database: Database) -> None:
    task = sent(database, expected=2)
    hear(database, task, pictures(1), pushed=False)
    hear(database, task, pictures(2), pushed=False)
    assert (stored(database, task)["completeness_reads"], waits(database, task)) == (1, (None, None))


def in_flight(database: Database, step: Step) -> Task:
    """A task that a worker has claimed for `step`."""
    state = {Step.CREATE: TaskState.CREATED, Step.READ: TaskState.PROCESSING, Step.FINISH: TaskState.SUCCEEDED}[step]
    sent(database, step=step, state=state, expected=1)
    row: Task = claim(database)
    return row


@pytest.mark.parametrize("step", [Step.READ, Step.FINISH])
def test_a_report_takes_the_claim_of_a_read_or_finish_in_flight(database: Database, step: Step) -> None:
    claimed = in_flight(database, step)
    hear(database, claimed, pictures(1))
    with pytest.raises(LostClaim), database.write() as session:
        tasks.lock_claimed(session, claimed)
    with pytest.raises(LostClaim), database.write() as session:
        claims.settle(session, claimed, due_in=None, archive=ArchiveState.ARCHIVED)
    row = stored(database, claimed)
    assert (row["archive"], row["lease"], row["step"]) == (ArchiveState.ARCHIVING, None, None)


def test_a_create_in_flight_is_left_to_its_owner(database: Database) -> None:
    claimed = in_flight(database, Step.CREATE)
    hear(database, claimed, pictures(1))
    row = stored(database, claimed)
    assert (row["state"], row["lease"], row["due_at"]) == (TaskState.SUCCEEDED, claimed.lease, claimed.due_at)
    with database.write() as session:
        locked = tasks.lock_claimed(session, claimed)
        assert locked.state is TaskState.SUCCEEDED
        claims.settle(session, locked, due_in=None)


def test_a_report_makes_a_waiting_create_due_at_once(database: Database) -> None:
    later = LONG_AGO + timedelta(days=36_500)
    task = sent(database, state=TaskState.CREATED, step=Step.CREATE, due_at=later)
    hear(database, task, FAILED)
    row = claim(database)
    assert (row.id, row.state, row.step) == (task.id, TaskState.FAILED, Step.CREATE)


def test_lock_of_a_lost_claim_raises(database: Database) -> None:
    sent(database)
    frozen = claim(database, lease=-1)
    owner = claim(database)
    with pytest.raises(LostClaim), database.write() as session:
        tasks.lock_claimed(session, frozen)
    with database.write() as session:
        assert tasks.lock_claimed(session, owner).id == owner.id
        assert tasks.lock(session, uuid.uuid4()) is None


def test_read_of_a_task_resets_its_losses(database: Database) -> None:
    task = sent(database)
    claim(database, lease=-1)
    owner = claim(database)
    assert owner.losses == 1
    hear(database, task, PROCESSING, pushed=False)
    assert (stored(database, task)["losses"], stored(database, task)["attempts"]) == (0, 0)


def test_only_what_changed_of_a_locked_task_is_written(database: Database) -> None:
    task, heard = sent(database), list[str]()
    event.listen(database.writer, "before_cursor_execute", lambda *given: heard.append(given[2]))
    with database.write() as session:
        locked = tasks.lock_unattached(session, task.id)
        assert locked
        tasks.save(session, locked)
        locked.note, locked.polls, locked.step = "new", locked.polls, Step.READ
        tasks.save(session, locked)
    (statement,) = [words for words in heard if words.startswith("UPDATE")]
    assert re.findall(r"(\w+)=", statement) == ["note"]
    assert stored(database, task)["note"] == "new"


def test_two_reports_at_once_are_applied_one_after_the_other(database: Database) -> None:
    task = sent(database)
    with ThreadPoolExecutor(1) as pool:
        with database.write() as session:
            locked = tasks.lock(session, task.id)
            assert locked
            reports.apply(session, locked, pictures(1), Schedule(), now=LONG_AGO, pushed=True)
            other = pool.submit(hear, database, task, pictures(2))
            wait_until_blocked(database, other)
        other.result(SECONDS)
    assert [asset.index for asset in assets(database, task)] == [0, 1]
    assert event_names(database, task) == ["task.created", "task.succeeded"]


def test_two_workers_that_settle_the_last_two_assets_see_the_last_once(database: Database) -> None:
    task = sent(database)
    hear(database, task, pictures(2))
    first, last = claim(database, Asset), claim(database, Asset)

    def settle(session: Session, asset: Asset) -> None:
        locked = tasks.lock(session, task.id)
        assert locked
        claims.settle(session, asset, due_in=None, state=AssetState.ARCHIVED)
        reports.reschedule(session, locked, Schedule())

    def settle_last() -> None:
        with database.write() as session:
            settle(session, last)

    with ThreadPoolExecutor(1) as pool:
        with database.write() as session:
            settle(session, first)
            other = pool.submit(settle_last)
            wait_until_blocked(database, other)
        other.result(SECONDS)
    assert stored(database, task)["step"] is Step.FINISH


def test_finish_that_is_due_already_is_not_postponed(database: Database) -> None:
    task = sent(database, expected=1)
    hear(database, task, pictures(1))
    change_assets(database, task, state=AssetState.ARCHIVED, due_at=None)
    with database.write() as session:
        session.execute(update(Task).values(step=Step.FINISH, due_at=LONG_AGO, attempts=2))
    hear(database, task, pictures(1))
    row = stored(database, task)
    assert (row["step"], row["due_at"], row["attempts"]) == (Step.FINISH, LONG_AGO, 2)


def test_asset_id_never_changes() -> None:
    names = [AssetName("image", 0), AssetName("image", 1), AssetName("watermark", 0, "image")]
    names += [AssetName("watermark", 0, "series")]
    ids = [tasks.asset_id(uuid.UUID(int=1), name) for name in names]
    assert len(set(ids)) == len(names)
    assert str(ids[0]) == "3aa3d309-cbb7-53c3-a565-11a173fa85a3"


@pytest.fixture(scope="module")
def sqlite(migrated_sqlite: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """One database for every example of a property; each has a task of its own."""
    file = tmp_path_factory.mktemp("tasks") / "receiver.db"
    file.write_bytes(migrated_sqlite.read_bytes())
    opened = Database(f"sqlite:///{file}")
    yield opened
    opened.close()


WORDS = st.sampled_from([replace(PROCESSING, status=TaskState.SUBMITTED), PROCESSING, FAILED, UNKNOWN])
HEARD = st.tuples(WORDS | st.sampled_from([pictures(2), pictures(1), pictures(0)]), st.booleans())


def end_of(session: Session, heard: list[tuple[Report, bool]]) -> object:
    """The rows after these reports, without times and URLs."""
    task = tasks.lock(session, new_task(session, expected=2, series=False).id)
    assert task is not None
    for report, pushed in heard:
        reports.apply(session, task, report, Schedule(), now=LONG_AGO, pushed=pushed)
    rows = [(tasks.name_of(asset), asset.state) for asset in tasks.assets_of(session, task.id)]
    return task.state, task.archive, task.contradicted, task.error, task.provider_task_id, rows


@settings(max_examples=40, deadline=None)
@given(heard=st.lists(HEARD, min_size=1, max_size=6), data=st.data())
def test_any_order_ends_in_equal_rows(sqlite: Database, heard: list[Any], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations([*heard, *data.draw(st.lists(st.sampled_from(heard), max_size=3))]))
    with sqlite.write() as session:
        assert end_of(session, shuffled) == end_of(session, heard)
