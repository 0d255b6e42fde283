"""Row 7: from the callback of an idle system to the object that can be read, against curl's GET and PUT."""

from __future__ import annotations

import http.client
import json
import statistics
import subprocess
import time
import uuid
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import boto3
from botocore.config import Config
from pydantic import SecretStr
from sqlmodel import select

from receiver.base.tokens import Tokens
from storage.database.sessions import Database
from storage.rows.models import Asset
from storage.states import Step, TaskState
from tests.bench import stage
from tests.bench.pictures import Source, source
from tests.bench.table import Sample
from tests.harness import wait_until
from tests.pipeline import CALLBACK_SECRET
from tests.rows import new_task

PICTURE_BYTES = 3_000_000
POLL_INTERVAL_SECONDS = 0.002
PAUSE_SECONDS = 1.0  # idle again, with every connection pool in its usual state


def callback_to_object(small: bool) -> Sample:
    """Median milliseconds from posting the callback to a GET of the object that answers; and of curl's GET and PUT."""
    times = 1 if small else 12
    with stage.folder() as place, ExitStack() as stack:
        files = stack.enter_context(source(place, count=times + 1, size=PICTURE_BYTES))
        found = stack.enter_context(stage.seaweed(place))
        url = stack.enter_context(stage.database("sqlite", place))
        variables = stage.environment(url, **found, RECEIVER_PRIVATE_RESULT_HOSTS=files.address)
        port = stack.enter_context(stage.served(variables, place))
        stack.enter_context(stage.workers(variables, place))
        ours, theirs = [], []
        for name in files.names:
            ours.append(_ours(url, port, files, name))
            theirs.append(_curl(place, files, name, found))
            time.sleep(0.1 if small else PAUSE_SECONDS)
    return Sample(statistics.median(ours[1:]) * 1e3, statistics.median(theirs[1:]) * 1e3)


def _ours(url: str, port: int, files: Source, name: str) -> float:
    """Watches the task's rows, because its object's name is unknown before. The rows name it after the put."""
    database = Database(url)
    with database.write() as session:
        later = datetime.now(UTC) + timedelta(hours=1)
        task = new_task(session, state=TaskState.SUBMITTED, step=Step.READ, due_at=later, expected=1, series=False)
    token = Tokens([SecretStr(CALLBACK_SECRET)]).sign("kling", task.id)
    link = f"http://{files.address}/{name}"
    body = {
        "task_id": uuid.uuid4().hex,
        "task_status": "succeed",
        "task_result": {"images": [{"index": 0, "url": link}]},
    }
    connection = http.client.HTTPConnection("127.0.0.1", port)
    started = time.perf_counter()
    connection.request("POST", f"/callbacks/kling/{token}", json.dumps(body), {"Content-Type": "application/json"})
    assert connection.getresponse().status == 200
    connection.close()

    def is_archived() -> bool:
        with database.read() as session:
            asset = session.exec(select(Asset).where(Asset.task_id == task.id)).one_or_none()
            return asset is not None and asset.state == "archived"

    wait_until(is_archived, seconds=30, every=POLL_INTERVAL_SECONDS)
    took = time.perf_counter() - started
    database.close()
    return took


def _curl(place: Path, files: Source, name: str, found: dict[str, str]) -> float:
    store = boto3.Session().client(
        "s3", endpoint_url=found["RECEIVER_S3_ENDPOINT_URL"], region_name="us-east-1",
        aws_access_key_id=found["AWS_ACCESS_KEY_ID"], aws_secret_access_key=found["AWS_SECRET_ACCESS_KEY"],
        config=Config(signature_version="s3v4"),
    )  # fmt: skip
    wanted = {"Bucket": found["RECEIVER_S3_BUCKET"], "Key": f"curl/{name}"}
    link = store.generate_presigned_url("put_object", Params=wanted)
    picture = place / "picture"
    started = time.perf_counter()
    subprocess.run(["curl", "-sf", "-o", picture, f"http://{files.address}/{name}"], check=True, timeout=30)
    subprocess.run(["curl", "-sf", "-o", place / "answer", "-T", picture, link], check=True, timeout=30)
    return time.perf_counter() - started
