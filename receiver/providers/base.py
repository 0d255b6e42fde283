"""The interface to providers: what every adapter can do, and its error classes.

An adapter turns the provider's wire protocol into `storage.states.Report`, and its refusals into the classes of
`storage.errors`. Nothing outside `receiver/providers/` reads an answer or a callback of a provider. Requests use
Kling's words everywhere (`kling/request.py`), as do the gateway and the sandbox, which speak its protocol to others.

ProviderUnavailable          (storage.errors) the same work may succeed later
└── Unavailable                 the same, and knows whether the request may have left this host
ProviderThrottled            (storage.errors) slow down; a refused create costs nothing
└── AccountRefused               the key, the balance or (ModelRefused) the permission for a model is refused
ProviderRejected             (storage.errors) a definite refusal
├── AlreadyExists               this external id was used before: read the task
└── NoSuchCall                  a gateway without this call: use another one
RequestInvalid               the caller's fields break a rule: nothing is sent
PricesUnreadable             a price table of another form
BadSignature                 a delivery that does not prove its sender: answered 401
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol

from storage.errors import ProviderRejected, ProviderUnavailable, UserError
from storage.states import Report
from storage.url_parts import without_queries

# Control characters, lone surrogates and direction overrides. PostgreSQL refuses them, or a terminal obeys them.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]+")
_SURROGATE = re.compile("[\ud800-\udfff]")
_URL = re.compile(r"(https?://)(?:[^\s/?#@\"'<>]*@)?([^\s/?#\"'<>]*)[/?#][^\s\"'<>]*", re.IGNORECASE)


class Unavailable(ProviderUnavailable):
    """No usable answer. `sent` is False only if the request certainly never left this host."""

    def __init__(self, message: str, *, sent: bool = True, after: float | None = None) -> None:
        super().__init__(message, after=after)
        self.sent = sent


class ProxyUnavailable(Unavailable):
    """The egress proxy cannot be reached or refuses us: nothing was sent, and nothing is known of the provider."""

    def __init__(self, message: str) -> None:
        super().__init__(message, sent=False)


class AlreadyExists(ProviderRejected):
    """The provider knows this external id. This request made and cost nothing."""


class NoSuchCall(ProviderRejected):
    """This base URL does not have the call at all."""


class RequestInvalid(UserError, ValueError):
    """The request cannot be sent. One line per fault: field, value (shortened), rule."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults

    def __reduce__(self) -> tuple[type[RequestInvalid], tuple[list[str]]]:
        return RequestInvalid, (self.faults,)


class PricesUnreadable(ValueError):
    """The file is no price table. The message shows the form of one."""


class BadSignature(Exception):
    """The delivery's signature is missing, wrong or expired. The message says which, without header values."""


@dataclass(frozen=True)
class Record:
    """One task as the provider describes it. `body`: canonical JSON of the record without its envelope."""

    body: bytes = field(repr=False)
    report: Report


@dataclass(frozen=True)
class RequestFacts:
    """What to expect of a request.

    `expected`: number of files, watermarked copies included; None when the provider chooses. `slots`: how many of the
    account's concurrent pictures it uses until it ends. `model`: the provider's name of the model, None if unknown.
    """

    series: bool
    expected: int | None
    slots: int
    model: str | None = None


class ProviderRequest(Protocol):
    """A caller's fields, checked by the provider's rules (`Provider.parse_request`)."""

    @property
    def series(self) -> bool:
        """Whether the pictures form one series."""

    @property
    def expected(self) -> int | None:
        """Number of files, watermarked copies included; None when the provider chooses."""

    @property
    def slots(self) -> int:
        """How many of the account's concurrent pictures it uses until it ends."""

    @property
    def model(self) -> str:
        """The provider's name of the model. An account may lack permission for it."""

    def wire(self) -> dict[str, Any]:
        """The fields as sent, without the external id and the callback URL."""

    def canonical_hash(self) -> str:
        """64 hex digits, equal for requests that ask for the same."""

    def warnings(self) -> list[str]:
        """One line for each part that the caller may not have meant. The request is sent anyway."""


@dataclass(frozen=True)
class Estimate:
    """The cost of requests. `auto`: series whose length the provider chooses, counted as nine pictures each, so the
    sums are upper bounds. `unpriced`: pictures without a known price, by their model or resolution; the sums lack them.
    """

    tasks: int
    pictures: int
    slots: int
    units: Decimal
    usd: Decimal
    auto: int
    unpriced: int
    date: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON. Without a price of all pictures there is no sum."""
        sums = {name: None if self.unpriced else float(getattr(self, name)) for name in ("units", "usd")}
        return {**vars(self), **sums}


class Provider(Protocol):
    """One image provider. Every method may be called from any thread.

    Calls over the network raise `Unavailable`, `ProviderThrottled` and `ProviderRejected`. The owner of the row's claim
    acts on the class. The messages are safe to store and to show.
    """

    @property
    def name(self) -> str:
        """The name in the callback path and in `task.provider`."""

    @property
    def clock_ahead_seconds(self) -> float | None:
        """This host's clock minus the provider's, as of its last answer that names its time; None before."""

    @property
    def result_hosts(self) -> tuple[str, ...]:
        """Hosts from which this provider serves results, each with all hosts below it."""

    def create(self, request: Mapping[str, Any], *, external_task_id: str, callback_url: str | None) -> Record:
        """Create a task, once. The record has the provider's id.

        `AlreadyExists`: the id was used before. `Unavailable` with `sent`: the task may exist.
        """

    def read(self, *, provider_task_id: str | None, external_task_id: str) -> Record | None:
        """Read one task, by the provider's id if known, else by ours. None: the provider answers "not found".

        Also raises `NoSuchCall`: the list may have the task nevertheless.
        """

    def read_many(self, external_task_ids: Sequence[str]) -> dict[str, Record] | None:
        """Read up to 20 tasks by our ids. Returns {id: record} of those found; None if there is no batch call."""

    def list_page(self, page: int, size: int) -> list[Record]:
        """Read one page of the account's tasks, from 1, with `size` tasks each. An empty list means that the page is
        past the end.
        """

    def parse(self, body: bytes) -> Report:
        """Read a callback or a `Record.body`. Raises `storage.errors.ReportUnreadable`, and nothing else."""

    def ids(self, body: bytes) -> tuple[str | None, str | None]:
        """The external id and the provider's own of what `parse` can read. Raises what `parse` raises.

        It costs far less than `parse`, because a stranger may send any number of long callbacks that name no task.
        """

    def verify(self, headers: Mapping[str, str], body: bytes, *, now: float | None = None) -> str | None:
        """The verified id of a signed delivery; None if no secrets are configured. Raises `BadSignature`.

        `now`: Unix seconds of its arrival, None = it arrives now.
        """

    def parse_request(self, fields: Mapping[str, Any]) -> ProviderRequest:
        """Check a caller's fields. Raises `RequestInvalid` with the first 20 faults and the number of the others."""

    def estimate(self, fields: Iterable[Mapping[str, Any]], table: Path | None) -> Estimate:
        """The cost of requests with these fields. `table`: a file with the user's prices, None = the provider's prices.

        Raises `PricesUnreadable`.
        """

    def request_facts(self, request: Mapping[str, Any]) -> RequestFacts:
        """What to expect of a request, as sent or as stored. Never raises."""

    def redacted(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The request as it is stored, with the bytes of inputs replaced by their hashes."""

    def url_expiry(self, url: str) -> datetime | None:
        """When a result URL expires; None if it does not say."""


def plain(text: str, max_chars: int) -> str:
    """Make foreign text safe to store and to show: one line, no NUL, of each URL only the host, and no query.

    Queries hold signatures and paths hold tokens, so both are removed.
    """
    if not text or (text.isalnum() and len(text) <= max_chars):
        return text  # most reports: no message, and a status word
    one_line = " ".join(_UNPRINTABLE.sub(" ", text[: 8 * max_chars]).split())
    visible = without_queries(_URL.sub(r"\1\2/…", one_line))
    return visible if len(visible) <= max_chars else visible[: max_chars - 1] + "…"


def is_storable(text: str) -> bool:
    """Whether a database takes this text: no NUL, no lone surrogate."""
    return "\0" not in text and (text.isascii() or _SURROGATE.search(text) is None)
