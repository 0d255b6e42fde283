"""RECEIVER_EVENT_SINKS: any number of `[name=]URL[#filter,filter]`, separated by spaces. Pure: nothing is opened.

    https://hooks.example.com/pictures                      a webhook, called hooks.example.com
    audit=file:///var/log/receiver/events.jsonl             JSON lines
    stdout:#task.*                                          the same, of all events of tasks
    archived=sqs+https://sqs.eu-central-1.amazonaws.com/123456789012/pictures#task.archived

A URL may contain a secret: messages show only an entry's position, its name and its host.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from storage.errors import FetchRefused
from storage.fetch.addresses import AddressPolicy, check_url
from storage.rows.events import EventName
from storage.url_parts import split_url

SinkKind = Literal["webhook", "sqs", "file", "stdout"]

NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,62})=(?=[A-Za-z][A-Za-z0-9+.-]*:)")
NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")
# The longest name of an event has 20. A pattern of 4,000 characters took 0.2 s of the event loop.
MAX_PATTERN_CHARS = 64
# There are half as many events. Compiling the 300 patterns of one address took 8 ms of the event loop.
MAX_PATTERNS = 40
SQS_PREFIX = "sqs+"
# The sink of gateway clients, which is not an entry of the setting.
RESERVED = "client"
FORMS = "write [name=]URL[#filters] with https://, sqs+https://, file:/// or stdout:"


@dataclass(frozen=True)
class Entry:
    """One configured sink. `names`: of the events it wants. `url`: without prefix and filters."""

    name: str
    kind: SinkKind
    url: str = field(repr=False)
    names: frozenset[str]

    @property
    def path(self) -> Path:
        return Path(unquote(urlsplit(self.url).path))


def parse(texts: Sequence[str], policy: AddressPolicy) -> list[Entry]:
    """The sinks in the order of the setting. Raises ValueError, one line per fault."""
    entries: list[Entry] = []
    faults = []
    for place, text in enumerate(texts, 1):
        try:
            entries.append(_entry(text, policy))
        except (ValueError, FetchRefused) as error:
            faults.append(f"entry {place}: {error}")
    faults += _doubles(entries)
    if faults:
        raise ValueError("\n".join(faults))
    return entries


def _doubles(entries: Sequence[Entry]) -> Iterator[str]:
    names = [entry.name for entry in entries]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"{names.count(name)} sinks are called {name}: name them, as in one=https://… other=https://…"
    if RESERVED in names:
        yield f"{RESERVED} is the name of the gateway's own callbacks: choose another name"


def _entry(text: str, policy: AddressPolicy) -> Entry:
    named = NAMED.match(text)
    url, _, filters = (text[named.end() :] if named else text).partition("#")
    if "@" in filters:  # the end of a password with a # in it, parts of which other messages would show
        raise ValueError(FORMS)
    kind, url, own_name = _target(url, policy)
    names = names_matching(part for part in filters.split(",") if part)
    name = named.group(1) if named else NOT_IN_NAMES.sub("-", own_name).strip("-")[:63]
    return Entry(name or kind, kind, url, frozenset(map(str, names)))


def _target(url: str, policy: AddressPolicy) -> tuple[SinkKind, str, str]:
    """The kind of the sink, its URL, and its name if the entry has none."""
    if url == "stdout:":
        return "stdout", url, "stdout"
    scheme = url.partition(":")[0].lower()
    if scheme == "file":
        return "file", url, _file(url).stem
    if scheme in ("http", "https"):
        return "webhook", url, check_url(url, policy).host
    if scheme in ("sqs+http", "sqs+https"):
        return _queue(url[len(SQS_PREFIX) :], policy)
    raise ValueError(FORMS)


def _file(url: str) -> Path:
    parts = split_url(url)
    path = Path(unquote(parts.path))
    if parts.netloc or not path.is_absolute() or path.name == "" or url.endswith("/"):
        raise ValueError("write file:///FOLDER/FILE, the whole path")
    return path


def _queue(url: str, policy: AddressPolicy) -> tuple[SinkKind, str, str]:
    """An https queue may be anywhere, at a private endpoint as well: the operator owns it, and boto3 connects to it."""
    parts = split_url(url)
    account, _, queue = parts.path.strip("/").partition("/")
    if not parts.hostname or parts.username or not account or not queue:
        raise ValueError("write sqs+ and the queue's URL, as in sqs+https://sqs.REGION.amazonaws.com/ACCOUNT/QUEUE")
    if parts.scheme == "http":
        check_url(url, policy)
    return "sqs", url, queue.rpartition("/")[2]


def names_matching(patterns: Iterable[str]) -> frozenset[EventName]:
    """The names that match patterns like `task.*`; no pattern = all. Raises ValueError for one that matches none, and
    for more than MAX_PATTERNS.
    """
    chosen: set[EventName] = set()
    given = dict.fromkeys(patterns)
    if len(given) > MAX_PATTERNS:
        raise ValueError(f"{len(given)} patterns of events are given, at most {MAX_PATTERNS} may be")
    for pattern in given:
        if len(pattern) > MAX_PATTERN_CHARS:
            raise ValueError(
                f"{pattern[:40]!r}… is longer than {MAX_PATTERN_CHARS} characters; no event's name is that long"
            )
        matching = {name for name in EventName if fnmatchcase(name, pattern)}
        if not matching:
            raise ValueError(f"no event is called {pattern[:40]!r}; the events are {', '.join(EventName)}")
        chosen |= matching
    return frozenset(chosen or EventName)
