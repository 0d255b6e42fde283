"""Kling's image tasks, directly or through a gateway: create, read, list, and the bodies it sends us."""

from __future__ import annotations

import contextlib
import json
import math
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpcore
from pydantic import SecretStr
from standardwebhooks.webhooks import EmptyWebhookSecretError, Webhook

from receiver.providers import http_api
from receiver.providers.base import (
    Estimate,
    ProxyUnavailable,
    Record,
    RequestFacts,
    Unavailable,
    plain,
)
from receiver.providers.kling import prices
from receiver.providers.kling import report as kling_report
from receiver.providers.kling.answers import Answer, NotFound, NotKling, message_in, refusal
from receiver.providers.kling.report import (
    find_record,
    loads,
    read_ids,
    read_record,
    read_report,
    record_in,
    status_word,
    task_id_in,
    usable_id,
    whole,
)
from receiver.providers.kling.request import OmniImageRequest, facts_of, parse_request, redacted
from receiver.providers.webhook_signature import verify_standard_webhook
from storage import forks
from storage.circuit import Circuit
from storage.egress import EgressProxy
from storage.errors import (
    AccountRefused,
    FetchInterrupted,
    FetchRefused,
    FetchTooLarge,
    FetchUnusable,
    ProviderRejected,
    ProviderThrottled,
    ReportUnreadable,
    UserError,
)
from storage.fetch.addresses import host_name
from storage.http_date import http_date, retry_after
from storage.states import Report

CREATE_PATH = "/v1/images/omni-image"
BATCH_PATH = "/tasks"
MAX_BATCH_IDS = 20  # 21 are answered 400/1201 (observed)
MAX_ANSWER_BYTES = 4 * 1024 * 1024
MAX_MESSAGE_CHARS = 300
JWT_LIFETIME_SECONDS = 1_800
JWT_RENEW_SECONDS = 300  # before it expires, so that none expires on its way
JWT_CLOCK_CODES = frozenset({1003, 1004})


class OptionInvalid(UserError, ValueError):
    """A base URL, key or secret of an invalid form."""


def encode_in_pieces(fields: Mapping[str, Any]) -> list[bytes]:
    """Encode JSON one picture at a time. In one piece, 88 MB of pictures held the interpreter for 250 ms."""
    return [piece.encode() for piece in json.JSONEncoder(allow_nan=False).iterencode(fields)]


class Kling:
    """The provider `kling`, as `receiver.providers.base.Provider` describes it. Safe to share between threads.

    `timeout_seconds`: see `http_api.HttpApi`. `now`: Unix seconds.
    `circuit` counts a call as failed when the provider did not answer; a refusal is an answer.
    Raises `OptionInvalid` for a base URL, key or webhook secret of an invalid form; its message contains none of them.
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
        proxy: EgressProxy | None = None,
    ) -> None:
        self._base_url = _checked_base_url(base_url)
        self._api_key = _checked_key(api_key) if api_key else None
        self._access_key = access_key
        self._jwt = _Jwt(access_key, secret_key.get_secret_value(), now) if access_key and secret_key else None
        self._webhook_secrets = [_webhook(secret) for secret in webhook_secrets]
        self._timeout_seconds = timeout_seconds
        self._now = now
        self._circuit = circuit or Circuit()
        self._proxy = proxy
        # The host's clock minus the Date of the last answer; None before the first.
        self.clock_ahead_seconds: float | None = None
        self.begin_in_child()
        forks.renew_in_children(self)

    def begin_in_child(self) -> None:
        self._api = http_api.HttpApi(
            self._base_url, timeout_seconds=self._timeout_seconds, max_bytes=MAX_ANSWER_BYTES, proxy=self._proxy
        )

    def __repr__(self) -> str:
        return f"Kling(base_url={self._base_url!r})"

    def close(self) -> None:
        self._api.close()

    def create(self, request: Mapping[str, Any], *, external_task_id: str, callback_url: str | None) -> Record:
        fields = {**request, "external_task_id": external_task_id}
        if callback_url:
            fields["callback_url"] = callback_url
        answer = self._request("POST", CREATE_PATH, encode_in_pieces(fields))
        record = find_record(answer.document)
        if record is None or not usable_id(task_id_in(record)):
            raise Unavailable(f"the create answer names no task ({answer.words})")
        if not status_word(record):
            record = {**record, "task_status": "submitted"}  # some gateways answer with the id alone
        return _readable_record(record)

    def read(self, *, provider_task_id: str | None, external_task_id: str) -> Record | None:
        for task_id in dict.fromkeys((provider_task_id, external_task_id)):
            record = self._read_one(task_id) if task_id else None
            if record is not None:
                return record
        return None

    def _read_one(self, task_id: str) -> Record | None:
        try:
            answer = self._request("GET", f"{CREATE_PATH}/{_path_segment(task_id)}")
        except NotFound:
            return None
        record = find_record(answer.document)
        if record is None:
            raise Unavailable(f"the answer holds no task ({answer.words})")
        return _readable_record(record)

    def read_many(self, external_task_ids: Sequence[str]) -> dict[str, Record] | None:
        if len(external_task_ids) > MAX_BATCH_IDS:
            raise ValueError(f"at most {MAX_BATCH_IDS} ids")
        if self._api_key is None:  # a JWT is answered 401/1002 there (observed)
            return None
        asked = [task_id for task_id in external_task_ids if "," not in task_id]
        if not asked:
            return {}
        query = ",".join(quote(task_id, safe="") for task_id in asked)
        try:
            answer = self._request("GET", f"{BATCH_PATH}?external_task_ids={query}")
        except (ProviderRejected, AccountRefused, NotKling):
            return None
        listed = _listed(answer)
        if listed is None:
            return None
        named = {record.report.external_task_id: record for record in listed}
        return {task_id: named[task_id] for task_id in asked if task_id in named}

    def list_page(self, page: int, size: int) -> list[Record]:
        answer = self._request("GET", f"{CREATE_PATH}?pageNum={page:d}&pageSize={size:d}")
        listed = _listed(answer)
        if listed is None:
            raise Unavailable(f"the answer holds no list of tasks ({answer.words})")
        return listed

    def parse(self, body: bytes) -> Report:
        return read_report(record_in(body))

    def ids(self, body: bytes) -> tuple[str | None, str | None]:
        return read_ids(record_in(body))

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

    url_expiry = staticmethod(kling_report.url_expiry)

    def _request(self, method: str, path: str, content: Sequence[bytes] | None = None) -> Answer:
        """One request, repeated once with a new token if the provider refuses the token's times. Raises refusals."""
        token = self._token()
        with self._circuit.watching(Unavailable, ProviderRejected, ProviderThrottled):
            answer = self._exchange(method, path, content, token)
            if answer.code in JWT_CLOCK_CODES and self._jwt and not self._api_key:
                answer = self._exchange(method, path, content, self._jwt.token(fresh=True))
            if (error := refusal(answer, creating=method == "POST")) is not None:
                raise error
            return answer

    def _token(self) -> str:
        if self._api_key:
            return self._api_key
        if self._jwt:
            return self._jwt.token()
        raise AccountRefused("no provider credentials are configured; set RECEIVER_KLING_API_KEY")

    def _exchange(self, method: str, path: str, content: Sequence[bytes] | None, token: str) -> Answer:
        headers = {"Authorization": f"Bearer {token}"}
        if content is not None:
            headers["Content-Type"] = "application/json"
        try:
            answer = self._api.send(method, path, headers, content)
        except (httpcore.ConnectError, httpcore.ConnectTimeout, httpcore.PoolTimeout, httpcore.ProxyError) as error:
            reason = self._safe(str(error)) or type(error).__name__
            if self._proxy is not None and not _is_of_tls(error):
                raise ProxyUnavailable(f"{self._proxy.name} gave no connection ({reason})") from None
            raise Unavailable(f"no connection to the provider ({reason})", sent=False) from None
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError) as error:
            raise Unavailable(f"the connection broke ({type(error).__name__})") from None
        except FetchUnusable as error:
            raise Unavailable(f"the answer cannot be read: {error}") from None
        except (FetchInterrupted, FetchTooLarge) as error:
            raise Unavailable(str(error)) from None
        self._note_date(answer.headers.get("date"))
        return self._read_answer(answer)

    def _read_answer(self, answer: http_api.Answer) -> Answer:
        try:
            document = loads(answer.body)
        except (ValueError, RecursionError):
            document = None
        document = document if isinstance(document, dict) else None
        return Answer(
            http_status=answer.status,
            document=document,
            code=whole((document or {}).get("code")),
            message=self._safe(message_in(document or {})),
            after=retry_after(answer.headers.get("retry-after"), self._now()),
        )

    def _note_date(self, header: str | None) -> None:
        sent_at = http_date(header or "")
        if sent_at is not None:
            self.clock_ahead_seconds = self._now() - sent_at

    def _safe(self, text: str) -> str:
        """The provider's message without our keys and token, in case it repeats them."""
        for key in (self._api_key, self._access_key):
            text = text.replace(key, "…") if key else text
        return plain(re.sub(r"\beyJ[\w.-]{20,}", "…", text), MAX_MESSAGE_CHARS)


class _Jwt:
    """JWTs from access key and secret key, each used until 300 s before it expires."""

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
                import jwt  # imports cryptography: 0.1 s that an API key does not need

                self._token = jwt.encode(claims, self._secret_key, algorithm="HS256")
            return self._token


def _checked_base_url(base_url: str) -> str:
    parts = urlsplit(base_url)
    extras = parts.query or parts.fragment or parts.username or parts.password
    try:
        is_valid = parts.scheme in ("http", "https") and host_name(parts.hostname or "") and parts.port != 0
    except (FetchRefused, ValueError):
        is_valid = False
    if not is_valid or extras:
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
        raise OptionInvalid("a webhook secret must be whsec_ followed by Base64") from None


def _is_of_tls(error: BaseException | None) -> bool:
    """Whether the proxy did connect, and the host at the end of the tunnel failed."""
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    return error is not None


def _path_segment(task_id: str) -> str:
    """An id as one path segment. `.` and `..` are encoded too, because clients remove them."""
    return quote(task_id, safe="") if task_id.strip(".") else task_id.replace(".", "%2E")


def _readable_record(record: dict[str, Any]) -> Record:
    """A record that we asked for. An unreadable one may be readable at the next read."""
    try:
        return read_record(record)
    except ReportUnreadable as error:
        raise Unavailable(f"the answer holds no readable task: {error}") from None


def _listed(answer: Answer) -> list[Record] | None:
    """The readable records of an answer whose `data` is a list; None if it is not a list."""
    items = (answer.document or {}).get("data")
    if not isinstance(items, list):
        return None
    records = []
    for item in items:
        record = find_record(item)
        with contextlib.suppress(ReportUnreadable):  # one unreadable task does not hide the rest of the page
            records += [read_record(record)] if record else []
    return records
