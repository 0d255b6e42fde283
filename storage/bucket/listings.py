"""The pages of a listing: complete entries, and an end even if the store never sends one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from botocore.exceptions import PaginationError

from storage.bucket.bounded_connections import UnusableAnswer

# Under a prefix with very many delete markers S3 returns empty pages before the next key.
MAX_IDLE_PAGES = 100
# Where each operation lists its entries, and what an entry must have.
ENTRIES = {
    "list_objects_v2": (("Contents",), {"Key", "Size", "LastModified"}),
    "list_object_versions": (("Versions", "DeleteMarkers"), {"Key"}),
    "list_multipart_uploads": (("Uploads",), {"Key", "UploadId", "Initiated"}),
}


def entries(client: Any, operation: str, **place: str) -> Iterator[dict[str, Any]]:
    """Every entry of a listing below its `Prefix`. One that lacks what it must have raises `UnusableAnswer`.

    Others are left out: a store, or a proxy that drops the query, may list the whole bucket, and `purge` deletes what
    is listed. boto3 asks on while the store names a new token. Here MAX_IDLE_PAGES in a row without a key that sorts
    after all earlier ones raise `PaginationError`.
    """
    lists, needed = ENTRIES[operation]
    last, idle = "", 0
    for page in client.get_paginator(operation).paginate(**place):
        found = [each for name in lists for each in page.get(name, ())]
        if not all(needed <= each.keys() for each in found):
            raise UnusableAnswer
        yield from (each for each in found if each["Key"].startswith(place["Prefix"]))
        greatest = max((each["Key"] for each in found), default="")
        idle = 0 if greatest > last else idle + 1
        last = max(last, greatest)
        if idle > MAX_IDLE_PAGES:
            raise PaginationError(message=f"{MAX_IDLE_PAGES} pages without a further key")
