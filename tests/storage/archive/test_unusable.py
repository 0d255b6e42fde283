"""Unusable files are tried while the provider has them, and their tasks report it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import cycle
from typing import Any

import httpx
import pytest
from sqlalchemy import update
from sqlmodel import col, select

from receiver.app.wiring import Parts
from receiver.cli import show
from receiver.gateway import answers
from receiver.gateway.answers import ResponseFormat
from receiver.sandbox import Sandbox, cdn
from receiver.tasks import task_view
from receiver.tasks.operate import Operator
from storage.archive import manifest
from storage.archive.unusable import DELAYS_SECONDS, MARGIN_SECONDS, MAX_TRIES, next_try
from storage.operations import deadlines, maintenance, measures
from storage.operations.counted import counted
from storage.rows.models import Asset, Task
from storage.states import SAID_AFTER_TRIES, ArchiveState, AssetState
from tests.harness import wait_until
from tests.pipeline import Web, assert_archived, assets_of, kept, make_due_now, run, task_of, working
from tests.rows import event_names
from tests.runs import file_host
from tests.runs.file_host import Oddity
from tests.storage.fetch.test_media_types import MP3, MP4, WAV
from tests.unreported_tasks import queries

PLAIN = {"model_name": "kling-image-o1", "prompt": "a boat"}
DAY = 86_400.0
NOW = datetime(2026, 1, 1, tzinfo=UTC)
# What is counted and found by its rows is tested on both, the rest without an option on one.
pytestmark = pytest.mark.databases("sqlite")
BOTH = pytest.mark.databases("sqlite", "postgresql")
# For what a host answers and when it is asked again.
ONE_DATABASE = pytest.mark.parametrize("database_kind", ["sqlite"])
ASSET_TIMES = ("due_at", "unusable_since", "files_expire_at")
TASK_TIMES = ("due_at", "reported_at", "completed_at", "files_expire_at")


@pytest.fixture
def changes() -> dict[str, Any]:
    """No public URL, and polls far away: a test makes a read due itself."""
    return {"public_url": "", "poll_after_seconds": 3_600}


def succeeded(parts: Parts, sandbox: Sandbox, pictures: int = 1, **knobs: Any) -> Task:
    """A task whose pictures wait for a worker while `knobs` hold."""
    parts.submitter.submit({**PLAIN, "n": pictures}, external_task_id="task")
    wait_until(lambda: sandbox.ledger().task("task").status == "succeed")
    sandbox.set(**knobs)
    make_due_now(parts)
    run(parts, "reads")
    return task_of(parts, "task")


def unusable(parts: Parts, sandbox: Sandbox, pictures: int = 1, *, tries: int = SAID_AFTER_TRIES) -> Task:
    """A task whose pictures were error pages for hours, this many times."""
    task = succeeded(parts, sandbox, pictures, cdn_html_rate=1)
    earlier = {"unusable_tries": tries - 1, "unusable_since": parts.database.now() - timedelta(hours=8)}
    with parts.database.write() as session:
        session.execute(update(Asset).values(earlier))
    run(parts, "assets", "finishes")
    return task


def pass_time(parts: Parts, seconds: float) -> None:
    """Move all past times of the rows back, and their due times nearer."""
    with parts.database.write() as session:
        for model, names in ((Asset, ASSET_TIMES), (Task, TASK_TIMES)):
            for row in session.exec(select(model)):
                for name in names:
                    moment = getattr(row, name)
                    setattr(row, name, moment and moment - timedelta(seconds=seconds))
        for row in session.exec(select(Asset)):
            row.failed_tries = [{**each, "at": earlier(each["at"], seconds)} for each in row.failed_tries or ()]


def earlier(moment: str, seconds: float) -> str:
    return (datetime.fromisoformat(moment) - timedelta(seconds=seconds)).isoformat()


def try_until(parts: Parts, seconds: float, before_each: Callable[[], object] = bool) -> float:
    """Let time pass from try to try until this much is over, or nothing is tried any more. Returns the time passed."""
    passed = 0.0
    while due := [asset.due_at for asset in assets_of(parts, task_of(parts, "task")) if asset.due_at]:
        wait = max(0.0, (min(due) - parts.database.now()).total_seconds())
        if passed + wait > seconds:
            break
        passed += wait
        pass_time(parts, wait)
        before_each()
        run(parts, "assets", "reads", "finishes")
    return passed


def hits(sandbox: Sandbox) -> list[int]:
    return [asset.hits for asset in sandbox.ledger().task("task").assets]


def asset_of(parts: Parts) -> Asset:
    (asset,) = assets_of(parts, task_of(parts, "task"))
    return asset


def manifest_of(parts: Parts) -> dict[str, Any]:
    task = task_of(parts, "task")
    return manifest.read(parts.bucket.read_bytes(str(task.manifest_key), 2**20))


@pytest.mark.parametrize("file", [MP4, MP3, WAV], ids=["mp4", "mp3", "wav"])
@ONE_DATABASE
def test_film_or_sound_in_place_of_a_picture_is_not_taken(
    parts: Parts, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, file: bytes
) -> None:
    succeeded(parts, sandbox)
    with monkeypatch.context() as served:
        served.setattr(sandbox.world.gallery, "data", lambda task, name: file)
        run(parts, "assets", "finishes")
        assert (asset_of(parts).state, kept(parts)) == (AssetState.DUE, {})
        assert "a picture was requested" in str(asset_of(parts).error)
    try_until(parts, 60)
    assert_archived(parts, sandbox, task_of(parts, "task"))


@ONE_DATABASE
def test_response_that_is_not_http_is_retried_less_often_and_reported(
    parts: Parts, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = cdn.serve

    def coded(*given: Any) -> cdn.Served:
        served = serve(*given)
        return replace(served, headers={**served.headers, "transfer-encoding": "gzip"})

    monkeypatch.setattr(cdn, "serve", coded)
    succeeded(parts, sandbox)
    try_until(parts, DAY / 2)
    asset, task = asset_of(parts), task_of(parts, "task")
    assert "not HTTP/1.1" in str(asset.error) and asset.unusable_since is not None
    assert (asset.state, task.archive) == (AssetState.DUE, ArchiveState.INCOMPLETE)
    assert hits(sandbox)[0] <= MAX_TRIES
    monkeypatch.setattr(cdn, "serve", serve)
    try_until(parts, DAY)
    assert task_of(parts, "task").archive is ArchiveState.ARCHIVED


@ONE_DATABASE
def test_an_error_page_that_lasts_a_minute_loses_no_picture(parts: Parts, sandbox: Sandbox) -> None:
    succeeded(parts, sandbox, 3, cdn_html_rate=1)
    assert try_until(parts, 60) > 25
    assert {asset.state for asset in assets_of(parts, task_of(parts, "task"))} == {AssetState.DUE}
    assert task_of(parts, "task").archive is ArchiveState.ARCHIVING
    sandbox.set(cdn_html_rate=0)
    try_until(parts, 120)
    assert_archived(parts, sandbox, task_of(parts, "task"))
    assert max(hits(sandbox)) <= 7


def test_error_page_of_twenty_minutes_is_reported_and_recovers(parts: Parts, sandbox: Sandbox) -> None:
    task = succeeded(parts, sandbox, 2, cdn_html_rate=1)
    try_until(parts, 20 * 60)
    said = task_of(parts, "task")
    assert (said.archive, said.manifests) == (ArchiveState.INCOMPLETE, 1)
    assert [entry["state"] for entry in manifest_of(parts)["assets"]] == ["due", "due"]
    assert manifest_of(parts)["assets"][0]["unusable_tries"] >= SAID_AFTER_TRIES
    sandbox.set(cdn_html_rate=0)
    try_until(parts, 20 * 60)
    after = task_of(parts, "task")
    assert (after.archive, after.note) == (ArchiveState.ARCHIVED, None)
    assert {asset.unusable_since for asset in assets_of(parts, after)} == {None}
    assert event_names(parts.database, task)[-1] == "task.archived"
    assert event_names(parts.database, task).count("asset.archived") == 2
    assert {entry["state"] for entry in manifest_of(parts)["assets"]} == {"archived"}
    assert max(hits(sandbox)) <= 10


@ONE_DATABASE
def test_files_cut_without_a_length_half_of_the_time_are_all_archived(parts: Parts, sandbox: Sandbox) -> None:
    succeeded(parts, sandbox, 9, cdn_truncated_silent_rate=0.5)
    try_until(parts, DAY)
    assert_archived(parts, sandbox, task_of(parts, "task"))


@ONE_DATABASE
def test_a_file_that_stays_broken_costs_at_most_twenty_requests_in_thirty_days(parts: Parts, sandbox: Sandbox) -> None:
    task = succeeded(parts, sandbox, cdn_truncated_silent_rate=1)
    passed = try_until(parts, 40 * DAY)
    assert 30 * DAY - 2 * MARGIN_SECONDS < passed < 30 * DAY
    assert hits(sandbox)[0] in (16, 17, 18)
    asset, over = asset_of(parts), task_of(parts, "task")
    assert (asset.state, asset.due_at, asset.unusable_since) == (AssetState.FAILED, None, None)
    assert (over.archive, over.manifests) == (ArchiveState.INCOMPLETE, 2)
    assert event_names(parts.database, task)[-3:] == ["task.incomplete", "asset.failed", "task.incomplete"]


@ONE_DATABASE
def test_a_file_always_cut_at_the_same_byte_is_tried_less_often_and_reported(parts: Parts, sandbox: Sandbox) -> None:
    task = succeeded(parts, sandbox, cdn_break_share=0.6)
    try_until(parts, DAY)
    asset, said = asset_of(parts), task_of(parts, "task")
    assert "broke off after" in str(asset.error) and asset.unusable_since is not None
    assert (asset.state, said.archive) == (AssetState.DUE, ArchiveState.INCOMPLETE)
    assert event_names(parts.database, task)[-1] == "task.incomplete"
    assert hits(sandbox)[0] <= MAX_TRIES
    sandbox.set(cdn_break_share=None)
    try_until(parts, 2 * DAY)
    assert task_of(parts, "task").archive is ArchiveState.ARCHIVED


@ONE_DATABASE
def test_a_file_that_two_hosts_cut_at_two_bytes_is_tried_less_often_and_reported(
    parts: Parts, sandbox: Sandbox
) -> None:
    succeeded(parts, sandbox)
    shares = cycle((0.4, 0.6))
    try_until(parts, 3_600, lambda: sandbox.set(cdn_break_share=next(shares)))
    assert asset_of(parts).unusable_tries >= SAID_AFTER_TRIES
    assert task_of(parts, "task").archive is ArchiveState.INCOMPLETE
    assert hits(sandbox)[0] <= MAX_TRIES
    sandbox.set(cdn_break_share=None)
    try_until(parts, DAY)
    assert task_of(parts, "task").archive is ArchiveState.ARCHIVED


@ONE_DATABASE
def test_transfers_that_break_at_other_bytes_do_not_count_as_a_broken_file(parts: Parts, sandbox: Sandbox) -> None:
    succeeded(parts, sandbox)
    for share in (0.2, 0.3, 0.4, 0.5, 0.6):
        sandbox.set(cdn_break_share=share)
        make_due_now(parts)
        run(parts, "assets")
    asset = asset_of(parts)
    assert (asset.state, asset.unusable_since, hits(sandbox)) == (AssetState.DUE, None, [5])


@ONE_DATABASE
def test_a_redirect_to_itself_is_tried_on_the_same_schedule(parts: Parts, sandbox: Sandbox) -> None:
    succeeded(parts, sandbox, cdn_self_redirect_seconds=DAY)
    try_until(parts, 60)
    asset = asset_of(parts)
    assert (asset.state, asset.unusable_tries > 3) == (AssetState.DUE, True)
    sandbox.set(cdn_self_redirect_seconds=0)
    try_until(parts, 120)
    assert_archived(parts, sandbox, task_of(parts, "task"))


@ONE_DATABASE
def test_task_is_read_again_before_a_late_try_with_an_old_link(parts: Parts, sandbox: Sandbox) -> None:
    succeeded(parts, sandbox, cdn_html_rate=1, fresh_urls_on_read=True)
    try_until(parts, 2 * 3_600)
    before, tries = asset_of(parts).source_url, hits(sandbox)[0]
    assert try_until(parts, 4 * 3_600) > 0
    assert asset_of(parts).source_url != before
    assert hits(sandbox)[0] == tries + 1


@BOTH
def test_a_link_that_is_dead_after_a_read_is_an_unusable_answer(parts: Parts, sandbox: Sandbox) -> None:
    """A host that signs links anew at each read and refuses them took five reads a second for one file, for ever."""
    succeeded(parts, sandbox, result_lifetime_seconds=0, fresh_urls_on_read=True)
    reads = queries(sandbox)
    for _ in range(6):
        run(parts, "assets")
        run(parts, "reads")
    assert (queries(sandbox) - reads, asset_of(parts).unusable_tries) == (1, 1)
    try_until(parts, 1_200)
    task = task_of(parts, "task")
    assert (task.archive, "task.incomplete" in event_names(parts.database, task)) == (ArchiveState.INCOMPLETE, True)
    assert queries(sandbox) - reads <= SAID_AFTER_TRIES + 2
    sandbox.set(result_lifetime_seconds=86_400)
    try_until(parts, 2 * DAY)
    assert task_of(parts, "task").archive is ArchiveState.ARCHIVED


@ONE_DATABASE
def test_a_link_that_stays_dead_is_given_up_when_the_provider_has_deleted_the_file(
    parts: Parts, sandbox: Sandbox
) -> None:
    """It was tried and read every 15 minutes for ever, and its task never ended."""
    sandbox.set(result_lifetime_seconds=0)
    succeeded(parts, sandbox)
    try_until(parts, 40 * DAY)
    asset = asset_of(parts)
    assert (asset.state, asset.due_at) == (AssetState.FAILED, None)
    assert "answered 403 (tried 17 times since" in str(asset.error)
    assert sandbox.ledger().counts["cdn:403"] <= 2 * MAX_TRIES


def test_each_late_file_makes_a_manifest_of_all_archived_files(parts: Parts, sandbox: Sandbox) -> None:
    unusable(parts, sandbox, 2)
    sandbox.set(cdn_html_rate=0)
    first, _ = assets_of(parts, task_of(parts, "task"))
    with parts.database.write() as session:
        session.execute(update(Asset).where(col(Asset.id) == first.id).values(due_at=NOW))
    run(parts, "assets", "finishes")
    task = task_of(parts, "task")
    assert (task.archive, task.manifests) == (ArchiveState.INCOMPLETE, 2)
    assert [entry["state"] for entry in manifest_of(parts)["assets"]] == ["archived", "due"]


@BOTH
def test_retry_makes_unusable_files_due_at_once(parts: Parts, sandbox: Sandbox) -> None:
    unusable(parts, sandbox)
    assert retryable(parts) == 1
    sandbox.set(cdn_html_rate=0)
    Operator(parts.database, parts.providers, parts.schedule).retry_failed(limit=10)
    run(parts, "assets", "finishes")
    assert task_of(parts, "task").archive is ArchiveState.ARCHIVED


def retryable(parts: Parts) -> int:
    return len(maintenance.failed_files(parts.database, since=None, error="html", limit=10))


@ONE_DATABASE
def test_files_not_yet_usable_differ_from_files_given_up(parts: Parts, sandbox: Sandbox) -> None:
    unusable(parts, sandbox, tries=MAX_TRIES - 1)
    (told,) = task_view.report(parts.database, parts.bucket, "task")["assets"]
    asset, form = asset_of(parts), ResponseFormat("archived", lambda _: None)
    assert told["state"] == "due" and told["waiting"]["tries"] == asset.unusable_tries
    record = answers.record(task_of(parts, "task"), [asset], form)
    assert (record["task_status"], record["receiver"]["waiting"]["files"]) == ("succeed", 1)
    assert json.dumps(record["receiver"]["waiting"]["next_try_at"]).isdigit()
    try_until(parts, 40 * DAY)
    (told,) = task_view.report(parts.database, parts.bucket, "task")["assets"]
    assert told["state"] == "failed" and "waiting" not in told
    assert "waiting" not in answers.record(task_of(parts, "task"), [asset_of(parts)], form)["receiver"]


def test_next_try_of_a_file_that_was_answered_429_is_reported(parts: Parts, sandbox: Sandbox) -> None:
    succeeded(parts, sandbox)
    with parts.database.write() as session:
        asset = session.exec(select(Asset)).one()
        asset.error, asset.due_at = "127.0.0.1 answered 429", datetime(2026, 11, 29, 12, tzinfo=UTC)
    (told,) = task_view.report(parts.database, parts.bucket, "task")["assets"]
    assert told["next_try_at"] == "2026-11-29T12:00:00+00:00"
    assert show._reason(asset_of(parts)) == "next try at 2026-11-29T12:00:00+00:00: 127.0.0.1 answered 429"
    make_due_now(parts, Asset)
    run(parts, "assets")
    (told,) = task_view.report(parts.database, parts.bucket, "task")["assets"]
    assert told["state"] == "archived" and "next_try_at" not in told


@BOTH
def test_measures_and_deadlines_count_files_that_are_still_tried(parts: Parts, sandbox: Sandbox) -> None:
    task = unusable(parts, sandbox, 2)
    with parts.database.read() as session:
        found, told = measures.measure(session, deadline_seconds=60), measures.unusable_files(session)
    assert (found.unusable_files, found.incomplete_open, found.failed_assets) == (2, 1, 0)
    assert found.unusable_seconds > 3_600 and "2 files came unusable since" in str(told)
    assert deadlines.announce(parts.database, 60) == 0
    assert deadlines.announce(parts.database, 30 * DAY) == 1
    assert event_names(parts.database, task)[-1] == "task.deadline_near"


def test_dismissing_ends_the_tries(parts: Parts, sandbox: Sandbox) -> None:
    unusable(parts, sandbox)
    Operator(parts.database, parts.providers, parts.schedule).dismiss("task", "known")
    asset = asset_of(parts)
    assert (asset.state, asset.due_at, asset.unusable_since) == (AssetState.FAILED, None, None)
    with parts.database.read() as session:
        assert measures.unusable_files(session).files == 0


@ONE_DATABASE
def test_workers_archive_files_after_an_error_page_by_themselves(
    parts: Parts, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.archive.unusable.DELAYS_SECONDS", [delay / 8 for delay in DELAYS_SECONDS])
    succeeded(parts, sandbox, 3, cdn_html_seconds=1)
    with working(parts):
        wait_until(lambda: task_of(parts, "task").archive is ArchiveState.ARCHIVED, seconds=60, every=0.1)
    assert_archived(parts, sandbox, task_of(parts, "task"))


@pytest.mark.parametrize("oddity", list(file_host.oddities(1)), ids=lambda oddity: oddity.name)
@ONE_DATABASE
def test_every_oddity_of_a_file_host_ends_archived(parts: Parts, sandbox: Sandbox, oddity: Oddity) -> None:
    """The short form of `python -m tests.runs.file_host`."""
    chance = {name: 0.3 for name in oddity.knobs if oddity.by_chance}
    succeeded(parts, sandbox, 2, **{**oddity.knobs, **chance})
    with working(parts):
        wait_until(lambda: task_of(parts, "task").archive is ArchiveState.ARCHIVED, seconds=60, every=0.1)
    assert_archived(parts, sandbox, task_of(parts, "task"))
    assert max(hits(sandbox)) <= oddity.most


ODD = [
    ({"cdn_206_whole": True}, "answered 206 with the whole file"),
    ({"cdn_content_encoding": "UTF-8"}, "Content-Encoding names no coding"),
    ({"cdn_content_encoding": "gzip"}, "decoded from gzip"),
    ({"cdn_junk_header": True}, "1 malformed header lines"),
]


@pytest.mark.parametrize(("knobs", "note"), ODD, ids=[note for _, note in ODD])
@ONE_DATABASE
def test_irregularities_of_a_transfer_are_in_row_and_manifest(
    parts: Parts, sandbox: Sandbox, knobs: dict[str, Any], note: str
) -> None:
    succeeded(parts, sandbox, **knobs)
    run(parts, "assets", "finishes")
    assert_archived(parts, sandbox, task_of(parts, "task"))
    assert note in (asset_of(parts).notes or ())
    assert note in manifest_of(parts)["assets"][0]["notes"]


@pytest.mark.parametrize("changes", [{"public_url": "", "poll_after_seconds": 3_600, "metrics_token": "a-token"}])
def test_readiness_and_status_show_unusable_files_with_their_times(
    web: Web, parts: Parts, sandbox: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    unusable(parts, sandbox)
    asset = asset_of(parts)
    since, due_at = asset.unusable_since, asset.due_at
    assert since is not None and due_at is not None
    checks = httpx.get(f"{web.url}/readyz", headers={"Authorization": "Bearer a-token"}).json()["checks"]
    times = f"since {since:%Y-%m-%d %H:%M} UTC, next try at {due_at:%Y-%m-%d %H:%M} UTC"
    assert checks["files"] == f"1 file came unusable {times}"
    show.show(parts, "task")
    said = "".join(capsys.readouterr().out.split())  # the table wraps
    next_at = due_at.isoformat(timespec="seconds")
    tries = counted(asset.unusable_tries, "try", "tries")
    words = f"not yet, {tries} since {since.isoformat(timespec='seconds')}, next at {next_at}:"
    assert words.replace(" ", "") in said


# -- the schedule -----------------------------------------------------------------------------------------------------


def test_task_is_reported_incomplete_after_fifteen_minutes() -> None:
    assert sum(DELAYS_SECONDS[: SAID_AFTER_TRIES - 1]) == 900


def tries_at(life_seconds: float, link_seconds: float | None = None) -> list[float]:
    """The times of a broken file's tries, in seconds; `link_seconds`: the life of its links, of which each try has a
    fresh one.
    """
    at, tried = 0.0, [0.0]
    while True:
        link = NOW + timedelta(seconds=at + link_seconds if link_seconds else life_seconds)
        life = NOW + timedelta(seconds=life_seconds)
        delay = next_try(len(tried), now=NOW + timedelta(seconds=at), link_ends=link, life_ends=life)
        if delay is None or at > life_seconds:
            return tried
        at += delay
        tried.append(at)


@pytest.mark.parametrize("life_seconds", [3_600, 10_000, DAY, 3 * DAY, 20 * DAY, 30 * DAY, 90 * DAY])
def test_tries_span_the_life_of_a_file(life_seconds: float) -> None:
    for _ in range(50):
        tried = tries_at(life_seconds)
        assert len(tried) <= MAX_TRIES
        # One try may come after the end, which is an estimate that the provider may exceed.
        within = [at for at in tried if at < life_seconds]
        assert 0.5 * life_seconds < within[-1] and len(tried) - len(within) <= 1


@pytest.mark.parametrize("link_seconds", [2, 600, 3_600, DAY])
def test_short_lived_links_that_are_renewed_do_not_end_the_tries(link_seconds: float) -> None:
    tried = tries_at(30 * DAY, link_seconds)
    assert len(tried) <= MAX_TRIES + 1
    assert tried[-1] > 7 * DAY


def test_a_passed_deadline_prevents_no_first_tries() -> None:
    gone = NOW - timedelta(days=1)
    delays = [next_try(tries, now=NOW, link_ends=gone, life_ends=gone) for tries in range(1, SAID_AFTER_TRIES + 1)]
    assert None not in delays[:-1] and delays[-1] is None
