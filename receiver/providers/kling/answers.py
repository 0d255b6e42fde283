"""What an answer of Kling's HTTP API means. `code` in its JSON decides, not the HTTP status.

An answer that is not Kling's says nothing about the request: a create is then looked up by its external id before it is
sent again. A gateway's 400 or 422 with a message refuses the create.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from receiver.providers.base import AlreadyExists, NoSuchCall, Unavailable
from receiver.providers.kling.report import find_record
from storage.errors import AccountRefused, ModelRefused, ProviderFull, ProviderRejected, ProviderThrottled

FULL_CODE = 1303
THROTTLED_CODES = frozenset({1302, FULL_CODE})
# KLING §6: wrong key, no balance, address not allowed. None of these concerns the request.
ACCOUNT_CODES = frozenset({1000, 1001, 1002, 1003, 1004, 1100, 1101, 1102, 1304})
MODEL_CODE = 1103
# KLING §6: the HTTP status of refusals. Others count as 400.
STATUS_OF_CODE = {
    **dict.fromkeys(range(1_000, 1_005), 401),
    **dict.fromkeys((1100, 1101, 1102, 1302, FULL_CODE, 1304), 429),
    MODEL_CODE: 403,
}
# A gateway's answers to a call it does not have. Kling's own answer for an unknown task is 400/1201.
NO_ROUTE = frozenset({404, 405, 501})
# The timeouts of proxies, which may have passed the request on. Many repeat the HTTP status as their `code`.
TIMED_OUT = frozenset({408, 499})
# Refusals of a create by a gateway that has words of its own in place of Kling's codes. A 404 may be a wrong base URL.
REFUSED = frozenset({400, 422})
# Where a gateway's own balance is empty, it answers 402, or 403 with `quota_not_enough` or `insufficient_user_quota`.
# A refusal of a picture may name a credit card or a white balance.
NO_BALANCE = re.compile(r"quota|(?<!white )balance|\bcredits?\b(?! ?card)|余额|额度|欠费", re.IGNORECASE)
# 1201 is also the code of any invalid parameter. Only the message distinguishes them.
EXISTS = re.compile(r"external_task_id\b.*\balready exist", re.IGNORECASE)
NOT_FOUND = re.compile(r"\btask[ _]not[ _](found|exist)", re.IGNORECASE)


class NotKling(Unavailable):
    """An answer that is not Kling's."""


class NotFound(ProviderRejected):
    """The provider answered that it knows no such task."""


@dataclass(frozen=True)
class Answer:
    """One HTTP answer. `document`: its JSON object; None if it has none. `code`: None if it is not a number."""

    http_status: int
    document: dict[str, Any] | None = field(repr=False)
    code: int | None
    message: str
    after: float | None

    @property
    def words(self) -> str:
        code = "" if self.code is None else f", code {self.code}"
        return f"HTTP {self.http_status}{code}: {self.message or 'no message'}"


def refusal(answer: Answer, *, creating: bool) -> Exception | None:
    """The error that an answer reports; None if it may contain the requested data."""
    status, code, words = _status_meant(answer), answer.code or 0, answer.words
    refuses = 1_000 <= code < 2_000
    if not creating and status in NO_ROUTE and not NOT_FOUND.search(answer.message):
        return NoSuchCall(words, code=answer.code, http_status=status)
    throttled = _throttled(status, code, answer.message, creating=creating)
    if throttled is not None:
        return throttled(words, after=answer.after, code=answer.code, http_status=status, said=answer.message)
    if 300 <= status < 400:
        return NotKling(f"HTTP {status}, a redirect: RECEIVER_KLING_BASE_URL must be the address that it leads to")
    if answer.document is None and status != 413:
        return NotKling(f"the answer is not JSON (HTTP {status})", after=answer.after)
    if 5_000 <= code < 6_000:
        return Unavailable(words, after=answer.after)
    if not refuses and 200 <= status < 300:
        return None  # unknown codes too: gateways have their own codes for success
    if not refuses and status in TIMED_OUT:
        return NotKling(words, after=answer.after)
    unknown_task = not creating and 400 <= status < 500 and NOT_FOUND.search(answer.message)
    is_refused = creating and status in REFUSED and answer.message
    if refuses or unknown_task or is_refused or (code and 400 <= status < 500) or status in (403, 413):
        return _definite(answer, status, creating=creating)
    return NotKling(words, after=answer.after)


def _status_meant(answer: Answer) -> int:
    """The HTTP status of an answer, or the one that its code means where a gateway answers everything 200."""
    status, code = answer.http_status, answer.code or 0
    if not 200 <= status < 300:
        return status
    if 1_000 <= code < 2_000:
        return STATUS_OF_CODE.get(code, 400)
    return code if 400 <= code < 600 and find_record(answer.document) is None else status


def _throttled(status: int, code: int, message: str, *, creating: bool) -> type[ProviderThrottled] | None:
    """The error of an answer that says nothing about the request itself; None for other answers."""
    refuses = 1_000 <= code < 2_000
    is_of_account = status in (401, 402) or (status == 403 and NO_BALANCE.search(message))
    if code in ACCOUNT_CODES or (is_of_account and not refuses):
        return AccountRefused
    if creating and code == MODEL_CODE:
        return ModelRefused
    if code == FULL_CODE:
        return ProviderFull
    return ProviderThrottled if code in THROTTLED_CODES or (status == 429 and not refuses) else None


def _definite(answer: Answer, status: int, *, creating: bool) -> ProviderRejected:
    kind = ProviderRejected
    if creating and EXISTS.search(answer.message):
        kind = AlreadyExists
    elif not creating and NOT_FOUND.search(answer.message):
        kind = NotFound
    return kind(answer.words, code=answer.code, http_status=status, said=answer.message)


def message_in(document: Mapping[str, Any]) -> str:
    """The message of an error, in Kling's form or a gateway's: `error` {`message`}, `msg`, `detail` or [{`msg`}]."""
    error, detail = document.get("error"), document.get("detail")
    first = detail[0] if isinstance(detail, list) and detail else detail
    ours = (document.get("message"), error.get("message") if isinstance(error, dict) else error)
    for words in (*ours, document.get("msg"), first.get("msg") if isinstance(first, dict) else first):
        if isinstance(words, str) and words:
            return words
    return ""
