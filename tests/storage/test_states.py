"""Every order and multiplicity of the same reports ends in the same task."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from storage.states import (
    COMPLETENESS_DELAYS_SECONDS,
    RANK,
    SAID_AFTER_TRIES,
    TERMINAL,
    ArchiveState,
    AssetFacts,
    AssetName,
    AssetState,
    Next,
    Output,
    Report,
    Step,
    TaskFacts,
    TaskState,
    assets_in,
    decide,
    expected_files,
    is_short,
    next_step,
    outcome,
    reopened,
    shortfall,
)

NEW_TASK = TaskFacts(TaskState.CREATED, series=False, expected=3)


def report(status: TaskState | None, *outputs: Output) -> Report:
    return Report("p1", "e1", status, outputs=outputs)


def old_shape(*indexes: int) -> Report:
    outputs = (Output("image", f"https://old/{index}", index, f"https://old/w{index}") for index in indexes)
    return report(TaskState.SUCCEEDED, *outputs)


def new_shape(count: int) -> Report:
    outputs = (Output("image", f"https://new/{place}", place, f"https://new/w{place}") for place in range(count))
    return report(TaskState.SUCCEEDED, *outputs)


REPORTS = {
    "submitted": report(TaskState.SUBMITTED),
    "processing": report(TaskState.PROCESSING),
    "failed": report(TaskState.FAILED),
    "unknown": report(None),
    "old": old_shape(0, 1, 2),
    "new": new_shape(3),
    "part": old_shape(2),
    "empty": report(TaskState.SUCCEEDED),
}


def after(task: TaskFacts, said: Report) -> TaskFacts:
    """The task after the apply step's writes."""
    decision = decide(task, said)
    due = {name: AssetFacts(AssetState.DUE, url) for name, url in decision.add.items()}
    fresh = {name: replace(task.assets[name], url=url) for name, url in decision.replace.items()}
    return replace(
        task,
        state=decision.state,
        archive=decision.archive,
        contradicted=task.contradicted or decision.contradicted,
        assets={**task.assets, **due, **fresh},
    )


def histories() -> list[tuple[frozenset[str], TaskFacts]]:
    """All states of a task after every sequence of reports of any length, with the statuses of each."""
    start: tuple[frozenset[str], TaskFacts] = (frozenset(), NEW_TASK)
    seen, waiting = {identity(*start): start}, [start]
    while waiting:
        heard, task = waiting.pop()
        for word, said in REPORTS.items():
            reached = (heard | {word}, after(task, said))
            if identity(*reached) not in seen:
                seen[identity(*reached)] = reached
                waiting.append(reached)
    return list(seen.values())


def identity(heard: frozenset[str], task: TaskFacts) -> object:
    return heard, task.state, task.archive, task.contradicted, frozenset(task.assets.items())


def test_every_order_and_multiplicity_ends_in_the_same_task() -> None:
    ends: dict[frozenset[str], set[object]] = {}
    for heard, task in histories():
        end = (task.state, task.archive, task.contradicted, frozenset(task.assets))
        ends.setdefault(heard, set()).add(end)
    assert len(ends) == 2 ** len(REPORTS)
    assert {heard: end for heard, end in ends.items() if len(end) != 1} == {}


@pytest.mark.parametrize("first", REPORTS)
@pytest.mark.parametrize("second", REPORTS)
def test_applying_a_report_twice_changes_nothing_more(first: str, second: str) -> None:
    once = after(after(NEW_TASK, REPORTS[first]), REPORTS[second])
    decision = decide(once, REPORTS[second])
    assert after(once, REPORTS[second]) == once
    assert (decision.contradicted, dict(decision.add), dict(decision.replace)) == (False, {}, {})


def due_names(task: TaskFacts) -> list[AssetName]:
    return sorted(name for name, asset in task.assets.items() if asset.state is AssetState.DUE)


class Life(RuleBasedStateMachine):
    """A task that gets reports while workers archive, fail and finish."""

    def __init__(self) -> None:
        super().__init__()
        self.task = NEW_TASK
        self.flagged = 0

    @rule(word=st.sampled_from(sorted(REPORTS)))
    def hear(self, word: str) -> None:
        before, decision = self.task, decide(self.task, REPORTS[word])
        self.flagged += decision.contradicted
        self.task = after(before, REPORTS[word])
        assert RANK[self.task.state] >= RANK[before.state]
        for name, asset in before.assets.items():
            assert self.task.assets[name] == asset or asset.state is not AssetState.ARCHIVED

    @precondition(lambda self: due_names(self.task))
    @rule(data=st.data(), state=st.sampled_from([AssetState.ARCHIVED, AssetState.FAILED]))
    def settle_asset(self, data: st.DataObject, state: AssetState) -> None:
        name = data.draw(st.sampled_from(due_names(self.task)))
        self.write(name, replace(self.task.assets[name], state=state, unusable_tries=0))
        self.task = replace(self.task, archive=reopened(self.task.archive))

    @precondition(lambda self: due_names(self.task))
    @rule(data=st.data(), tries=st.integers(1, SAID_AFTER_TRIES))
    def come_unusable(self, data: st.DataObject, tries: int) -> None:
        name = data.draw(st.sampled_from(due_names(self.task)))
        before = self.task.assets[name]
        self.write(name, replace(before, unusable_tries=before.unusable_tries + tries))

    def write(self, name: AssetName, asset: AssetFacts) -> None:
        self.task = replace(self.task, assets={**self.task.assets, name: asset})

    @precondition(lambda self: is_short(self.task))
    @rule()
    def read_in_vain(self) -> None:
        self.task = replace(self.task, completeness_reads=self.task.completeness_reads + 1)

    @precondition(lambda self: next_step(self.task, 60) == Next(Step.FINISH, 0))
    @rule()
    def finish(self) -> None:
        self.task = replace(self.task, archive=outcome(self.task))

    @invariant()
    def waits_for_something_or_is_over(self) -> None:
        working = any(asset.state is AssetState.DUE for asset in self.task.assets.values())
        over = self.task.state in TERMINAL and self.task.archive is not ArchiveState.ARCHIVING
        assert next_step(self.task, 60).step or working or over

    @invariant()
    def what_is_tried_on_keeps_no_end_waiting(self) -> None:
        assets = list(self.task.assets.values())
        waits = self.task.archive is ArchiveState.ARCHIVING and not next_step(self.task, 60).step
        assert not waits or any(asset.is_awaited for asset in assets)

    @invariant()
    def archived_means_every_file_is_kept(self) -> None:
        if self.task.archive is ArchiveState.ARCHIVED:
            assert {asset.state for asset in self.task.assets.values()} == {AssetState.ARCHIVED}

    @invariant()
    def a_contradiction_is_flagged_once(self) -> None:
        assert self.flagged == int(self.task.contradicted)


Life.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestLife = Life.TestCase


@pytest.mark.parametrize("first", [TaskState.FAILED, TaskState.SUCCEEDED])
def test_succeeded_outranks_failed_and_the_contradiction_is_flagged(first: TaskState) -> None:
    (second,) = TERMINAL - {first}
    decision = decide(replace(NEW_TASK, state=first), report(second))
    assert (decision.state, decision.contradicted) == (TaskState.SUCCEEDED, True)
    assert not decide(replace(NEW_TASK, state=first, contradicted=True), report(second)).contradicted


def test_a_late_report_replaces_urls_of_unarchived_assets_only() -> None:
    kept, lost, open_ = (AssetName("image", index) for index in range(3))
    assets = {
        kept: AssetFacts(AssetState.ARCHIVED, "https://a"),
        lost: AssetFacts(AssetState.FAILED, "https://a"),
        open_: AssetFacts(AssetState.DUE, "https://a"),
    }
    task = replace(NEW_TASK, state=TaskState.SUCCEEDED, archive=ArchiveState.INCOMPLETE, assets=assets)
    decision = decide(task, new_shape(3))
    assert set(decision.replace) == {lost, open_}
    assert set(decision.add) == {AssetName("watermark", index, "image") for index in range(3)}
    assert decision.archive is ArchiveState.ARCHIVING  # something was added to a finished archive


def test_outputs_of_a_task_that_has_not_succeeded_name_no_asset() -> None:
    outputs = old_shape(0).outputs
    for state in (TaskState.PROCESSING, TaskState.FAILED, None):
        assert decide(NEW_TASK, report(state, *outputs)).add == {}


@pytest.mark.parametrize(
    ("asked", "claimed", "kind"),
    [
        (True, None, "series"),
        (True, False, "series"),
        (False, True, "image"),
        (None, True, "series"),
        (None, False, "image"),
        (None, None, "image"),
    ],
)
def test_the_kind_follows_the_request(asked: bool | None, claimed: bool | None, kind: str) -> None:
    said = replace(old_shape(0), series=claimed)
    assert set(assets_in(said, asked)) == {AssetName(kind, 0), AssetName("watermark", 0, kind)}


def test_series_is_for_pictures() -> None:
    outputs = [Output("image", "https://a", 0), Output("image", "https://a", 1), Output("video", "https://a", 0)]
    names = assets_in(report(TaskState.SUCCEEDED, *outputs), True)
    assert sorted((name.kind, name.index) for name in names) == [("series", 0), ("series", 1), ("video", 0)]


def test_a_watermarked_copy_has_the_index_of_its_original_even_alone() -> None:
    outputs = (Output("image", "https://a", 7, "https://w"), Output("image", None, 8, "https://x"))
    assert assets_in(report(TaskState.SUCCEEDED, *outputs), False) == {
        AssetName("image", 7): "https://a",
        AssetName("watermark", 7, "image"): "https://w",
        AssetName("watermark", 8, "image"): "https://x",
    }


@pytest.mark.parametrize(
    ("asked", "files"),
    [
        ({"n": 3, "series": False, "series_amount": 4, "watermark": False}, 3),
        ({"n": 3, "series": False, "series_amount": "auto", "watermark": True}, 6),
        ({"n": 3, "series": True, "series_amount": 4, "watermark": False}, 4),
        ({"n": 3, "series": True, "series_amount": 4, "watermark": True}, 8),
        ({"n": 3, "series": True, "series_amount": "auto", "watermark": True}, None),
    ],
)
def test_expected_files_follow_the_request(asked: dict[str, object], files: int | None) -> None:
    assert expected_files(**asked) == files  # type: ignore[arg-type]


def archive_of(*states: AssetState, expected: int | None = 2, reads: int = 0) -> TaskFacts:
    assets = {AssetName("image", index): AssetFacts(state, "https://a") for index, state in enumerate(states)}
    archiving = replace(NEW_TASK, state=TaskState.SUCCEEDED, archive=ArchiveState.ARCHIVING)
    return replace(archiving, expected=expected, completeness_reads=reads, assets=assets)


def unusable(task: TaskFacts, tries: int) -> TaskFacts:
    """The task's due files have had this many unusable answers."""
    came = {name: replace(task.assets[name], unusable_tries=tries) for name in due_names(task)}
    return replace(task, assets={**task.assets, **came})


KEPT, LOST, DUE = AssetState.ARCHIVED, AssetState.FAILED, AssetState.DUE


@pytest.mark.parametrize(
    ("task", "wanted"),
    [
        (NEW_TASK, Next(Step.CREATE, 60)),
        (replace(NEW_TASK, state=TaskState.SUBMITTED), Next(Step.READ, 60)),
        (replace(NEW_TASK, state=TaskState.FAILED), Next()),
        (archive_of(DUE, KEPT), Next()),
        (archive_of(LOST, KEPT), Next(Step.FINISH, 0)),
        (archive_of(KEPT), Next(Step.READ, 0)),
        (archive_of(DUE, reads=1), Next(Step.READ, 120)),
        (archive_of(DUE, reads=len(COMPLETENESS_DELAYS_SECONDS)), Next()),
        (archive_of(KEPT, reads=len(COMPLETENESS_DELAYS_SECONDS)), Next(Step.FINISH, 0)),
        (archive_of(expected=None), Next(Step.READ, 0)),
        (replace(archive_of(KEPT, KEPT), archive=ArchiveState.ARCHIVED), Next()),
        (unusable(archive_of(DUE, KEPT), SAID_AFTER_TRIES - 1), Next()),
        (unusable(archive_of(DUE, KEPT), SAID_AFTER_TRIES), Next(Step.FINISH, 0)),
        (replace(unusable(archive_of(DUE, KEPT), SAID_AFTER_TRIES), archive=ArchiveState.INCOMPLETE), Next()),
    ],
)
def test_next_step_follows_the_state(task: TaskFacts, wanted: Next) -> None:
    assert next_step(task, 60) == wanted


def test_a_shortfall_is_believed_after_three_reads_within_ten_minutes() -> None:
    assert len(COMPLETENESS_DELAYS_SECONDS) == 3
    assert sum(COMPLETENESS_DELAYS_SECONDS) <= 600


@pytest.mark.parametrize(
    ("task", "ended", "words"),
    [
        (archive_of(KEPT, KEPT), ArchiveState.ARCHIVED, None),
        (archive_of(KEPT), ArchiveState.ARCHIVED, "delivered 1 of 2"),
        (archive_of(KEPT, LOST), ArchiveState.INCOMPLETE, None),
        (archive_of(KEPT, DUE), ArchiveState.INCOMPLETE, None),
        (archive_of(), ArchiveState.INCOMPLETE, "delivered 0 of 2"),
        (archive_of(KEPT, expected=None), ArchiveState.ARCHIVED, None),
        (archive_of(expected=None), ArchiveState.INCOMPLETE, None),
    ],
)
def test_outcome_and_shortfall_count_missing_files(task: TaskFacts, ended: ArchiveState, words: str | None) -> None:
    assert (outcome(task), shortfall(task)) == (ended, words)


def test_no_repr_shows_a_url() -> None:
    said = old_shape(0)
    task = after(NEW_TASK, said)
    assert "https" not in repr(said) + repr(task) + repr(decide(NEW_TASK, said))
