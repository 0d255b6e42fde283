"""The Kling adapter against a scripted HTTP server on loopback, and against valid and hostile bodies.

No doubles of our own code: assertions are about requests at the server, return values and errors.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import hmac
import json
import socket
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from standardwebhooks.webhooks import Webhook

from receiver.gateway.answers import passed_on
from receiver.providers.base import AlreadyExists, BadSignature, RequestFacts, Unavailable
from receiver.providers.kling.client import MAX_ANSWER_BYTES, Kling, encode_in_pieces
from receiver.providers.webhook_signature import verify_standard_webhook
from receiver.sandbox.answers import ERRORS
from storage.errors import AccountRefused, ModelRefused, ProviderRejected, ProviderThrottled, ReportUnreadable
from storage.states import MAX_INDEX, Output, Report, TaskState
from tests.harness import PAYLOADS

KEY = "sk-canary-0123456789"
SECRET_KEY = "canary-secret-key-of-32-characters"
OK_TASK = {"code": 0, "data": {"task_id": "9", "task_status": "processing"}}
REQUEST = {"model_name": "kling-v3-omni", "prompt": "a cat", "element_list": [{"element_id": 835266081714884677}]}


def payload(name: str) -> Any:
    return json.loads((PAYLOADS / f"{name}.json").read_bytes())


class Scripted(ThreadingHTTPServer):
    """Answers in the given order, repeats the last one, and records the requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answering)
        self.pause_seconds = 0.0  # before each of a body's first ten megabytes is read
        self.answers: list[tuple[int, Any, dict[str, str]]] = []
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def answer(self, body: Any, status: int = 200, **headers: str) -> None:
        self.answers.append((status, body, headers))


class _Answering(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Scripted

    def do_GET(self) -> Any:
        length = int(self.headers.get("Content-Length", 0))
        parts = []
        for start in range(0, length, 2**20):
            time.sleep(self.server.pause_seconds if len(parts) < 10 else 0)
            parts.append(self.rfile.read(min(length - start, 2**20)))
        sent = b"".join(parts)
        self.server.asked.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, sent))
        answers = self.server.answers
        status, body, headers = answers.pop(0) if len(answers) > 1 else answers[0]
        if callable(body):
            return body(self)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

        return None

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


def hang_up(handler: _Answering) -> None:
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def dripping(first: bytes, again: bytes) -> Callable[[_Answering], None]:
    """Sends `first`, then `again` every 20 ms, at most for 10 s."""

    def drip(handler: _Answering) -> None:
        with contextlib.suppress(OSError):
            handler.wfile.write(b"HTTP/1.1 " + first)
            for _ in range(500):
                handler.wfile.write(again)
                time.sleep(0.02)
        handler.close_connection = True

    return drip


CHUNKED = b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
DRIPS = {
    "status": dripping(b"200 ", b"O"),
    "head": dripping(b"200 OK\r\n", b"X: y\r\n"),
    "early hints": dripping(b"103 E\r\n\r\n", b"HTTP/1.1 103 E\r\n\r\n"),
    "body": dripping(b"200 OK\r\nContent-Length: 500\r\n\r\n", b" "),
    "chunk's head": dripping(CHUNKED + b"1;", b"x"),
    "chunks": dripping(CHUNKED, b"1\r\n \r\n"),
}


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as scripted:
        thread = threading.Thread(target=scripted.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield scripted
        scripted.shutdown()
        thread.join()


@pytest.fixture
def make(server: Scripted) -> Iterator[Callable[..., Kling]]:
    made: list[Kling] = []

    def build(**options: Any) -> Kling:
        options = {"base_url": server.url + "/kling", "api_key": SecretStr(KEY), "timeout_seconds": 5} | options
        made.append(Kling(**options))
        return made[-1]

    yield build
    for kling in made:
        kling.close()


@pytest.fixture
def kling(make: Callable[..., Kling]) -> Kling:
    return make()


def create(kling: Kling) -> Any:
    return kling.create(REQUEST, external_task_id="mine", callback_url="https://us.example/callbacks/kling/TOKEN")


# Create


def test_create_sends_the_request_and_what_we_add(server: Scripted, kling: Kling) -> None:
    server.answer(payload("create-answer"))
    create(kling)
    method, path, headers, sent = server.asked[0]
    assert (method, path) == ("POST", "/kling/v1/images/omni-image")
    assert headers["authorization"] == f"Bearer {KEY}"
    assert headers["content-type"] == "application/json"
    added = {"external_task_id": "mine", "callback_url": "https://us.example/callbacks/kling/TOKEN"}
    assert json.loads(sent) == REQUEST | added
    assert b'"element_id": 835266081714884677' in sent


def test_pictures_are_encoded_and_sent_in_pieces(server: Scripted, kling: Kling) -> None:
    """Encoded in one piece they would hold the interpreter, and every other request with it."""
    pictures = [{"image": "A" * 3_000_000} for _ in range(3)]
    server.answer(payload("create-answer"))
    kling.create(REQUEST | {"image_list": pictures}, external_task_id="mine", callback_url=None)
    _, _, headers, sent = server.asked[0]
    fields = REQUEST | {"image_list": pictures, "external_task_id": "mine"}
    assert sent == json.dumps(fields).encode() == b"".join(encode_in_pieces(fields))
    assert headers["content-length"] == str(len(sent)) and "transfer-encoding" not in headers
    assert max(map(len, encode_in_pieces(fields))) < 3_000_100


def test_create_without_a_public_url_sends_no_callback_url(server: Scripted, kling: Kling) -> None:
    server.answer(payload("create-answer"))
    kling.create(REQUEST, external_task_id="mine", callback_url=None)
    assert "callback_url" not in json.loads(server.asked[0][3])


def test_create_returns_the_task_and_a_body_that_parses_to_the_same(server: Scripted, kling: Kling) -> None:
    server.answer(payload("create-answer"))
    created = create(kling)
    assert created.report.provider_task_id == "901234567890123456"
    assert created.report.status is TaskState.SUBMITTED
    assert created.report.external_task_id == "7b0e9c52-2f5b-4c5e-9d6a-0c9a1d1f4e77"
    assert kling.parse(created.body) == created.report


@pytest.mark.parametrize("answer", [{"task_id": "9"}, {"code": 200, "data": {"task_id": 9, "status": ""}}])
def test_a_gateways_bare_create_answer_is_a_submitted_task(server: Scripted, kling: Kling, answer: Any) -> None:
    server.answer(answer)
    created = create(kling)
    assert (created.report.provider_task_id, created.report.status) == ("9", TaskState.SUBMITTED)


@pytest.mark.parametrize("code", [1200, 1201, 1202, 1203, 1300, 1301])
@pytest.mark.parametrize("status", [200, 429])
def test_a_final_refusal_is_recognized_by_its_code(server: Scripted, kling: Kling, code: int, status: int) -> None:
    server.answer({"code": code, "message": "no"}, status)
    with pytest.raises(ProviderRejected) as caught:
        create(kling)
    assert (caught.value.code, caught.value.http_status) == (code, 400 if status == 200 else status)
    assert not isinstance(caught.value, AlreadyExists)


@pytest.mark.parametrize("code", [1000, 1001, 1002, 1003, 1100, 1102, 1103, 1304])
@pytest.mark.parametrize("status", [200, 429])
def test_a_refusal_of_the_account_is_recognized_by_its_code(
    server: Scripted, kling: Kling, code: int, status: int
) -> None:
    server.answer({"code": code, "message": "no"}, status)
    with pytest.raises(AccountRefused) as caught:
        create(kling)
    expected = ERRORS[code][0] if status == 200 else status
    assert (caught.value.code, caught.value.http_status, caught.value.said) == (code, expected, "no")
    assert isinstance(caught.value, ModelRefused) == (code == 1103)


def test_a_used_external_id_is_its_own_refusal(server: Scripted, kling: Kling) -> None:
    server.answer(payload("error-duplicate-external-id"), 400)
    with pytest.raises(AlreadyExists):
        create(kling)


@pytest.mark.parametrize(
    ("header", "after"),
    [({}, None), ({"Retry_After": "7"}, 7), ({"Retry_After": "Thu, 01 Jan 1970 00:01:40 GMT"}, 40)],
)
def test_answer_of_a_full_account_says_when_to_retry(
    server: Scripted, make: Callable[..., Kling], header: dict[str, str], after: float | None
) -> None:
    server.answer(payload("error-concurrency"), 429, **header)
    with pytest.raises(ProviderThrottled) as caught:
        create(make(now=lambda: 60.0))
    assert caught.value.after == after


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, {"code": 5000, "message": "internal"}),
        (503, {"code": 5001}),
        (504, {"code": 5002}),
        (502, b"<html>bad gateway</html>"),
        (200, b"<html>welcome</html>"),
        (200, b""),
        (200, b'{"code": 0, "data": {"task_i'),
        (200, b"[" * 100_000),
        (200, {"code": 0, "data": None}),
        (200, {"code": 0, "data": {"task_id": None, "task_status": "submitted"}}),
        (200, b" " * (MAX_ANSWER_BYTES + 1)),
        (404, {"error": "no such route"}),
        (408, {"code": 408, "message": "the upstream did not answer in time"}),
        (499, {"code": 499, "message": "closed"}),
        (200, hang_up),
    ],
)
def test_unclear_answer_leaves_the_create_open(server: Scripted, kling: Kling, status: int, body: Any) -> None:
    server.answer(body, status)
    with pytest.raises(Unavailable) as caught:
        create(kling)
    assert caught.value.sent is True


@pytest.mark.parametrize(("status", "kind"), [(401, AccountRefused), (403, ProviderRejected)])
def test_a_gateways_own_refusal_of_the_key_is_definite(
    server: Scripted, kling: Kling, status: int, kind: type[Exception]
) -> None:
    server.answer({"error": {"message": f"invalid key {KEY}"}}, status)
    with pytest.raises(kind, match=f"HTTP {status}: invalid key …"):
        create(kling)


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (402, {"detail": "INSUFFICIENT_CREDITS"}, "INSUFFICIENT_CREDITS"),
        (402, {"code": 402, "msg": "Insufficient credits", "data": None}, "Insufficient credits"),
        (403, {"code": "quota_not_enough", "message": "user quota is not enough"}, "user quota is not enough"),
        (
            403,
            {"error": {"message": "用户额度不足, 剩余额度: $0", "code": "insufficient_user_quota"}},
            "用户额度不足, 剩余额度: $0",
        ),
    ],
)
def test_an_empty_balance_at_a_gateway_is_a_refusal_of_the_account(
    server: Scripted, kling: Kling, status: int, body: Any, said: str
) -> None:
    """It failed every task of a batch (403), or each was sent again and again by itself (402)."""
    server.answer(body, status)
    with pytest.raises(AccountRefused) as caught:
        create(kling)
    assert (caught.value.http_status, caught.value.said) == (status, said)


@pytest.mark.parametrize("words", ["risk control: a credit card", "blocked: Credit Cards", "blocked: white balance"])
def test_a_refused_picture_of_a_credit_card_pauses_no_account(server: Scripted, kling: Kling, words: str) -> None:
    """Its words were taken for those of an empty balance, and all other creates waited."""
    server.answer({"error": {"message": words}}, 403)
    with pytest.raises(ProviderRejected, match=words):
        create(kling)


@pytest.mark.parametrize("detail", ["too long", [{"loc": ["body", "prompt"], "msg": "too long"}]])
def test_a_gateways_words_are_shown_in_whatever_field_they_are(server: Scripted, kling: Kling, detail: Any) -> None:
    server.answer({"detail": detail}, 403)
    with pytest.raises(ProviderRejected, match="HTTP 403: too long"):
        create(kling)


GATEWAY_WORDS = {"code": "fail_to_fetch_task", "message": "risk control", "data": None}


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, GATEWAY_WORDS),
        (400, {"error": {"message": "risk control", "type": "invalid_request_error", "code": "invalid_request"}}),
        (422, {"detail": [{"loc": ["body", "prompt"], "msg": "risk control"}]}),
        (200, {"code": 400, "msg": "risk control", "data": None}),
        (200, {"code": 422, "message": "risk control"}),
    ],
)
def test_a_gateways_own_refusal_of_a_request_is_definite(
    server: Scripted, kling: Kling, status: int, body: Any
) -> None:
    """Such a create was looked up and sent again for ever."""
    server.answer(body, status)
    with pytest.raises(ProviderRejected, match="risk control") as caught:
        create(kling)
    assert caught.value.http_status == (status if status != 200 else body["code"])


@pytest.mark.parametrize(
    ("code", "status"),
    [(402, 402), (429, 429), (422, 422), (1002, 401), (1102, 429), (1103, 403), (1303, 429), (1301, 400)],
)
def test_a_refusal_under_200_is_passed_on_with_the_status_of_its_code(
    server: Scripted, kling: Kling, code: int, status: int
) -> None:
    """A client of the gateway got it with status 200, and a pause for a wrong key was not taken for one."""
    server.answer({"code": code, "message": "no"})
    with pytest.raises((ProviderRejected, ProviderThrottled)) as caught:
        create(kling)
    refused = passed_on(caught.value)
    assert (refused.http_status, refused.code) == (status, code)


def test_a_used_external_id_is_recognized_in_a_gateways_words(server: Scripted, kling: Kling) -> None:
    upstream = json.dumps(payload("error-duplicate-external-id"))
    server.answer({**GATEWAY_WORDS, "message": upstream}, 400)
    with pytest.raises(AlreadyExists):
        create(kling)


@pytest.mark.parametrize(
    ("code", "kind"), [(401, AccountRefused), (402, AccountRefused), (429, ProviderThrottled), (500, Unavailable)]
)
def test_the_code_is_the_status_where_a_gateway_answers_everything_200(
    server: Scripted, kling: Kling, code: int, kind: type[Exception]
) -> None:
    server.answer({"code": code, "msg": "no", "data": None})
    with pytest.raises(kind, match=f"HTTP 200, code {code}: no"):
        create(kling)


def test_an_unknown_task_may_be_answered_200(server: Scripted, kling: Kling) -> None:
    server.answer({"code": 404, "msg": "task not exist", "data": None})
    assert kling.read(provider_task_id=None, external_task_id="mine") is None


def test_a_gateways_own_limit_is_a_limit(server: Scripted, kling: Kling) -> None:
    server.answer(b"slow down", 429, Retry_After="3")
    with pytest.raises(ProviderThrottled) as caught:
        create(kling)
    assert caught.value.after == 3


def test_a_refused_connection_was_certainly_not_sent(make: Callable[..., Kling]) -> None:
    with socket.socket() as unused:
        # bound and not listening: connections are refused, and no other program gets the port
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(Unavailable) as caught:
            create(make(base_url=f"http://127.0.0.1:{unused.getsockname()[1]}"))
    assert caught.value.sent is False


def test_silent_provider_leaves_the_create_open(make: Callable[..., Kling]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(Unavailable) as caught:
            create(make(base_url=f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_seconds=0.2))
    assert caught.value.sent is True


@pytest.mark.parametrize("part", DRIPS)
def test_an_answer_that_drips_is_cut_off(server: Scripted, make: Callable[..., Kling], part: str) -> None:
    """Each byte restarts a timeout of single reads, and would hold a thread for as long as bytes come."""
    server.answer(DRIPS[part])
    started = time.monotonic()
    with pytest.raises(Unavailable, match=r"no complete answer within 0\.5 s") as caught:
        create(make(timeout_seconds=0.5))
    assert time.monotonic() - started < 4
    assert caught.value.sent is True


def test_an_answer_of_very_many_pieces_is_refused(server: Scripted, make: Callable[..., Kling]) -> None:
    """Its parser took a processor for the 20 s of an answer."""

    def send(handler: _Answering) -> None:
        handler.close_connection = True
        with contextlib.suppress(OSError):
            handler.wfile.write(b"HTTP/1.1 " + CHUNKED)
            while True:
                handler.wfile.write(b"1\r\n \r\n" * 10_000)

    server.answer(send)
    with pytest.raises(Unavailable, match="too many pieces"):
        create(make(timeout_seconds=5))


def test_an_answer_whose_head_is_too_long_is_refused(server: Scripted, kling: Kling) -> None:
    server.answer(lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 40_000))
    with pytest.raises(Unavailable, match="RemoteProtocolError"):
        create(kling)


def test_a_large_request_may_take_longer_than_an_answer(server: Scripted, make: Callable[..., Kling]) -> None:
    server.pause_seconds = 0.35  # the last megabytes wait in the system's buffers, so a pause there delays the answer
    server.answer(OK_TASK)
    pictures = [{"image": "A" * 15_000_000} for _ in range(2)]
    kling, started = make(timeout_seconds=3), time.monotonic()
    assert kling.create(REQUEST | {"image_list": pictures}, external_task_id="mine", callback_url=None)
    assert time.monotonic() - started > 3


@pytest.mark.parametrize("framing", ["Content-Length: 75", "Transfer-Encoding: chunked"])
def test_a_connection_is_kept_after_a_complete_answer(server: Scripted, kling: Kling, framing: str) -> None:
    places = []

    def answer(handler: _Answering) -> None:
        places.append(handler.client_address)
        body = json.dumps(OK_TASK).ljust(75).encode()
        coded = body if "Length" in framing else b"4b\r\n" + body + b"\r\n0\r\n\r\n"
        handler.wfile.write(f"HTTP/1.1 200 OK\r\n{framing}\r\n\r\n".encode() + coded)

    server.answer(answer)
    for _ in range(2):
        kling.read(provider_task_id="9", external_task_id="x")
    assert places[0] == places[1]


@pytest.mark.parametrize("framing", ["Content-Length: 75", "Transfer-Encoding: chunked"])
def test_an_answer_behind_another_is_not_taken_for_that_of_the_next_request(
    server: Scripted, kling: Kling, framing: str
) -> None:
    """A gateway that answers twice would give the next task the id of this one."""

    def answer_twice(handler: _Answering) -> None:
        body = json.dumps(OK_TASK).ljust(75).encode()
        coded = body if "Length" in framing else b"4b\r\n" + body + b"\r\n0\r\n\r\n"
        handler.wfile.write((f"HTTP/1.1 200 OK\r\n{framing}\r\n\r\n".encode() + coded) * 2)

    server.answer(answer_twice)
    server.answer({"code": 0, "data": {"task_id": "10", "task_status": "processing"}})
    assert create(kling).report.provider_task_id == "9"
    with contextlib.suppress(Unavailable):
        assert create(kling).report.provider_task_id == "10"
    assert create(kling).report.provider_task_id == "10"


def zeros(megabytes: int) -> bytes:
    """So many MiB of zeros as gzip, made a MiB at a time."""
    coder = zlib.compressobj(9, wbits=31)
    return b"".join([coder.compress(bytes(2**20)) for _ in range(megabytes)] + [coder.flush()])


@pytest.mark.parametrize(
    ("coding", "body"), [("gzip, gzip", gzip.compress(zeros(64))), ("x-gzip", zeros(64)), ("deflate", b"x")]
)
def test_a_coded_answer_takes_no_more_memory_than_its_bound(
    server: Scripted, kling: Kling, coding: str, body: bytes
) -> None:
    """Accept-Encoding is `identity`. 4 kB of nested gzip hold gigabytes."""
    server.answer(body, Content_Encoding=coding)
    tracemalloc.start()
    try:
        with pytest.raises(Unavailable, match=r"Content-Encoding|larger than") as caught:
            create(kling)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.sent is True
    assert peak_bytes < 4 * MAX_ANSWER_BYTES


@pytest.mark.parametrize("coding", ["gzip", "X-Gzip"])
def test_one_layer_of_gzip_is_decoded(server: Scripted, kling: Kling, coding: str) -> None:
    server.answer(gzip.compress(json.dumps(OK_TASK).encode()), Content_Encoding=coding)
    assert create(kling).report.provider_task_id == "9"


@pytest.mark.parametrize("coding", ["identity", "UTF-8", "aws-chunked", ""])
def test_a_name_that_is_no_coding_changes_nothing(server: Scripted, kling: Kling, coding: str) -> None:
    server.answer(OK_TASK, Content_Encoding=coding)
    assert create(kling).report.provider_task_id == "9"


def test_a_failed_handshake_was_certainly_not_sent(server: Scripted, make: Callable[..., Kling]) -> None:
    with pytest.raises(Unavailable) as caught:
        create(make(base_url=server.url.replace("http:", "https:")))
    assert caught.value.sent is False


@pytest.mark.parametrize("location", ["/elsewhere", "http://[::bad/", "mailto:x", "http://xn--\xff/"])
def test_a_redirect_is_not_followed(server: Scripted, kling: Kling, location: str) -> None:
    server.answer(b"", 307, Location=location)
    with pytest.raises(Unavailable, match="HTTP 307, a redirect: RECEIVER_KLING_BASE_URL must be"):
        create(kling)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "link", ["see //h/x?Signature=S3CR3T", "h.example/x?Signature=S3CR3T", "https:/h/x?Signature=S3CR3T",
             "https:\\\\h/x?Signature=S3CR3T", "https%3A%2F%2Fh%2Fx%3FSignature%3DS3CR3T", "X-Amz-Signature=S3CR3T",
             "/x.png?Signature=S3CR3T"],
)  # fmt: skip
def test_a_message_holds_no_signature_however_its_link_is_written(kling: Kling, link: str) -> None:
    report = kling.parse(json.dumps({"task_id": "1", "task_status": "failed", "task_status_msg": link}).encode())
    assert report.message and "S3CR3T" not in report.message


def test_errors_hold_no_key_no_token_and_no_query(server: Scripted, kling: Kling) -> None:
    echo = f"{KEY} https://us.example/callbacks/kling/TOKEN and https://u:p@cdn.example/a.png?Signature=S " + "x" * 999
    server.answer({"code": 1200, "message": echo}, 400)
    with pytest.raises(ProviderRejected) as caught:
        create(kling)
    text = str(caught.value)
    assert "cdn.example" in text
    assert len(text) < 350
    assert not any(secret in text + repr(kling) for secret in (KEY, "TOKEN", "Signature", "u:p"))


# Read


def test_read_finds_a_task_by_the_providers_id(server: Scripted, kling: Kling) -> None:
    server.answer({"code": 0, "request_id": "r", "data": payload("callback-single")})
    record = kling.read(provider_task_id="901234567890123456", external_task_id="mine")
    assert record is not None
    assert record.report == kling.parse(record.body)
    assert json.loads(record.body) == payload("callback-single")
    assert [path for _, path, _, _ in server.asked] == ["/kling/v1/images/omni-image/901234567890123456"]


def test_the_same_record_in_another_envelope_is_the_same_body(server: Scripted, kling: Kling) -> None:
    record = payload("callback-single")
    server.answer({"code": 0, "request_id": "r1", "data": record})
    server.answer({"data": dict(reversed(record.items())), "request_id": "r2", "code": 0})
    first, second = (kling.read(provider_task_id=None, external_task_id="mine") for _ in range(2))
    assert first == second


def test_read_tries_the_external_id_when_the_other_is_unknown(server: Scripted, kling: Kling) -> None:
    server.answer(payload("error-task-not-found"), 400)
    server.answer(OK_TASK)
    assert kling.read(provider_task_id="gateway-7", external_task_id="mine") is not None
    assert [path.rpartition("/")[2] for _, path, _, _ in server.asked] == ["gateway-7", "mine"]


@pytest.mark.parametrize("answer", [payload("error-task-not-found"), {"code": "x", "message": "task_not_exist"}])
def test_an_unknown_task_is_none(server: Scripted, kling: Kling, answer: Any) -> None:
    server.answer(answer, 400)
    assert kling.read(provider_task_id=None, external_task_id="mine") is None


@pytest.mark.parametrize("data", [None, {}, [], {"task_id": "9"}, {"task_id": "9", "task_status": 5}])
def test_an_answer_without_a_task_is_not_taken_for_unknown(server: Scripted, kling: Kling, data: Any) -> None:
    server.answer({"code": 0, "data": data})
    with pytest.raises(Unavailable):
        kling.read(provider_task_id=None, external_task_id="mine")


def test_another_bad_parameter_is_not_taken_for_an_unknown_task(server: Scripted, kling: Kling) -> None:
    server.answer({"code": 1201, "message": "bad parameter"}, 400)
    with pytest.raises(ProviderRejected):
        kling.read(provider_task_id=None, external_task_id="mine")


@pytest.mark.parametrize(
    ("task_id", "segment"), [("a/../b?c#d", "a%2F..%2Fb%3Fc%23d"), ("..", "%2E%2E"), ("é", "%C3%A9")]
)
def test_an_id_stays_one_path_segment(server: Scripted, kling: Kling, task_id: str, segment: str) -> None:
    server.answer(OK_TASK)
    kling.read(provider_task_id=None, external_task_id=task_id)
    assert server.asked[0][1] == f"/kling/v1/images/omni-image/{segment}"


def test_many_tasks_are_read_in_one_call_by_our_ids(server: Scripted, kling: Kling) -> None:
    server.answer({"code": 0, "data": [payload("callback-new-shape"), {"odd": 1}, {"id": "7", "status": "failed"}]})
    found = kling.read_many(["2f8b4e0e-3d55-4c1d-a0f0-6a1b9f0a7c33", "a&b", "a,b"])
    assert found is not None
    assert list(found) == ["2f8b4e0e-3d55-4c1d-a0f0-6a1b9f0a7c33"]
    assert found["2f8b4e0e-3d55-4c1d-a0f0-6a1b9f0a7c33"].report.status is TaskState.SUCCEEDED
    assert server.asked[0][1] == "/kling/tasks?external_task_ids=2f8b4e0e-3d55-4c1d-a0f0-6a1b9f0a7c33,a%26b"


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, {"code": 1002}),
        (404, {"code": 1202}),
        (404, b"nothing here"),
        (502, b"<html>"),
        (200, {"code": 0, "data": {}}),
    ],
)
def test_missing_batch_call_returns_none(server: Scripted, kling: Kling, status: int, body: Any) -> None:
    server.answer(body, status)
    assert kling.read_many(["1"]) is None


def test_a_batch_is_at_most_twenty(kling: Kling) -> None:
    with pytest.raises(ValueError, match="20"):
        kling.read_many(["1"] * 21)
    assert kling.read_many([]) == {}


def test_entries_of_a_page_that_are_not_tasks_are_skipped(server: Scripted, kling: Kling) -> None:
    server.answer({"code": 0, "data": [payload("callback-failed"), {"id": 1}, None, payload("callback-processing")]})
    states = [record.report.status for record in kling.list_page(2, 30)]
    assert states == [TaskState.FAILED, TaskState.PROCESSING]
    assert server.asked[0][1] == "/kling/v1/images/omni-image?pageNum=2&pageSize=30"


# Credentials


@pytest.fixture
def clock() -> list[float]:
    return [1_790_000_000.0]


@pytest.fixture
def signing(make: Callable[..., Kling], clock: list[float]) -> Kling:
    return make(api_key=None, access_key="ak", secret_key=SecretStr(SECRET_KEY), now=lambda: clock[0])


def tokens(server: Scripted) -> list[str]:
    return [headers["authorization"].removeprefix("Bearer ") for _, _, headers, _ in server.asked]


def test_jwt_has_issuer_and_expiry(server: Scripted, signing: Kling) -> None:
    server.answer(OK_TASK)
    create(signing)
    claims = jwt.decode(
        tokens(server)[0], SECRET_KEY, algorithms=["HS256"], options={"verify_exp": False, "verify_nbf": False}
    )
    assert claims == {"iss": "ak", "exp": 1_790_001_800, "nbf": 1_789_999_995}


def test_a_token_is_kept_until_five_minutes_before_its_end(
    server: Scripted, signing: Kling, clock: list[float]
) -> None:
    server.answer(OK_TASK)
    for step_seconds in (0, 1_499, 2):
        clock[0] += step_seconds
        create(signing)
    first, second, third = tokens(server)
    assert first == second != third


def test_clock_set_back_makes_a_new_jwt(server: Scripted, signing: Kling, clock: list[float]) -> None:
    server.answer(OK_TASK)
    create(signing)
    clock[0] -= 10
    create(signing)
    assert len(set(tokens(server))) == 2


@pytest.mark.parametrize("code", [1003, 1004])
def test_expired_jwt_is_replaced_once(server: Scripted, signing: Kling, code: int) -> None:
    server.answer({"code": code}, 401)
    server.answer(OK_TASK)
    assert create(signing).report.provider_task_id == "9"
    assert len(server.asked) == 2


def test_second_refusal_of_a_jwt_for_its_time_is_final(server: Scripted, signing: Kling) -> None:
    server.answer({"code": 1004}, 401)
    with pytest.raises(AccountRefused):
        create(signing)
    assert len(server.asked) == 2


def test_a_token_does_not_open_the_batch_call(server: Scripted, signing: Kling) -> None:
    assert signing.read_many(["1"]) is None
    assert server.asked == []


def test_without_credentials_nothing_is_sent(server: Scripted, make: Callable[..., Kling]) -> None:
    with pytest.raises(AccountRefused, match="credentials"):
        create(make(api_key=None))
    assert server.asked == []


@pytest.mark.parametrize(
    "options",
    [
        {"base_url": "ftp://x"},
        {"base_url": "https://user:canary@host"},
        {"base_url": "https://host/?k=canary"},
        {"api_key": SecretStr("canary\n")},
        {"webhook_secrets": [SecretStr("whsec_")]},
        {"webhook_secrets": [SecretStr("whsec_canary*ü")]},
    ],
)
def test_invalid_settings_are_refused_without_showing_them(make: Callable[..., Kling], options: Any) -> None:
    with pytest.raises(ValueError, match=r"base_url|api_key|webhook") as caught:
        make(**options)
    assert "canary" not in str(caught.value)


def test_the_clock_is_compared_with_the_providers(server: Scripted, make: Callable[..., Kling]) -> None:
    server.answer(OK_TASK)
    kling = make(now=lambda: 0.0)
    create(kling)
    assert kling.clock_ahead_seconds is not None
    assert kling.clock_ahead_seconds < -1_000_000_000


def test_threads_share_one_adapter(server: Scripted, signing: Kling) -> None:
    server.answer(OK_TASK)
    with ThreadPoolExecutor(8) as threads:
        created = list(threads.map(lambda _: create(signing), range(24)))
    assert {one.report.provider_task_id for one in created} == {"9"}
    assert len(set(tokens(server))) == 1


# Parse

READER = Kling(base_url="http://127.0.0.1:9")


@pytest.fixture(scope="module", autouse=True)
def _close_reader() -> Iterator[None]:
    yield
    READER.close()


def parse(document: Any) -> Report:
    return READER.parse(json.dumps(document).encode())


def old(**result: Any) -> Report:
    return parse({"task_id": "1", "task_status": "succeed", "task_result": result})


def new(*outputs: Any) -> Report:
    return parse({"id": "1", "status": "succeeded", "outputs": list(outputs)})


@pytest.mark.parametrize(
    ("name", "provider_id", "external", "status", "series", "units", "urls"),
    [
        ("callback-failed", "901234567890123458", "e41f5b8d", TaskState.FAILED, None, None, 0),
        ("callback-new-shape", "901234567890123459", "2f8b4e0e", TaskState.SUCCEEDED, None, "8", 1),
        ("callback-no-task-info", "901234567890123460", "", TaskState.SUCCEEDED, None, None, 1),
        ("callback-processing", "901234567890123456", "7b0e9c52", TaskState.PROCESSING, None, None, 0),
        ("callback-series-watermarked", "901234567890123457", "c2d1e0aa", TaskState.SUCCEEDED, True, "24", 6),
        ("callback-single", "901234567890123456", "7b0e9c52", TaskState.SUCCEEDED, None, "16", 2),
        ("callback-wrapped", "901234567890123461", "0a7e5bb0", TaskState.SUCCEEDED, None, None, 1),
        ("console-test-callback", "1234567890", "", TaskState.SUBMITTED, None, None, 0),
        ("create-answer", "901234567890123456", "7b0e9c52", TaskState.SUBMITTED, None, None, 0),
    ],
)
def test_recorded_bodies_are_parsed(
    name: str, provider_id: str, external: str, status: TaskState, series: bool | None, units: str | None, urls: int
) -> None:
    body = (PAYLOADS / f"{name}.json").read_bytes()
    report = READER.parse(body)
    assert (report.provider_task_id, report.status, report.series, report.units) == (provider_id, status, series, units)
    assert (report.external_task_id or "").startswith(external)
    assert bool(report.external_task_id) == bool(external)
    found = [url for output in report.outputs for url in (output.url, output.watermark_url) if url]
    assert len(found) == urls
    assert all(url.encode() in body for url in found)
    assert report.created_ms is not None
    assert report.updated_ms is not None


@pytest.mark.parametrize("name", ["error-concurrency", "error-duplicate-external-id", "error-task-not-found"])
def test_an_error_answer_is_not_taken_for_a_task(name: str) -> None:
    with pytest.raises(ReportUnreadable, match="no task"):
        READER.parse((PAYLOADS / f"{name}.json").read_bytes())


def test_series_with_watermarks_is_parsed() -> None:
    outputs = READER.parse((PAYLOADS / "callback-series-watermarked.json").read_bytes()).outputs
    cdn, tail = "https://p4-fdl.klingai.com/ksc2", "&x-kcdn-pid=112757&pkey="
    assert outputs[2] == Output("image", f"{cdn}/s2.png?cacheKey=C2{tail}P2", 2, f"{cdn}/w2.png?cacheKey=W2{tail}Q2")


def test_reason_of_a_failed_task_is_parsed() -> None:
    report = READER.parse((PAYLOADS / "callback-failed.json").read_bytes())
    assert report.message == "Failure to pass the risk control system"


@pytest.mark.parametrize("word", ["succeed", "succeeded", "SUCCEEDED"])
@pytest.mark.parametrize("shape", [("task_id", "task_status"), ("id", "status"), ("task_id", "status")])
def test_both_spellings_are_parsed_in_both_shapes(word: str, shape: tuple[str, str]) -> None:
    assert parse({shape[0]: "1", shape[1]: word}).status is TaskState.SUCCEEDED


def test_an_unknown_word_is_kept() -> None:
    report = parse({"task_id": "1", "task_status": "paused\0"})
    assert (report.status, report.raw_status) == (None, "paused")


@pytest.mark.parametrize("wrap", [lambda r: r, lambda r: {"data": r}, lambda r: {"code": 0, "data": {"data": [r]}}])
def test_envelope_makes_no_difference(wrap: Callable[[Any], Any]) -> None:
    assert parse(wrap(payload("callback-single"))) == parse(payload("callback-single"))


def test_series_marker_of_a_body_is_parsed() -> None:
    assert old(series_images=[{"url": "u"}]).series is True
    assert old(result_type="series", images=[{"url": "u"}]).series is True
    assert old(result_type="single", images=[{"url": "u"}]).series is False
    assert old(images=[{"url": "u"}], series_images=[{"url": "v"}]).series is None
    assert new({"type": "image", "url": "u"}).series is None


def test_images_come_before_series_images() -> None:
    report = old(series_images=[{"index": 0, "url": "s"}], images=[{"index": 0, "url": "i"}])
    assert report.outputs == (Output("image", "i", 0), Output("image", "s", 1))  # the indexes run on


@pytest.mark.parametrize(
    ("reported", "indexes"),
    [
        ((0, 1, 2), (0, 1, 2)),
        ((2, 0, 1), (2, 0, 1)),
        ((4, 7), (4, 7)),
        ((3, 3), (0, 1)),
        ((5, None), (0, 1)),
        ((-1, 5), (0, 1)),
        ((5, MAX_INDEX + 1), (0, 1)),
        ((MAX_INDEX,), (MAX_INDEX,)),
        ((None, None), (0, 1)),
        ((), ()),
    ],
)
def test_indexes_count_when_present_and_distinct(
    reported: tuple[int | None, ...], indexes: tuple[int | None, ...]
) -> None:
    images = [{"url": "u", "index": index} for index in reported]
    assert tuple(output.index for output in old(images=images).outputs) == indexes
    assert tuple(output.index for output in new(*images).outputs) == indexes


def test_a_picture_without_url_renames_no_other() -> None:
    expected = (Output("image", "a", 0), Output("image", "c", 2))
    assert old(images=[{"url": "a"}, {"url": None}, {"url": "c"}]).outputs == expected
    assert new({"type": "image", "url": "a"}, None, {"url": "c"}).outputs == expected
    assert old(images=[{"url": "a", "index": 5}, 7]).outputs == (Output("image", "a", 5),)


def test_videos_and_audios_are_parsed() -> None:
    report = old(
        videos=[{"id": "v", "url": "v", "duration": "5", "watermark_url": "w"}],
        audios=[{"id": "a", "url_wav": "a.wav"}, {"url_mp3": "b.mp3", "url_wav": "b.wav"}],
    )
    sounds = (Output("audio", "a.wav", 1), Output("audio", "b.mp3", 2), Output("audio", "b.wav", 3))
    assert report.outputs == (Output("video", "v", 0, "w"), *sounds)


def test_outputs_of_the_new_shape_are_parsed_by_type() -> None:
    report = new({"type": "video", "url": "v"}, {"type": "image", "url": "i"}, {"type": "text", "url": "t"})
    assert report.outputs == (Output("image", "i", 0), Output("video", "v", 0))


@pytest.mark.parametrize("index", [-1, 10_000, 1.5, True, "x", None, 10**30])
def test_invalid_index_counts_as_missing(index: Any) -> None:
    assert old(images=[{"url": "u", "index": index}]).outputs == (Output("image", "u", 0),)


@pytest.mark.parametrize("value", [None, 0, -1, 1_790_000_000, 10**14, "soon", 1.5, True, [], 10**30])
def test_invalid_time_counts_as_missing(value: Any) -> None:
    report = parse({"task_id": "1", "task_status": "failed", "created_at": value, "updated_at": value})
    assert (report.created_ms, report.updated_ms) == (None, None)


@pytest.mark.parametrize("value", ["", "a\0", "\ud800", "x" * 201, True, 1.5, [], {}])
def test_id_that_no_column_holds_counts_as_missing(value: Any) -> None:
    report = parse({"task_id": value, "task_status": "failed", "task_info": {"external_task_id": value}})
    assert (report.provider_task_id, report.external_task_id) == (None, None)


def test_a_message_is_one_clean_line() -> None:
    text = "bad\0\n\ud800 https://u:p@h.example/p?sig=S " + "x" * 2_000
    report = parse({"task_id": 1, "task_status": "failed", "task_status_msg": text})
    assert report.message.startswith("bad https://h.example/… xxx")
    assert len(report.message) == 1_000


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe",
        b'{"task_id": "\xff"}',
        b"[" * 200_000,
        b'{"data":' * 50_000,
        b"null",
        b"[]",
        b"{}",
        b'"task_id"',
        b'{"task_id": "1"}',
        b'{"task_id": "1", "task_status": 5}',
        b'{"id": "1", "outputs": []}',
        b'{"task_id": "1", "task_status": "succeed", "task_result": {"images": [' + b'{"url":"u"},' * 600 + b"0]}}",
    ],
)
def test_hostile_bodies_are_unreadable(body: bytes) -> None:
    with pytest.raises(ReportUnreadable) as caught:
        READER.parse(body)
    assert len(str(caught.value)) < 100
    with pytest.raises(ReportUnreadable):
        READER.ids(body)


@pytest.mark.parametrize("number", ["9" * 5_000, "1e999", "-1e999", "NaN", "Infinity", "1" * 5_000 + ".5"])
def test_huge_numbers_are_left_out(server: Scripted, kling: Kling, number: str) -> None:
    body = '{"data": {"task_id": "1", "task_status": "failed", "created_at": 0, "x": [0]}}'.replace("0", number)
    assert READER.parse(body.encode()).created_ms is None
    server.answer(body.encode())
    record = kling.read(provider_task_id=None, external_task_id="mine")
    assert record is not None
    assert READER.parse(record.body) == record.report


def test_last_of_duplicate_keys_counts() -> None:
    assert READER.parse(b'{"task_id": "1", "task_id": "2", "task_status": "failed"}').provider_task_id == "2"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
ITEMS = ANYTHING | st.lists(
    st.fixed_dictionaries({}, optional=dict.fromkeys(["type", "index", "url", "watermark_url", "url_wav"], ANYTHING))
)
RECORDS = st.fixed_dictionaries(
    {"task_status": ANYTHING | st.just("succeed")},
    optional={
        **dict.fromkeys(
            ["task_id", "id", "task_status_msg", "created_at", "final_unit_deduction", "billing"], ANYTHING
        ),
        "data": ANYTHING,
        "outputs": ITEMS,
        "task_info": ANYTHING | st.fixed_dictionaries({"external_task_id": ANYTHING}),
        "task_result": ANYTHING | st.dictionaries(st.sampled_from(["images", "series_images", "audios"]), ITEMS),
    },
)


def assert_storable(report: Report) -> None:
    texts = [report.provider_task_id, report.external_task_id, report.raw_status, report.message, report.units]
    texts += [url for output in report.outputs for url in (output.url, output.watermark_url)]
    for text in filter(None, texts):
        assert "\0" not in text
        text.encode()
    assert len(report.message) <= 1_000
    assert all(len(task_id or "") <= 200 for task_id in (report.provider_task_id, report.external_task_id))


@settings(max_examples=200, deadline=None)
@given(ANYTHING | RECORDS)
def test_any_json_is_a_storable_report_or_unreadable(document: Any) -> None:
    try:
        report = parse(document)
    except ReportUnreadable:
        with pytest.raises(ReportUnreadable):
            READER.ids(json.dumps(document).encode())
        return
    assert_storable(report)
    assert READER.ids(json.dumps(document).encode()) == (report.external_task_id, report.provider_task_id)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_report_or_unreadable(body: bytes) -> None:
    with pytest.raises(ReportUnreadable):
        READER.parse(body)


# Signatures

VECTOR_SECRET = "whsec_dGVzdHNlY3JldHRlc3RzZWNyZXR0ZXN0c2VjcmV0MTI="
VECTOR_TIME = 1_781_080_794
VECTOR_BODY = (
    b'{"id":"1234567890","status":"succeeded","message":"","create_time":1781080778802,"update_time":1781080794151}'
)
VECTOR_HEADERS = {
    "Webhook-Id": "9876543210",
    "Webhook-Timestamp": str(VECTOR_TIME),
    "Webhook-Signature": "v1,UsKlJP00XoQyOn410NM9xv34sP+Gl0jnOO9Lcpr7NJ4=",
}


def verify(headers: dict[str, str], body: bytes = VECTOR_BODY, now: float = VECTOR_TIME, *secrets: str) -> str | None:
    listed = [SecretStr(secret) for secret in secrets or (VECTOR_SECRET,)]
    kling = Kling(base_url="http://127.0.0.1:9", webhook_secrets=listed, now=lambda: now)
    try:
        return kling.verify(headers, body)
    finally:
        kling.close()


def signed(secret: str, webhook_id: str, timestamp: str, body: bytes) -> str:
    key = base64.b64decode(secret.removeprefix("whsec_"))
    mac = hmac.new(key, f"{webhook_id}.{timestamp}.".encode() + body, hashlib.sha256)
    return "v1," + base64.b64encode(mac.digest()).decode()


def test_klings_published_signature_is_verified() -> None:
    assert verify(VECTOR_HEADERS) == "9876543210"


def test_signature_vector_of_the_standardwebhooks_package_is_verified() -> None:
    """Secret, id, time, body and signature of the package's own test; it gives the secret without `whsec_`, too."""
    body, moment = b'{"test": 2432232314}', 1_614_265_330
    signature = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    headers = {"webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek", "webhook-timestamp": str(moment)}
    for secret in ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"):
        verified = verify({**headers, "webhook-signature": signature}, body, moment, secret)
        assert verified == "msg_p5jXN8AQM9LWM0D4loKWxJek"


def test_signature_of_the_standardwebhooks_package_is_verified() -> None:
    moment = datetime.now(UTC)
    signature = Webhook(VECTOR_SECRET).sign("msg_1", moment, VECTOR_BODY.decode())
    times = {"webhook-id": "msg_1", "webhook-timestamp": str(int(moment.timestamp()))}
    headers = {**times, "webhook-signature": signature}
    assert verify(headers, now=moment.timestamp()) == "msg_1"
    assert Webhook(VECTOR_SECRET).verify(VECTOR_BODY, headers) == json.loads(VECTOR_BODY)


def test_without_secrets_nothing_is_verified() -> None:
    assert READER.verify(VECTOR_HEADERS, VECTOR_BODY) is None


@pytest.mark.parametrize("skew_seconds", [-300, 300])
def test_a_clock_may_differ_by_five_minutes(skew_seconds: int) -> None:
    assert verify(VECTOR_HEADERS, now=VECTOR_TIME + skew_seconds) == "9876543210"


@pytest.mark.parametrize("skew_seconds", [-301, 301])
def test_a_clock_may_not_differ_by_more(skew_seconds: int) -> None:
    with pytest.raises(BadSignature, match="300 s"):
        verify(VECTOR_HEADERS, now=VECTOR_TIME + skew_seconds)


@pytest.mark.parametrize("name", list(VECTOR_HEADERS))
@pytest.mark.parametrize("value", [None, ""])
def test_every_header_is_needed(name: str, value: str | None) -> None:
    headers = {key: given for key, given in {**VECTOR_HEADERS, name: value}.items() if given is not None}
    with pytest.raises(BadSignature, match="missing"):
        verify(headers)


def test_either_secret_verifies_during_a_rotation() -> None:
    other = "whsec_" + base64.b64encode(b"another secret of 32 characters!").decode()
    assert verify(VECTOR_HEADERS, VECTOR_BODY, VECTOR_TIME, other, VECTOR_SECRET) == "9876543210"
    theirs = signed(other, "9876543210", str(VECTOR_TIME), VECTOR_BODY)
    both = {**VECTOR_HEADERS, "Webhook-Signature": f"v1a,x {theirs} {VECTOR_HEADERS['Webhook-Signature']}"}
    assert verify(both) == "9876543210"
    with pytest.raises(BadSignature):
        verify({**VECTOR_HEADERS, "Webhook-Signature": theirs})


@pytest.mark.parametrize("body", [b"", VECTOR_BODY + b" ", VECTOR_BODY.replace(b"succeeded", b"failed"), b"\xff"])
def test_another_body_is_refused(body: bytes) -> None:
    with pytest.raises(BadSignature):
        verify(VECTOR_HEADERS, body)


HOSTILE = ["\0", "\ud800", "é", "x" * 100_000, "v1", "v1,", "v1,,", ",", " ", "v2,AAAA", "nan", "1e9", "-1", "1_7"]


@pytest.mark.parametrize("name", list(VECTOR_HEADERS))
@pytest.mark.parametrize("value", [*HOSTILE, "9" * 5_000, "\u0661\u0667", f"0{VECTOR_TIME}", "v1,A " * 50])
def test_hostile_headers_are_refused(name: str, value: str) -> None:
    with pytest.raises(BadSignature) as caught:
        verify({**VECTOR_HEADERS, name: value})
    assert len(str(caught.value)) < 60


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(list(VECTOR_HEADERS)), st.text(st.characters(codec=None))), st.binary())
def test_no_header_breaks_the_check(headers: dict[str, str], body: bytes) -> None:
    with pytest.raises(BadSignature):
        verify_standard_webhook([Webhook(VECTOR_SECRET)], headers, body, now=VECTOR_TIME)


def test_facts_of_a_request_are_expected_files_and_slots(kling: Kling) -> None:
    assert kling.request_facts({"n": 3}) == RequestFacts(series=False, expected=3, slots=3)


@pytest.mark.parametrize(
    ("query", "seconds"),
    [
        ("Expires=1792592037&Signature=s~0_-", 1_792_592_037),
        ("cacheKey=AA&pkey=P", None),
        ("Expires=soon", None),
        ("Expires=9999999999", None),
        ("Expires=1&Expires=1792592037", 1_792_592_037),
        ("&".join(["a=1"] * 200), None),
    ],
)
def test_expiry_of_a_signed_url_is_parsed(query: str, seconds: int | None) -> None:
    ends_at = READER.url_expiry(f"https://s15-kling-fdl.klingai.com/a.png?{query}")
    assert (ends_at and ends_at.timestamp()) == seconds
