"""The pages of a listing, which end even if the store never says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from botocore.exceptions import PaginationError

# Under a prefix with very many delete markers S3 returns empty pages before the next key.
MAX_IDLE_PAGES = 100


def pages(client: Any, operation: str, *lists: str, **place: str) -> Iterator[dict[str, Any]]:
    """Every page of `operation`, whose entries are in the members `lists`.

    boto3 asks on while the store names a new token. Here MAX_IDLE_PAGES in a row without a key that sorts after all
    earlier ones raise `PaginationError`.
    """
    last, idle = "", 0
    for page in client.get_paginator(operation).paginate(**place):
        yield page
        greatest = max((each["Key"] for name in lists for each in page.get(name, ())), default="")
        idle = 0 if greatest > last else idle + 1
        last = max(last, greatest)
        if idle > MAX_IDLE_PAGES:
            raise PaginationError(message=f"{MAX_IDLE_PAGES} pages without a further key")
