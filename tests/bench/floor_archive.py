"""The floor of rows 4 to 6: the minimal archived picture with our three commits, without a framework.

Eight threads; GET into one reused buffer, SHA-256, MD5, CRC-32, HEAD, a create-only PUT with its checksum, both signed
by botocore; one commit at the claim, one when the key is known, one when the picture is archived, with the driver
itself and `synchronous=FULL`. No address check, no structure, no manifest, no event, no retry.

    python -m tests.bench.floor_archive HOST:PORT COUNT FILES DATABASE      prints {"seconds": …, "cpu_seconds": …}
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import queue
import resource
import sqlite3
import sys
import threading
import time
import uuid
import zlib
from typing import Any
from urllib.parse import urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

THREADS = 8
READ_BYTES = 256 * 1024
MOST_BYTES = 8_000_000
RUN = uuid.uuid4().hex  # a folder of its own, because the store may have been used before
NO_BODY = hashlib.sha256(b"").hexdigest()


class Rows:
    """One table, one writer at a time."""

    def __init__(self, file: str) -> None:
        self._turn = threading.Lock()
        self._connection = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
        for words in ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL"):
            self._connection.execute(words)
        self._connection.execute("CREATE TABLE floor (number INTEGER PRIMARY KEY, row TEXT)")

    def commit(self, number: int, row: str) -> None:
        with self._turn:
            self._connection.execute("INSERT OR REPLACE INTO floor VALUES (?, ?)", (number, row.ljust(300)))

    def count_archived(self) -> int:
        with self._turn:
            found = self._connection.execute("SELECT count(*) FROM floor WHERE row LIKE '%archived%'").fetchone()
            return int(found[0])


class _Auth(S3SigV4Auth):
    def payload(self, request: Any) -> str:
        return str(request.context["sha256"])


class Store:
    """One connection to the bucket."""

    def __init__(self) -> None:
        self._url = os.environ["RECEIVER_S3_ENDPOINT_URL"]
        self._bucket = os.environ["RECEIVER_S3_BUCKET"]
        self._credentials = Credentials(os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
        self._connection = http.client.HTTPConnection(urlsplit(self._url).netloc)

    def send(self, method: str, key: str, sha256: str, headers: dict[str, str], body: memoryview | None = None) -> int:
        path = f"/{self._bucket}/{key}"
        request = AWSRequest(method, self._url + path, headers=headers)
        request.context["sha256"] = sha256
        _Auth(self._credentials, "s3", os.environ["AWS_DEFAULT_REGION"]).add_auth(request)
        self._connection.request(method, path, body, headers=dict(request.headers.items()))
        answer = self._connection.getresponse()
        answer.read()
        return answer.status


def archive(numbers: queue.SimpleQueue[int], address: str, files: int, rows: Rows) -> None:
    """One thread: pictures until none is left."""
    source, store, memory = http.client.HTTPConnection(address), Store(), memoryview(bytearray(MOST_BYTES))
    while True:
        try:
            number = numbers.get_nowait()
        except queue.Empty:
            return
        rows.commit(number, "claimed")
        source.request("GET", f"/{number % files:05}.png")
        answer, length, hashed = source.getresponse(), 0, hashlib.sha256()
        while count := answer.readinto(memory[length : length + READ_BYTES]):
            hashed.update(memory[length : length + count])
            length += count
        picture = memory[:length]
        zlib.crc32(picture)
        hashlib.md5(picture, usedforsecurity=False).digest()
        key = f"{RUN}/{number:06}.png"
        rows.commit(number, f"{key} {hashed.hexdigest()}")
        found = store.send("HEAD", key, NO_BODY, {})
        headers = {
            "Content-Length": str(length),
            "Content-Type": "image/png",
            "If-None-Match": "*",
            "x-amz-checksum-sha256": base64.b64encode(hashed.digest()).decode(),
        }
        put = store.send("PUT", key, hashed.hexdigest(), headers, picture)
        assert (found, put) == (404, 200), (found, put)
        rows.commit(number, f"{key} {hashed.hexdigest()} archived")


def main(address: str, count: int, files: int, database: str) -> None:
    rows, numbers = Rows(database), queue.SimpleQueue[int]()
    for number in range(count):
        numbers.put(number)
    threads = [threading.Thread(target=archive, args=(numbers, address, files, rows)) for _ in range(THREADS)]
    before, started = _cpu_seconds(), time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds, cpu_seconds = time.monotonic() - started, _cpu_seconds() - before
    assert rows.count_archived() == count
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds}))  # noqa: T201


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
