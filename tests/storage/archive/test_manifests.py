"""The check that looks at every manifest of every test can itself fail."""

from __future__ import annotations

import json

import pytest
import rfc8785

from receiver.app.wiring import Parts
from storage.archive import manifest
from tests import manifest_checks
from tests.archived_tasks import BY_HAND, archive, put


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_a_manifest_that_is_not_as_published_is_noticed(parts: Parts) -> None:
    (task,) = archive(parts, 1)
    key = str(task.manifest_key)
    assert manifest_checks.check(parts.bucket) == 1
    members = json.loads(parts.bucket.read_bytes(key, 2**20))
    for changed, words in (
        (members | {"tool_version": "other"}, "digest"),
        (_digested(members | {"stranger": 1}), "schema"),
        (_digested({name: value for name, value in members.items() if name != "request"}), "schema"),
    ):
        put(parts, key, rfc8785.dumps(changed))
        BY_HAND.discard(key)
        with pytest.raises(AssertionError, match=words):
            manifest_checks.check(parts.bucket)
    put(parts, key, b"nonsense")
    assert manifest_checks.check(parts.bucket) == 0


def _digested(members: dict[str, object]) -> dict[str, object]:
    return {**members, "digest": manifest.digest_of(members)}
