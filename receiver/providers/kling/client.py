"""Kling's image tasks, directly or through a gateway: create, read, list, and the bodies it sends us.

`code` in the answer decides, not the HTTP status; an answer that is not Kling's says nothing about the
request, so a create that met one is looked up by its external id before it is sent again.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
from pydantic import SecretStr
from standardwebhooks.webhooks import EmptyWebhookSecretError, Webhook

from receiver.providers.base import (
    AlreadyExists,
    Created,
    Estimate,
    NoSuchCall,
    Record,
    RequestFacts,
    Unavailable,
    plain,
    verify_standard_webhook,
)
from receiver.providers.kling import prices
from receiver.providers.kling.report import (
    find_record,
    loads,
    read_record,
    read_report,
    status_word,
    task_id_in,
    url_expiry,
    usable_id,
    whole,
)
from receiver.providers.kling.request import OmniImageRequest, facts_of, parse_request, redacted
from storage.circuit import Circuit
from storage.errors import (
    AccountRefused,
    ModelRefused,
    ProviderFull,
    ProviderRejected,
    ProviderThrottled,
    ReportUnreadable,
    UserError,
)
from storage.fetch import connection
from storage.states import Report

CREATE_PATH = "/v1/images/omni-image"
BATCH_PATH = "/tasks"
MAX_BATCH_IDS = 20  # 21 are answered 400/1201 (seen)
MAX_ANSWER_BYTES = 4 * 1024 * 1024
MAX_MESSAGE_CHARS = 300
JWT_LIFETIME_SECONDS = 1_800
JWT_RENEW_SECONDS = 300  # before its end, so that none expires under way
JWT_CLOCK_CODES = frozenset({1003, 1004})
FULL_CODE = 1303
THROTTLED_CODES = frozenset({1302, FULL_CODE})
# KLING §6: the key is wrong, the account has no balance, the address is not allowed. None is about the request.
ACCOUNT_CODES = frozenset({1000, 1001, 1002, 1003, 1004, 1100, 1101, 1102, 1304})
MODEL_CODE = 1103
# Answers to a question that is not passed on; Kling's own word for an unknown task is 400/1201.
NO_ROUTE = frozenset({404, 405, 501})
# 1201 is also the code of any bad parameter: only the message tells these two apart.
EXISTS = re.compile(r"external_task_id\b.*\balready exist", re.IGNORECASE)
NOT_FOUND = re.compile(r"\btask[ _]not[ _](found|exist)", re.IGNORECASE)


class OptionInvalid(UserError, ValueError):
    """A base URL, a key or a secret that cannot be right."""


class _NotKling(Unavailable):
    """Something answered, in words that are not Kling's."""


class _NotFound(ProviderRejected):
    """The provider says it knows no such task."""


@dataclass(frozen=True)
class _Answer:
    """One HTTP answer. `document`: its JSON object, None when it was none. `code`: None when there was no number."""

    http_status: int
    document: dict[str, Any] | None = field(repr=False)
    code: int | None
    message: str
    after: float | None

    @property
    def words(self) -> str:
        code = "" if self.code is None else f", code {self.code}"
        return f"HTTP {self.http_status}{code}: {self.message or 'no message'}"


class Kling:
    """The provider `kling`, as `receiver.providers.base.Provider` describes it. Safe to share between threads.

    `timeout_seconds`: for each connect, write and read, and for a whole body. `now`: Unix seconds.
    `circuit`: is told of every call whether the provider answered it, be it with a refusal.
    Raises `OptionInvalid` for a base URL, key or webhook secret that cannot be right; the message holds none of them.
    """

    name = "kling"
    result_hosts = ("klingai.com", "kechuangai.com", "inkwai.com")

    def __init__(
        self,
        *,
        base_url: str,
        api_key: SecretStr | None = None,
        access_key: str | None = None,
        secret_key: SecretStr | None = None,
        webhook_secrets: Sequence[SecretStr] = (),
        timeout_seconds: float = 20,
        now: Callable[[], float] = time.time,
        circuit: Circuit | None = None,
    ) -> None:
        self._base_url = _checked_base_url(base_url)
        self._api_key = _checked_key(api_key) if api_key else None
        self._access_key = access_key
        self._jwt = _Jwt(access_key, secret_key.get_secret_value(), now) if access_key and secret_key else None
        self._webhook_secrets = [_webhook(secret) for secret in webhook_secrets]
        self._timeout_seconds = timeout_seconds
        self._now = now
        self._circuit = circuit or Circuit()
        # The host's clock minus the Date of the last answer, for `receiver check`; None before the first.
        self.clock_ahead_seconds: float | None = None
        # No proxy of the environment, no redirect: the request holds the key and goes where we were told.
        self._client = httpx.Client(
            verify=connection.tls_context(),
            trust_env=False,
            follow_redirects=False,
            timeout=timeout_seconds,
            headers={"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "kling-receiver"},
        )

    def __repr__(self) -> str:
        return f"Kling(base_url={self._base_url!r})"

    def close(self) -> None:
        self._client.close()

    def create(self, request: Mapping[str, Any], *, external_task_id: str, callback_url: str | None) -> Created:
        fields = {**request, "external_task_id": external_task_id}
        if callback_url:
            fields["callback_url"] = callback_url
        answer = self._ask("POST", CREATE_PATH, json.dumps(fields, allow_nan=False).encode())
        record = find_record(answer.document)
        if record is None or not usable_id(task_id_in(record)):
            raise Unavailable(f"the create answer names no task ({answer.words})")
        if not status_word(record):
            record = {**record, "task_status": "submitted"}  # some gateways answer with nothing but the id
        created = _believed(record)
        return Created(created.report.provider_task_id or "", created.report, created.body)

    def read(self, *, provider_task_id: str | None, external_task_id: str) -> Record | None:
        for task_id in dict.fromkeys((provider_task_id, external_task_id)):
            record = self._read_one(task_id) if task_id else None
            if record is not None:
                return record
        return None

    def _read_one(self, task_id: str) -> Record | None:
        try:
            answer = self._ask("GET", f"{CREATE_PATH}/{_path_segment(task_id)}")
        except _NotFound:
            return None
        record = find_record(answer.document)
        if record is None:
            raise Unavailable(f"the answer holds no task ({answer.words})")
        return _believed(record)

    def read_many(
        self, *, provider_task_ids: Sequence[str] = (), external_task_ids: Sequence[str] = ()
    ) -> dict[str, Record] | None:
        ids = provider_task_ids or external_task_ids
        if len(ids) > MAX_BATCH_IDS or (provider_task_ids and external_task_ids):
            raise ValueError(f"at most {MAX_BATCH_IDS} ids, of one kind")
        if self._api_key is None:  # a JWT is answered 401/1002 there (seen)
            return None
        parameter = "task_ids" if provider_task_ids else "external_task_ids"
        asked = [task_id for task_id in ids if "," not in task_id]
        if not asked:
            return {}
        query = ",".join(quote(task_id, safe="") for task_id in asked)
        try:
            answer = self._ask("GET", f"{BATCH_PATH}?{parameter}={query}")
        except (ProviderRejected, AccountRefused, _NotKling):
            return None
        listed = _listed(answer)
        if listed is None:
            return None
        named = {
            record.report.provider_task_id if provider_task_ids else record.report.external_task_id: record
            for record in listed
        }
        return {task_id: named[task_id] for task_id in asked if task_id in named}

    def list_page(self, page: int, size: int) -> list[Record]:
        answer = self._ask("GET", f"{CREATE_PATH}?pageNum={page:d}&pageSize={size:d}")
        listed = _listed(answer)
        if listed is None:
            raise Unavailable(f"the answer holds no list of tasks ({answer.words})")
        return listed

    def parse(self, body: bytes) -> Report:
        try:
            record = find_record(loads(body))
        except (ValueError, RecursionError) as error:
            raise ReportUnreadable(f"not JSON we can read ({type(error).__name__})") from None
        if record is None:
            raise ReportUnreadable("no task in it: neither task_id nor id with a status")
        return read_report(record)

    def verify(self, headers: Mapping[str, str], body: bytes, *, now: float | None = None) -> str | None:
        if not self._webhook_secrets:
            return None
        return verify_standard_webhook(self._webhook_secrets, headers, body, now=self._now() if now is None else now)

    def parse_request(self, fields: Mapping[str, Any]) -> OmniImageRequest:
        return parse_request(fields)

    def estimate(self, fields: Iterable[Mapping[str, Any]], table: Path | None) -> Estimate:
        return prices.estimate(fields, prices.read_prices(table) if table else prices.KLING)

    def request_facts(self, request: Mapping[str, Any]) -> RequestFacts:
        return facts_of(request)

    def redacted(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return redacted(request)

    def url_expiry(self, url: str) -> datetime | None:
        return url_expiry(url)

    def _ask(self, method: str, path: str, content: bytes | None = None) -> _Answer:
        """One request, minted anew once if the provider dislikes the token's times. Raises what a refusal means."""
        token = self._token()
        with self._circuit.watching(Unavailable, ProviderRejected, ProviderThrottled):
            answer = self._exchange(method, path, content, token)
            if answer.code in JWT_CLOCK_CODES and self._jwt and not self._api_key:
                answer = self._exchange(method, path, content, self._jwt.token(fresh=True))
            refusal = _refusal(answer, creating=method == "POST")
            if refusal is not None:
                raise refusal
            return answer

    def _token(self) -> str:
        if self._api_key:
            return self._api_key
        if self._jwt:
            return self._jwt.token()
        raise AccountRefused("no provider credentials are configured")

    def _exchange(self, method: str, path: str, content: bytes | None, token: str) -> _Answer:
        headers = {"Authorization": f"Bearer {token}"}
        if content is not None:
            headers["Content-Type"] = "application/json"
        try:
            with self._client.stream(method, self._base_url + path, content=content, headers=headers) as response:
                body = self._body(response)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise Unavailable(f"no connection to the provider ({self._safe(str(error))})", sent=False) from None
        except httpx.HTTPError as error:
            raise Unavailable(f"the connection broke ({type(error).__name__})") from None
        self._note_date(response.headers.get("date"))
        return self._answer(response, body)

    def _body(self, response: httpx.Response) -> bytes:
        body = bytearray()
        ends_at = time.monotonic() + self._timeout_seconds
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > MAX_ANSWER_BYTES:
                raise Unavailable(f"the answer is larger than {MAX_ANSWER_BYTES} bytes")
            if time.monotonic() > ends_at:
                raise Unavailable(f"the answer took longer than {self._timeout_seconds:g} s")
        return bytes(body)

    def _answer(self, response: httpx.Response, body: bytes) -> _Answer:
        try:
            document = loads(body)
        except (ValueError, RecursionError):
            document = None
        document = document if isinstance(document, dict) else None
        return _Answer(
            http_status=response.status_code,
            document=document,
            code=whole((document or {}).get("code")),
            message=self._safe(_message_in(document or {})),
            after=_seconds(response.headers.get("retry-after"), self._now()),
        )

    def _note_date(self, header: str | None) -> None:
        sent_at = _http_date(header)
        if sent_at is not None:
            self.clock_ahead_seconds = self._now() - sent_at

    def _safe(self, text: str) -> str:
        """Foreign words without our keys or token, should the other side echo it."""
        for key in (self._api_key, self._access_key):
            text = text.replace(key, "…") if key else text
        return plain(re.sub(r"\beyJ[\w.-]{20,}", "…", text), MAX_MESSAGE_CHARS)


class _Jwt:
    """Tokens from access key and secret key, kept until shortly before their end."""

    def __init__(self, access_key: str, secret_key: str, now: Callable[[], float]) -> None:
        self._access_key = access_key
        self._secret_key = secret_key
        self._now = now
        self._lock = threading.Lock()
        self._token = ""
        self._minted_at = -math.inf

    def token(self, *, fresh: bool = False) -> str:
        with self._lock:
            age_seconds = self._now() - self._minted_at
            if fresh or not 0 <= age_seconds < JWT_LIFETIME_SECONDS - JWT_RENEW_SECONDS:
                self._minted_at = self._now()
                claims = {
                    "iss": self._access_key,
                    "exp": int(self._minted_at) + JWT_LIFETIME_SECONDS,
                    "nbf": int(self._minted_at) - 5,
                }
                import jwt  # with cryptography a tenth of a second, which an API key does not need

                self._token = jwt.encode(claims, self._secret_key, algorithm="HS256")
            return self._token


def _checked_base_url(base_url: str) -> str:
    parts = urlsplit(base_url)
    extras = parts.query or parts.fragment or parts.username or parts.password
    if parts.scheme not in ("http", "https") or not parts.hostname or extras:
        raise OptionInvalid("base_url must be http(s)://HOST[/PATH], without user, query or fragment")
    return base_url.rstrip("/")


def _checked_key(secret: SecretStr) -> str:
    key = secret.get_secret_value()
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise OptionInvalid("api_key must be printable ASCII without spaces")
    return key


def _webhook(secret: SecretStr) -> Webhook:
    try:
        return Webhook(secret.get_secret_value())
    except (ValueError, EmptyWebhookSecretError):
        raise OptionInvalid("a webhook secret must be whsec_ and Base64") from None


def _path_segment(task_id: str) -> str:
    """An id as one path segment; `.` and `..` would climb."""
    return quote(task_id, safe="") if task_id.strip(".") else task_id.replace(".", "%2E")


def _refusal(answer: _Answer, *, creating: bool) -> Exception | None:
    """What the answer refuses, as the class that decides; None when it may hold what was asked for."""
    status, code, words = answer.http_status, answer.code or 0, answer.words
    refuses = 1_000 <= code < 2_000
    if not creating and status in NO_ROUTE and not NOT_FOUND.search(answer.message):
        return NoSuchCall(words, code=answer.code, http_status=status)
    throttled = _throttled(status, code, creating=creating)
    if throttled is not None:
        return throttled(words, after=answer.after, code=answer.code, http_status=status, said=answer.message)
    if answer.document is None and status != 413:
        return _NotKling(f"the answer is not JSON (HTTP {status})", after=answer.after)
    if 5_000 <= code < 6_000:
        return Unavailable(words, after=answer.after)
    if not refuses and 200 <= status < 300:
        return None  # unknown codes included: gateways have their own word for success
    unknown_task = not creating and 400 <= status < 500 and NOT_FOUND.search(answer.message)
    if refuses or unknown_task or (code and 400 <= status < 500) or status in (403, 413):
        return _definite(answer, creating=creating)
    return _NotKling(words, after=answer.after)


def _throttled(status: int, code: int, *, creating: bool) -> type[ProviderThrottled] | None:
    """Which answer it is that says nothing about the request; None: none of them."""
    refuses = 1_000 <= code < 2_000
    if code in ACCOUNT_CODES or (status == 401 and not refuses):
        return AccountRefused
    if creating and code == MODEL_CODE:
        return ModelRefused
    if code == FULL_CODE:
        return ProviderFull
    return ProviderThrottled if code in THROTTLED_CODES or (status == 429 and not refuses) else None


def _definite(answer: _Answer, *, creating: bool) -> ProviderRejected:
    kind = ProviderRejected
    if creating and EXISTS.search(answer.message):
        kind = AlreadyExists
    elif not creating and NOT_FOUND.search(answer.message):
        kind = _NotFound
    return kind(answer.words, code=answer.code, http_status=answer.http_status, said=answer.message)


def _message_in(document: Mapping[str, Any]) -> str:
    """The words of an error, Kling's or a gateway's `{"error": {"message"}}`."""
    error = document.get("error")
    for words in (document.get("message"), error.get("message") if isinstance(error, dict) else error):
        if isinstance(words, str) and words:
            return words
    return ""


def _seconds(header: str | None, now: float) -> float | None:
    """A Retry-After header, in seconds or as a date (RFC 9110 10.2.3), between 0 and an hour."""
    moment = _http_date(header)
    wanted = moment - now if moment is not None else whole(header)
    return None if wanted is None else min(max(float(wanted), 0), 3_600)


def _http_date(header: str | None) -> float | None:
    try:
        parsed = email.utils.parsedate_tz(header or "")
        return None if parsed is None else float(email.utils.mktime_tz(parsed))
    except (ValueError, OverflowError):
        return None


def _believed(record: dict[str, Any]) -> Record:
    """A record that we asked for: an unreadable one may be readable next time."""
    try:
        return read_record(record)
    except ReportUnreadable as error:
        raise Unavailable(f"the answer holds no readable task: {error}") from None


def _listed(answer: _Answer) -> list[Record] | None:
    """The readable records of an answer whose `data` is a list, None when it is none."""
    items = (answer.document or {}).get("data")
    if not isinstance(items, list):
        return None
    records = []
    for item in items:
        record = find_record(item)
        with contextlib.suppress(ReportUnreadable):  # one odd task must not hide the rest of the page
            records += [read_record(record)] if record else []
    return records
