"""The sandbox over real sockets: its answers, callbacks and files, compared with the recorded payloads."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import jwt
import pytest
from PIL import Image
from standardwebhooks import Webhook

from receiver.sandbox import Knobs, Sandbox
from tests.harness import PAYLOADS, wait_until

PATH = "/kling/v1/images/omni-image"
SECRET = "whsec_dGVzdHNlY3JldHRlc3RzZWNyZXR0ZXN0c2VjcmV0MTI="


class Listener:
    """The receiver of callbacks: keeps every delivery, answers with `statuses` in turn, then 200."""

    def __init__(self) -> None:
        self.deliveries: list[tuple[dict[str, str], bytes]] = []
        self.statuses: list[int] = []
        self.answer_coding = ""
        listener = self

        class Answering(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                listener.deliveries.append((dict(self.headers), body))
                self.send_response(listener.statuses.pop(0) if listener.statuses else 200)
                if listener.answer_coding:
                    self.send_header("Content-Encoding", listener.answer_coding)
                self.end_headers()
                self.wfile.write(b"not coded")

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
        self.url = f"http://127.0.0.1:{self.server.server_port}/callbacks/kling/token"

    def bodies(self) -> list[Any]:
        return [json.loads(body) for _, body in self.deliveries]


@pytest.fixture
def listener() -> Iterator[Listener]:
    listening = Listener()
    thread = threading.Thread(target=listening.server.serve_forever, args=(0.02,))
    thread.start()
    yield listening
    listening.server.shutdown()
    listening.server.server_close()
    thread.join()


def client(sandbox: Sandbox) -> httpx.Client:
    headers = {"Authorization": f"Bearer {sandbox.api_key}"}
    return httpx.Client(base_url=sandbox.url, headers=headers, trust_env=False, timeout=10)


@pytest.fixture
def api(sandbox: Sandbox) -> Iterator[httpx.Client]:
    with client(sandbox) as speaking:
        yield speaking


def create(api: httpx.Client, **fields: Any) -> httpx.Response:
    return api.post(PATH, json={"model_name": "kling-v3-omni", "prompt": "a harbour at dawn", **fields})


def ended(api: httpx.Client, name: str) -> Any:
    """The task's record, once it ended."""

    def look() -> Any:
        record = api.get(f"{PATH}/{name}").json()["data"]
        return record if record["task_status"] in ("succeed", "failed") else None

    return wait_until(look)


def urls(record: Any) -> list[str]:
    result = record["task_result"]
    pictures = result.get("series_images") or result["images"]
    return [picture[key] for picture in pictures for key in ("url", "watermark_url") if key in picture]


def keys(value: Any) -> Any:
    """The shape of a JSON value: its keys in order, with the first entry standing for all of a list."""
    if isinstance(value, dict):
        return [(key, keys(inner)) for key, inner in value.items()]
    return [keys(value[0])] if isinstance(value, list) and value else type(value).__name__


def payload(name: str) -> Any:
    return json.loads((PAYLOADS / f"{name}.json").read_text())


# -- create and query -------------------------------------------------------------------------------------------------


def test_create_answers_as_recorded_and_keeps_the_body_as_it_came(api: httpx.Client, sandbox: Sandbox) -> None:
    raw = b'{"model_name": "kling-v3-omni",  "prompt": "caf\xc3\xa9", "external_task_id": "a/1"}'
    answer = api.post(PATH, content=raw)
    assert answer.status_code == 200
    assert keys(answer.json()) == keys(payload("create-answer"))
    (kept,) = sandbox.ledger().creates
    assert (kept.raw, kept.body["prompt"], kept.code) == (raw, "café", 0)
    assert sandbox.ledger().task("a/1").task_id == kept.task_id == answer.json()["data"]["task_id"]


def test_unused_fields_may_be_empty_strings(api: httpx.Client) -> None:
    unused = {"resolution": "", "aspect_ratio": "", "callback_url": "", "external_task_id": ""}
    answer = create(api, element_list=[{"element_id": 835266081714884677}], n=1, **unused)
    assert answer.json()["code"] == 0


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompt": ""}, 1201),
        ({"prompt": "x" * 2501}, 1201),
        ({"model_name": None}, 1201),
        ({"n": 10}, 1201),
        ({"n": True}, 1201),
        ({"result_type": "series", "series_amount": 1}, 1201),
        ({"result_type": "series", "model_name": "kling-image-o1"}, 1201),
        ({"resolution": "8k"}, 1201),
        ({"aspect_ratio": "5:4"}, 1201),
        ({"watermark_info": {"enabled": "yes"}}, 1200),
        ({"image_list": [{"image": ""}]}, 1201),
        ({"image_list": [{"image": "data:image/png;base64,AAAA"}]}, 1201),
        ({"element_list": [{"element_id": 1}] * 11}, 1201),
        ({"element_list": [{"element_id": "835266081714884677"}]}, 1201),
        ({"callback_url": "http://192.0.2.7/callbacks"}, 1200),
        ({"callback_url": "ftp://127.0.0.1/"}, 1200),
    ],
)
def test_bad_parameters_are_refused(api: httpx.Client, fields: dict[str, Any], code: int) -> None:
    answer = create(api, **fields)
    assert (answer.status_code, answer.json()["code"]) == (400, code)


@pytest.mark.parametrize(("size", "code"), [((300, 750), 0), ((299, 299), 1201), ((300, 751), 1201)])
def test_input_pictures_are_measured(api: httpx.Client, size: tuple[int, int], code: int) -> None:
    file = io.BytesIO()
    Image.new("L", size).save(file, "PNG")
    images = [{"image": base64.b64encode(file.getvalue()).decode()}, {"image": "https://example.com/a.png"}]
    assert create(api, image_list=images).json()["code"] == code


def test_an_external_id_is_used_once(api: httpx.Client) -> None:
    create(api, external_task_id="mine")
    again = create(api, external_task_id="mine")
    assert again.status_code == 400
    assert (again.json()["code"], again.json()["message"]) == (1201, "External_task_id mine already exists")


def test_a_task_holds_its_pictures_as_slots_until_it_ends(api: httpx.Client, sandbox: Sandbox) -> None:
    sandbox.set(concurrency_limit=4, processing_seconds=3_600)
    assert create(api, n=9, result_type="series", series_amount=3, external_task_id="first").json()["code"] == 0
    refused = create(api, n=2, external_task_id="second")
    assert (refused.status_code, refused.json()["code"]) == (429, 1303)
    assert keys(refused.json()) == keys(payload("error-concurrency"))
    sandbox.world.advance(time.time() + 7_200)
    ended(api, "first")
    assert create(api, n=2, external_task_id="second").json()["code"] == 0


def test_both_ids_and_the_list_find_a_task(api: httpx.Client) -> None:
    task_id = create(api, external_task_id="a/b").json()["data"]["task_id"]
    record = ended(api, "a/b")
    assert api.get(f"/v1/images/omni-image/{task_id}").json()["data"] == record
    assert api.get(PATH, params={"pageNum": 1, "pageSize": 5}).json()["data"] == [record]
    assert api.get(PATH, params={"pageNum": 2, "pageSize": 5}).json()["data"] == []
    assert api.get(PATH, params={"pageSize": 501}).status_code == 400


def test_the_tasks_route_answers_in_the_new_shape(api: httpx.Client) -> None:
    create(api, external_task_id="known")
    ended(api, "known")
    (record,) = api.get("/tasks", params={"external_task_ids": "known,unknown"}).json()["data"]
    assert sorted(record) == sorted(payload("callback-new-shape"))
    assert api.get("/tasks", params={"task_ids": "7"}).json()["data"] == []
    assert api.get("/tasks", params={"task_ids": ",".join(map(str, range(21)))}).json()["code"] == 1201


def test_an_unknown_task_is_a_bad_parameter(api: httpx.Client) -> None:
    answer = api.get(f"{PATH}/42")
    expected = payload("error-task-not-found")
    assert answer.status_code == 400
    assert (answer.json()["code"], answer.json()["message"]) == (expected["code"], expected["message"])


def token(knobs: Knobs, **claims: Any) -> str:
    now = int(time.time())
    return jwt.encode({"iss": knobs.access_key, "exp": now + 1800, "nbf": now - 5, **claims}, knobs.secret_key)


@pytest.mark.parametrize(
    ("claims", "code"), [({}, 0), ({"nbf": 2**33}, 1003), ({"exp": 1}, 1004), ({"iss": "someone"}, 1000)]
)
def test_a_jwt_opens_the_old_route_only(sandbox: Sandbox, claims: dict[str, Any], code: int) -> None:
    headers = {"Authorization": f"Bearer {token(Knobs(), **claims)}"}
    answer = httpx.get(sandbox.url + PATH, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (401 if code else 200, code)
    assert httpx.get(f"{sandbox.url}/tasks?task_ids=1", headers=headers).json()["code"] == 1002


@pytest.mark.parametrize(("authorization", "code"), [("", 1001), ("Bearer wrong", 1002), ("Basic eA==", 1002)])
def test_without_credentials_nothing_is_created(sandbox: Sandbox, authorization: str, code: int) -> None:
    answer = httpx.post(sandbox.url + PATH, headers={"Authorization": authorization}, json={"prompt": "x"})
    assert (answer.status_code, answer.json()["code"]) == (401, code)
    assert sandbox.ledger().tasks == ()


def test_a_body_over_the_bound_is_not_read(sandbox: Sandbox) -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", sandbox.port, timeout=10)) as connection:
        connection.putrequest("POST", PATH)
        connection.putheader("Content-Length", str(65 * 1024 * 1024))
        connection.endheaders()
        assert connection.getresponse().status == 413


# -- faults of the API ------------------------------------------------------------------------------------------------


def test_sandbox_refuses_creates_before_and_after_the_task_exists(api: httpx.Client, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=[5001, "5000:created", 1302])
    assert create(api, external_task_id="a").status_code == 503
    assert create(api, external_task_id="b").json()["code"] == 5000
    assert create(api, external_task_id="c").json()["code"] == 1302
    assert [task.external_task_id for task in sandbox.ledger().tasks] == ["b"]
    assert create(api, external_task_id="b").json()["code"] == 1201
    assert sandbox.ledger().counts["fault:create:5000:created"] == 1


def test_sandbox_sends_answers_that_cannot_be_read(api: httpx.Client, sandbox: Sandbox) -> None:
    sandbox.set(create_faults=["html", "broken:created"])
    assert create(api, external_task_id="a").text.startswith("<!DOCTYPE")
    with pytest.raises(httpx.RemoteProtocolError):
        create(api, external_task_id="b")
    assert [task.external_task_id for task in sandbox.ledger().tasks] == ["b"]


def test_queries_can_be_unavailable_or_behind(api: httpx.Client, sandbox: Sandbox) -> None:
    sandbox.set(query_lag_seconds=3600, query_faults=[5001])
    create(api, external_task_id="young")
    assert api.get(f"{PATH}/young").status_code == 503
    assert "not found" in api.get(f"{PATH}/young").json()["message"]


def test_a_gateway_may_invent_ids_and_drop_task_info(api: httpx.Client, sandbox: Sandbox) -> None:
    sandbox.set(gateway_ids=True, task_info=False)
    data = create(api, external_task_id="mine").json()["data"]
    record = api.get(f"{PATH}/{data['task_id']}").json()["data"]
    assert record["task_id"] != data["task_id"]
    assert "task_info" not in data
    assert "task_info" not in record


# -- callbacks --------------------------------------------------------------------------------------------------------


def test_every_status_change_is_called_back(api: httpx.Client, sandbox: Sandbox, listener: Listener) -> None:
    create(api, external_task_id="x", n=2, callback_url=listener.url)
    bodies = sorted(
        wait_until(lambda: listener.bodies()[2:] and listener.bodies()), key=lambda body: body["updated_at"]
    )
    assert [body["task_status"] for body in bodies] == ["submitted", "processing", "succeed"]
    assert keys(bodies[1]) == keys(payload("callback-processing"))
    assert keys(bodies[2]) == keys(payload("callback-single"))
    headers = listener.deliveries[0][0]
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    assert headers["User-Agent"].startswith("Apache-HttpClient/")
    wait_until(lambda: all(callback.delivered for callback in sandbox.ledger().callbacks))


@pytest.mark.parametrize(
    ("knobs", "fields", "recorded"),
    [
        ({}, {"prompt": "[fail]"}, "callback-failed"),
        ({"callback_shape": "wrapped"}, {}, "callback-wrapped"),
        ({"callback_shape": "no_task_info"}, {}, "callback-no-task-info"),
        (
            {},
            {"result_type": "series", "series_amount": 3, "watermark_info": {"enabled": True}},
            "callback-series-watermarked",
        ),
    ],
)
def test_callbacks_have_the_shape_of_the_knob(
    api: httpx.Client,
    sandbox: Sandbox,
    listener: Listener,
    knobs: dict[str, Any],
    fields: dict[str, Any],
    recorded: str,
) -> None:
    sandbox.set(**knobs)
    create(api, external_task_id="x", callback_url=listener.url, **fields)
    wait_until(lambda: len(listener.deliveries) == 3)
    assert keys(payload(recorded)) in [keys(body) for body in listener.bodies()]


def test_the_new_shape_has_neither_index_nor_series(api: httpx.Client, sandbox: Sandbox, listener: Listener) -> None:
    sandbox.set(callback_shape="new")
    create(api, external_task_id="x", callback_url=listener.url, result_type="series", series_amount=2)
    bodies = wait_until(lambda: [body for body in listener.bodies() if body["status"] == "succeeded"])
    assert sorted(bodies[0]) == sorted(payload("callback-new-shape"))
    assert [sorted(output) for output in bodies[0]["outputs"]] == [["group_id", "type", "url"]] * 2
    assert bodies[0]["billing"][0]["amount"] == "16"


def test_callbacks_are_signed_by_every_secret(api: httpx.Client, sandbox: Sandbox, listener: Listener) -> None:
    secrets = [SECRET, "whsec_" + "QUJD" * 10]
    sandbox.set(webhook_secrets=secrets)
    create(api, callback_url=listener.url)
    headers, body = wait_until(lambda: listener.deliveries)[0]
    for secret in secrets:
        Webhook(secret).verify(body, headers)


def test_a_refused_callback_is_tried_again(api: httpx.Client, sandbox: Sandbox, listener: Listener) -> None:
    sandbox.set(callback_backoff_seconds=0.01, submitted_seconds=3600)
    listener.statuses = [503, 302, 500, 500]
    create(api, callback_url=listener.url)
    attempts = wait_until(lambda: [c.attempts for c in sandbox.ledger().callbacks if len(c.attempts) == 3])
    assert [attempt.http_status for attempt in attempts[0]] == [503, 302, 500]
    assert len(listener.deliveries) == 3


def test_the_answer_to_a_callback_is_not_decoded(api: httpx.Client, sandbox: Sandbox, listener: Listener) -> None:
    listener.answer_coding = "gzip, gzip"
    create(api, callback_url=listener.url)
    attempts = wait_until(lambda: [c.attempts for c in sandbox.ledger().callbacks if c.attempts])
    assert attempts[0][0].http_status == 200, attempts


def test_callbacks_lose_their_body_or_offer_http2(api: httpx.Client, sandbox: Sandbox, listener: Listener) -> None:
    sandbox.set(callback_empty_rate=1, callback_offers_http2=True)
    create(api, external_task_id="x", callback_url=listener.url)
    headers, body = wait_until(lambda: listener.deliveries)[0]
    assert (headers["Upgrade"], headers["Connection"], body) == ("h2c", "Upgrade, HTTP2-Settings", b"")
    assert sandbox.ledger().callbacks[0].body == b""


def test_an_account_has_a_balance(api: httpx.Client, sandbox: Sandbox) -> None:
    sandbox.set(balance=1)
    assert [create(api).json()["code"] for _ in range(3)] == [0, 1102, 1102]
    sandbox.set(balance=None)
    assert create(api).json()["code"] == 0


def test_dropped_callbacks_are_noted_and_never_sent(api: httpx.Client, sandbox: Sandbox, listener: Listener) -> None:
    create(api, prompt="a bell [drop]", external_task_id="x", callback_url=listener.url)
    ended(api, "x")
    assert [(callback.status, callback.dropped) for callback in sandbox.ledger().callbacks][-1] == ("succeed", True)
    assert listener.deliveries == []


def test_sandbox_reorders_and_duplicates_callbacks(api: httpx.Client, sandbox: Sandbox, listener: Listener) -> None:
    sandbox.set(callback_reorder=True, callback_duplicates=1)
    create(api, external_task_id="x", callback_url=listener.url)
    wait_until(lambda: len(listener.deliveries) == 6)
    statuses = [body["task_status"] for body in listener.bodies()]
    assert statuses == ["succeed", "succeed", "processing", "processing", "submitted", "submitted"]


def test_dead_first_links_are_replaced_by_a_read(api: httpx.Client, listener: Listener) -> None:
    create(api, prompt="a lantern [expire]", external_task_id="x", callback_url=listener.url)
    (body,) = wait_until(lambda: [body for body in listener.bodies() if body["task_status"] == "succeed"])
    (first,) = urls(body)
    assert httpx.get(first).status_code == 403
    (second,) = urls(ended(api, "x"))
    assert httpx.get(second).status_code == 200
    assert httpx.get(first).status_code == 403
