"""Filters of lists as an address has them. What is not understood is a fault: nothing is ignored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime
from typing import ClassVar, NamedTuple, TypeVar

from storage.states import ArchiveState, CallbackState, TaskState

F = TypeVar("F", "TaskFilter", "DeliveryFilter")

MAX_FIELD_CHARS = 200
# The values of a filter's `files`: given up, tried again later, about to be deleted at the provider.
FILES = ("failed", "waiting", "expiring")
# Fields of an address that filter nothing.
OTHER_FIELDS = ("before",)


class Fault(NamedTuple):
    """A field that is not understood. `kind`: choice, day, page, text, absent (no row has this name), field (no filter
    of this list), twice, or order (this day comes before `since`). `may_be`: what it may be instead, or the first day.
    """

    name: str
    kind: str
    may_be: Sequence[str] = ()


class FilterInvalid(ValueError):
    """An address has fields that are not understood. Without them the list would show rows that were not asked for."""

    def __init__(self, *faults: Fault) -> None:
        super().__init__(", ".join(each.name for each in faults))
        self.faults = faults


@dataclass(frozen=True)
class _Filter:
    @property
    def given(self) -> dict[str, str]:
        """Its fields that filter something. Forms hold these, and nothing else of an address."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name))}

    @property
    def is_set(self) -> bool:
        return bool(self.given)


@dataclass(frozen=True)
class TaskFilter(_Filter):
    """The filter in the address of a list. An empty field filters nothing. `q`: words in an id or in the prompt.
    `files`: one of `FILES`.
    """

    CHOICES: ClassVar[Mapping[str, Sequence[str]]] = {
        "state": list(TaskState), "archive": list(ArchiveState), "files": FILES,
    }  # fmt: skip
    q: str = ""
    state: str = ""
    archive: str = ""
    files: str = ""
    provider: str = ""
    model: str = ""
    batch: str = ""
    since: str = ""
    until: str = ""


@dataclass(frozen=True)
class DeliveryFilter(_Filter):
    """`state`: a state, `refused` or `dismissed`; what a person dismissed is not `unmatched` here. `task`: the external
    id of the task that it belongs to. `cause`: words in the reason.
    """

    CHOICES: ClassVar[Mapping[str, Sequence[str]]] = {"state": ["refused", "dismissed", *CallbackState]}
    state: str = ""
    provider: str = ""
    cause: str = ""
    task: str = ""
    since: str = ""
    until: str = ""


def read_filter(kind: type[F], query: Mapping[str, str], **choices: Sequence[str]) -> F:
    """The filter in an address. `choices`: all values of further fields. Raises FilterInvalid."""
    own = [each.name for each in fields(kind)]
    given = understood(query, *own, **kind.CHOICES, **choices)
    if given["until"] and given["since"] > given["until"]:
        raise FilterInvalid(Fault("until", "order", [given["since"]]))
    return kind(**{name: given[name] for name in own})


def understood(query: Mapping[str, str], *names: str, **choices: Sequence[str]) -> dict[str, str]:
    """The values of the fields `names`, and of `choices` with all of their values. Raises FilterInvalid."""
    given = {name: query.get(name, "").strip() for name in [*names, *choices]}
    found = [_fault(name, value, choices.get(name)) for name, value in given.items() if value]
    found += [Fault(name, "field", list(given)) for name in query if name not in given and name not in OTHER_FIELDS]
    if faults := [each for each in found if each]:
        raise FilterInvalid(*faults)
    return given


def given_twice(pairs: Sequence[tuple[str, str]]) -> list[Fault]:
    """A fault for each field that an address has twice. Files of a zip are named by many of one name, `id`."""
    counts = Counter(name for name, _ in pairs if name != "id")
    return [Fault(name, "twice") for name, count in counts.items() if count > 1]


def _fault(name: str, value: str, choices: Sequence[str] | None) -> Fault | None:
    if choices is not None:
        return None if value in choices else Fault(name, "choice", choices)
    if name in ("since", "until"):
        return None if day_of(value) else Fault(name, "day")
    return None if is_plain(value) else Fault(name, "text")


def is_plain(words: str) -> bool:
    """Whether a row may have this value."""
    return len(words) <= MAX_FIELD_CHARS and words.isprintable()


def is_number(text: str) -> bool:
    """Whether this may be the id of a row that has a number."""
    return text.isascii() and text.isdigit() and len(text) <= 18


def number(text: str) -> int:
    """The number that a text is. Raises ValueError."""
    if not is_number(text):
        raise ValueError(text)
    return int(text)


def read_page(query: Mapping[str, str], name: str) -> int | None:
    """The number in this field of an address, None without one. Raises FilterInvalid."""
    try:
        return number(query[name]) if query.get(name) else None
    except ValueError:
        raise FilterInvalid(Fault(name, "page")) from None


def day_of(text: str) -> datetime | None:
    """The first moment of a date; None for another text."""
    try:
        found = date.fromisoformat(text)
        is_day = 1970 < found.year < 9000 and text == found.isoformat()  # as a browser's field of a date shows it
        return datetime(found.year, found.month, found.day, tzinfo=UTC) if is_day else None
    except ValueError:
        return None
