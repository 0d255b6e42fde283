"""A client that knows only the seed's page, with another base URL: from its create to readable pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from standardwebhooks import Webhook

from receiver.app.wiring import Parts
from receiver.base.signature import client_secret
from receiver.gateway.api_keys import fingerprint
from receiver.sandbox import Sandbox
from tests.harness import wait_until
from tests.pipeline import Web
from tests.receiver.gateway.test_gateway import CHANGES, ID, KEY, PATH
from tests.seed_client import EXAMPLE, SeedClient
from tests.unreported_tasks import go_on_after
from tests.webhook_receiver import Hook

SECRET = "whsec_dGVzdHNlY3JldHRlc3RzZWNyZXR0ZXN0c2VjcmV0MTI="
OWN_SECRET = client_secret(SecretStr(SECRET), fingerprint(KEY)).get_secret_value()


@pytest.fixture
def hook() -> Iterator[Hook]:
    """The client's own web server."""
    with Hook() as server:
        yield server


@pytest.fixture
def changes(hook: Hook) -> dict[str, Any]:
    return {**CHANGES, "private_callback_hosts": hook.host, "event_secrets": SECRET}


def callback_bodies(hook: Hook) -> list[dict[str, Any]]:
    return [json.loads(got.body) for got in hook.taken]


def test_a_client_that_changes_its_base_url_gets_its_pictures(
    web: Web, parts: Parts, sandbox: Sandbox, hook: Hook
) -> None:
    sandbox.set(submitted_seconds=3_600, processing_seconds=3_600)
    client, worker = SeedClient(f"{web.url}/kling", KEY), parts.worker()
    made = client.create(**{**EXAMPLE, "n": 2, "callback_url": hook.url, "external_task_id": ID})

    def is_told() -> bool:
        parts.sequence()
        worker.run_until_idle()
        go_on_after(sandbox, len(callback_bodies(hook)))
        return any(each["task_status"] == "succeed" for each in callback_bodies(hook))

    wait_until(is_told, seconds=60)
    assert [each["task_status"] for each in callback_bodies(hook)] == ["submitted", "processing", "succeed"]
    assert {each["task_id"] for each in callback_bodies(hook)} == {made["task_id"]}
    for got in hook.taken:
        assert Webhook(OWN_SECRET).verify(got.body.decode(), dict(got.headers))
    task = client.task(made["task_id"])
    assert callback_bodies(hook)[-1]["task_result"] == task["task_result"]
    pictures = [httpx.get(each["url"], follow_redirects=True) for each in task["task_result"]["images"]]
    kept = [hashlib.sha256(picture.content).hexdigest() for picture in pictures]
    assert kept == [asset.sha256 for asset in sandbox.ledger().task(ID).assets]
    assert all(each["url"].startswith(f"{web.url}/assets/") for each in task["task_result"]["images"])
    assert hook.url not in str(sandbox.ledger().to_json())


@pytest.mark.databases("sqlite")
def test_the_refusal_of_an_earlier_create_is_not_told_of_a_later_one(
    web: Web, parts: Parts, sandbox: Sandbox, hook: Hook
) -> None:
    """The client sends a refused id again before the events of the first create are numbered."""
    sandbox.set(create_faults=["1303"], submitted_seconds=3_600)
    body = {**EXAMPLE, "callback_url": hook.url, "external_task_id": ID}
    answers = [httpx.post(web.url + PATH, headers={"Authorization": f"Bearer {KEY}"}, json=body) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [429, 200]

    def is_told() -> bool:
        parts.sequence()
        parts.worker().run_until_idle()
        return bool(callback_bodies(hook))

    wait_until(is_told, seconds=60)
    assert [each["task_status"] for each in callback_bodies(hook)] == ["submitted"]
