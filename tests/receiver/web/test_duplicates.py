"""Twenty simultaneous copies of each callback: each applied once, the rest recognised, no error answered.

`DUPLICATED_CALLBACKS=1000` runs it at the size of a real storm: 20,000 requests.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from sqlmodel import func, select

from receiver.app.wiring import Parts
from storage.rows import group_commit
from storage.rows.models import Asset, Callback, Task
from storage.states import CallbackState, TaskState
from tests.pipeline import Web, insert_row, run

CALLBACKS = int(os.environ.get("DUPLICATED_CALLBACKS", "16"))
COPIES = 20
CONCURRENCY = 64


@pytest.fixture(autouse=True)
def loop_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop commits from the first delivery on, and leaves to the thread what it cannot."""
    monkeypatch.setattr(group_commit, "QUICK_COMMITS", 0)


def storm(parts: Parts, web: Web) -> list[tuple[str, bytes]]:
    """Every copy of every callback, shuffled: (URL, body)."""
    wanted = []
    for number in range(CALLBACKS):
        task = insert_row(parts, external_task_id=f"twin-{number}")
        picture = {"index": 0, "url": f"https://p1.klingai.com/{number}.png"}
        body = {"task_id": f"9{number:017}", "task_status": "succeed", "task_result": {"images": [picture]}}
        url = f"{web.url}/callbacks/kling/{parts.tokens.sign('kling', task.id)}"
        wanted += [(url, json.dumps(body).encode())] * COPIES
    random.Random(6).shuffle(wanted)
    return wanted


def send(wanted: list[tuple[str, bytes]]) -> Counter[int]:
    """Post them from many senders, each on its own busy connection. Returns how often each status was answered."""

    def sender(mine: list[tuple[str, bytes]]) -> Counter[int]:
        with httpx.Client(trust_env=False, timeout=30) as client:
            return Counter(client.post(url, content=body).status_code for url, body in mine)

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        return sum(pool.map(sender, [wanted[place::CONCURRENCY] for place in range(CONCURRENCY)]), Counter[int]())


@pytest.mark.parametrize("changes", [{"metrics_token": "m" * 32}])
def test_twenty_copies_of_each_callback_count_once(parts: Parts, web: Web) -> None:
    before = outcomes(parts, web)
    answers = send(storm(parts, web))
    assert answers == {200: CALLBACKS * COPIES}
    assert outcomes(parts, web) - before == {"new": CALLBACKS, "duplicate": CALLBACKS * (COPIES - 1)}
    run(parts, "callbacks")
    with parts.database.read() as session:
        states = Counter(session.exec(select(Callback.state)))
        tasks = Counter(session.exec(select(Task.state)))
        assets = session.exec(select(func.count()).select_from(Asset)).one()
    assert (states, tasks) == ({CallbackState.APPLIED: CALLBACKS}, {TaskState.SUCCEEDED: CALLBACKS})
    assert assets == CALLBACKS


def outcomes(parts: Parts, web: Web) -> Counter[str]:
    """The outcomes of the deliveries in the web server's metrics."""
    token = parts.settings.metrics_token
    assert token is not None
    headers = {"Authorization": f"Bearer {token.get_secret_value()}"}
    lines = httpx.get(f"{web.url}/metrics", headers=headers, trust_env=False).text.splitlines()
    counted = [line for line in lines if line.startswith("receiver_deliveries_total{")]
    return Counter({line.split('"')[1]: int(float(line.split()[-1])) for line in counted})
