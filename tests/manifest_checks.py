"""Checks every manifest that a test leaves in its bucket against the published schema and its own digest."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from tests import objects
from tests.archived_tasks import BY_HAND

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator

    from storage.bucket.bucket import Bucket


@cache
def schema() -> Draft202012Validator:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(json.loads((files("storage.archive") / "manifest.schema.json").read_text()))


def check(bucket: Bucket) -> int:
    """Returns how many manifests there were. Raises AssertionError for an invalid one.

    Objects that the test has put like another program (`archived_tasks.put`) are left out, and all objects if the store
    does not run.
    """
    from storage.archive import manifest
    from storage.archive.folders import manifest_number
    from storage.errors import StoreUnavailable

    try:
        keys = [key for key in objects.keys(bucket, bucket.prefix) if manifest_number(key)]
    except StoreUnavailable:
        return 0
    ours = [key for key in keys if key not in BY_HAND]
    for key in ours:
        members = json.loads(objects.content(bucket, key))
        assert members["digest"] == manifest.digest_of(members), f"the digest of {key} is not its content's"
        faults = [error.message for error in schema().iter_errors(members)]
        assert not faults, f"{key} does not follow the schema: {faults[:3]}"
    return len(ours)
