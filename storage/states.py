"""What a report does to a task: old state + report -> new state + what to do. Pure code, no I/O, no clock.

Ranks only rise, assets are the union of all reports, and a contradiction is flagged and read once: so every
order and multiplicity of the same reports ends in the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Literal, NamedTuple
from urllib.parse import urlsplit


class TaskState(StrEnum):
    CREATED = "created"
    SUBMITTED = "submitted"
    PROCESSING = "processing"
    FAILED = "failed"
    SUCCEEDED = "succeeded"


# Succeeded outranks failed: pictures that exist are worth keeping.
RANK = {state: rank for rank, state in enumerate(TaskState)}
TERMINAL = frozenset({TaskState.FAILED, TaskState.SUCCEEDED})


class ArchiveState(StrEnum):
    NONE = "none"
    ARCHIVING = "archiving"
    ARCHIVED = "archived"
    INCOMPLETE = "incomplete"


class AssetState(StrEnum):
    DUE = "due"
    ARCHIVED = "archived"
    FAILED = "failed"


class CallbackState(StrEnum):
    RECEIVED = "received"
    APPLIED = "applied"
    UNMATCHED = "unmatched"
    UNREADABLE = "unreadable"
    REJECTED = "rejected"


class DispatchState(StrEnum):
    DUE = "due"
    DELIVERED = "delivered"
    DEAD = "dead"  # the retry schedule is over, or its sink is gone; can be sent again


class Step(StrEnum):
    """What a due task row waits for."""

    CREATE = "create"  # send it to the provider, or find out whether it was sent
    READ = "read"  # read the task at the provider
    FINISH = "finish"  # every asset is settled: write the manifest, end the archive


# Of a task that waits for a person. The condition of an index, like that of the events below.
PARKED = "due_at IS NULL AND queued_at IS NULL AND (step IS NOT NULL OR state NOT IN ('failed', 'succeeded'))"
# Of a delivery that matches no task and waits for a person: nobody has dismissed it (`task_conditions.DISMISSED`).
UNMATCHED = "state = 'unmatched' AND coalesce(substr(reason, 1, 11), '') <> 'dismissed: '"
# Of a file that was given up and waits for a person, likewise.
GIVEN_UP = "state = 'failed' AND coalesce(substr(error, 1, 11), '') <> 'dismissed: '"
# The events of every task that ends well. The condition of an index, which SQLite requires word for word in a query.
FREQUENT_EVENTS = (
    "task.created", "task.submitted", "task.processing", "task.succeeded", "task.archived", "asset.archived",
)  # fmt: skip
RARE_EVENT = f"name NOT IN ({', '.join(repr(name) for name in FREQUENT_EVENTS)})"

OutputType = Literal["image", "video", "audio"]
# Kinds of files that are pictures; a watermarked copy has the kind of its original.
PICTURES = frozenset({"image", "series"})

# A shortfall is believed after this many reads. The provider may be silent for three tries at most.
COMPLETENESS_DELAYS_SECONDS = (0, 120, 480)
# After this many unusable answers in a row the task is reported as incomplete, and the file is still tried. By the
# schedule of `storage.archive.unusable` the last answer comes 15 minutes after the first.
SAID_AFTER_TRIES = 8
# A larger index is an error or an attack on an integer column, so positions are used instead.
MAX_INDEX = 9_999
# A task has at most twice the files that were requested, and never more than this: nine pictures, twice with watermark,
# is the largest request. A provider with another rule needs a number of its own here.
MAX_FILES = 64
PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Output:
    """One produced file as reported. `index`: its number among those of its type."""

    type: OutputType
    url: str | None = field(repr=False)
    index: int
    watermark_url: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Report:
    """What one delivery reports about one task. `status` None: an unknown word (stored in `raw_status`).

    `series` is the body's own claim (None: it makes none); the request's value takes precedence if there is one.
    `created_ms`, `updated_ms`: the provider's clock, milliseconds since 1970.
    """

    provider_task_id: str | None
    external_task_id: str | None
    status: TaskState | None
    raw_status: str = ""
    message: str = ""
    outputs: tuple[Output, ...] = ()
    series: bool | None = None
    created_ms: int | None = None
    updated_ms: int | None = None
    units: str | None = None

    @property
    def created_at(self) -> datetime | None:
        return None if self.created_ms is None else datetime.fromtimestamp(self.created_ms / 1000, UTC)


@dataclass(frozen=True, order=True)
class AssetName:
    """Which picture of a task. `original`: for a watermarked copy the kind it belongs to, else empty."""

    kind: str
    index: int
    original: str = ""

    @property
    def is_picture(self) -> bool:
        return (self.original or self.kind) in PICTURES


@dataclass(frozen=True)
class AssetFacts:
    """`unusable_tries`: how often in a row its host answered with something that is no file. `unconfirmed`: only an
    unsigned delivery has named this link."""

    state: AssetState
    url: str = field(repr=False)
    unusable_tries: int = 0
    unconfirmed: bool = False

    @property
    def is_awaited(self) -> bool:
        """Whether the end of the archive waits for it. After 15 minutes of unusable answers the archive ends without
        it.
        """
        return self.state is AssetState.DUE and self.unusable_tries < SAID_AFTER_TRIES


@dataclass(frozen=True)
class TaskFacts:
    """The part of a task row, and of its asset rows, that decisions read."""

    state: TaskState
    archive: ArchiveState = ArchiveState.NONE
    series: bool | None = None
    expected: int | None = None
    contradicted: bool = False
    completeness_reads: int = 0
    assets: Mapping[AssetName, AssetFacts] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """What to write. `contradicted`: newly so, which also wants one read now."""

    state: TaskState
    archive: ArchiveState
    contradicted: bool = False
    add: Mapping[AssetName, str] = field(default_factory=dict, repr=False)
    replace: Mapping[AssetName, str] = field(default_factory=dict, repr=False)


class Next(NamedTuple):
    """The step a task row waits for and in how many seconds; both None = nothing until something happens."""

    step: Step | None = None
    delay_seconds: float | None = None


READ_NOW = Next(Step.READ, 0)


def expected_files(*, n: int, series: bool, series_amount: int | Literal["auto"], watermark: bool) -> int | None:
    """How many files a request asks for, watermarked copies counted; None when the provider chooses."""
    pictures = series_amount if series else n
    if pictures == "auto":
        return None
    return pictures * (2 if watermark else 1)


def assets_in(report: Report, series: bool | None) -> dict[AssetName, str]:
    """Name every file of a report: {name: url}. `series`: from the request, None when unknown."""
    is_series = report.series if series is None else series
    named: dict[AssetName, str] = {}
    for output in report.outputs:
        kind = "series" if output.type == "image" and is_series else output.type
        if output.url:
            named[AssetName(kind, output.index)] = output.url
        if output.watermark_url:
            named[AssetName("watermark", output.index, kind)] = output.watermark_url
    return named


def decide(task: TaskFacts, report: Report, *, confirmed: bool = True) -> Decision:
    """Apply one report to one task. A repeated or late report takes nothing back.

    `confirmed`: the provider itself reported it, in an answer or a signed delivery. Otherwise it replaces no confirmed
    link.
    """
    if report.status is None:
        return Decision(task.state, task.archive)
    state = max(task.state, report.status, key=RANK.__getitem__)
    contradiction = {task.state, report.status} == TERMINAL and not task.contradicted
    if report.status is not TaskState.SUCCEEDED:
        return Decision(state, task.archive, contradiction)
    known, named = task.assets, assets_in(report, task.series)
    new = [name for name in named if name not in known]
    most = MAX_FILES if task.expected is None else min(2 * max(task.expected, 1), MAX_FILES)
    add = {name: named[name] for name in new[: max(most - len(known), 0)]}
    replace = {name: url for name, url in named.items() if name in known and _takes(known[name], url, confirmed)}
    archive = ArchiveState.ARCHIVING if add or task.archive is ArchiveState.NONE else task.archive
    return Decision(state, archive, contradiction, add, replace)


def other_files(task: TaskFacts, report: Report) -> dict[AssetName, str]:
    """Files that the report names in place of other ones: {name: url}. A fresh link to the same file is not one.

    A link's query is its signature, and changes; its scheme, host, port and path identify the file.
    """
    if report.status is not TaskState.SUCCEEDED:
        return {}
    known = task.assets
    named = assets_in(report, task.series).items()
    return {name: url for name, url in named if name in known and _place(known[name].url) != _place(url)}


def agrees(task: TaskFacts, report: Report) -> bool:
    """Whether the task is as the report says: in the same state, and with each of its files."""
    named = assets_in(report, task.series)
    return report.status is task.state and named.keys() <= task.assets.keys() and not other_files(task, report)


def _place(url: str) -> tuple[str, str, int | None, str]:
    try:
        parts = urlsplit(url.strip())
        return (parts.scheme, parts.hostname or "", parts.port or PORTS.get(parts.scheme), parts.path)
    except ValueError:
        return ("", "", None, url)


def _takes(asset: AssetFacts, url: str, confirmed: bool) -> bool:
    return asset.state is not AssetState.ARCHIVED and asset.url != url and (confirmed or asset.unconfirmed)


def is_short(task: TaskFacts) -> bool:
    """Whether fewer files are known than were requested (none at all is always too few)."""
    return len(task.assets) < max(task.expected or 1, 1)


def next_step(task: TaskFacts, poll_delay_seconds: float) -> Next:
    """The next step of a settled task row. `poll_delay_seconds`: when an unfinished task is read again."""
    if task.state is TaskState.CREATED:
        return Next(Step.CREATE, poll_delay_seconds)
    if task.state not in TERMINAL:
        return Next(Step.READ, poll_delay_seconds)
    if task.archive is not ArchiveState.ARCHIVING:
        return Next()
    if is_short(task) and task.completeness_reads < len(COMPLETENESS_DELAYS_SECONDS):
        return Next(Step.READ, COMPLETENESS_DELAYS_SECONDS[task.completeness_reads])
    is_awaited = any(asset.is_awaited for asset in task.assets.values())
    return Next() if is_awaited else Next(Step.FINISH, 0)


def reopened(archive: ArchiveState) -> ArchiveState:
    """The state of an archive once one of its files was settled. An archive reported as incomplete gets another end."""
    return ArchiveState.ARCHIVING if archive is ArchiveState.INCOMPLETE else archive


def outcome(task: TaskFacts) -> ArchiveState:
    """How a finished archive ends: incomplete = a file the provider named is not kept, or none came.

    It may still change while a file of it is due.
    """
    states = {asset.state for asset in task.assets.values()}
    return ArchiveState.ARCHIVED if states == {AssetState.ARCHIVED} else ArchiveState.INCOMPLETE


def shortfall(task: TaskFacts) -> str | None:
    """`delivered 3 of 4`, or None if all requested files came."""
    if task.expected is None or len(task.assets) >= task.expected:
        return None
    return f"delivered {len(task.assets)} of {task.expected}"
