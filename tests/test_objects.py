"""The tests' plain requests to their store read what the product's own bucket reads, also under odd keys."""

from __future__ import annotations

import hashlib
import io

import pytest

from storage.bucket.bucket import Bucket
from tests import objects

KEYS = ("a b&c/ü.png", "x/<y>.png", "2026/01/a~b+c=d.png")


def test_plain_requests_read_every_object(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in KEYS:
        content, sha256 = key.encode(), hashlib.sha256(key.encode()).hexdigest()
        place = {"sha256": sha256, "size": len(content), "media_type": "image/png", "metadata": {}}
        bucket.put_once(bucket.prefix + key, io.BytesIO(content), **place)
    listed = [each.key for each in bucket.list(bucket.prefix)]
    monkeypatch.setattr(bucket, "list", None)  # boto3 is the way out for other stores
    monkeypatch.setattr(bucket, "read_bytes", None)
    assert objects.keys(bucket, bucket.prefix) == listed
    assert {key.removeprefix(bucket.prefix): objects.content(bucket, key).decode() for key in listed} == {
        key: key for key in KEYS
    }
