"""The check of every test's manifests can itself fail."""

from __future__ import annotations

import json

import pytest
import rfc8785
from hypothesis import example, given
from hypothesis import strategies as st

from receiver.app.wiring import Parts
from storage.archive import manifest
from storage.rows.models import Callback
from tests import manifest_checks
from tests.archived_tasks import BY_HAND, all_assets, archive, put


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


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_a_manifest_is_written_in_its_rfc_8785_form(parts: Parts) -> None:
    (task,) = archive(parts, 1)
    (asset, *_) = all_assets(parts)
    task.request = {"prompt": "ein Boot \u2028 \x01 \U0001f6a4", "cfg_scale": 1e21, "\U0001f6a4": 0.5, "\ufb33": 1}
    asset.notes = ['"\\/ \x7f \x1f', "\u00e9\U0001f6a4"]
    content, digest = manifest.build(task, [asset], ["b", "a"], None, "0", None)
    members = manifest.read(content)
    assert content == rfc8785.dumps(members)
    assert members["digest"] == digest
    assert (members["request"], members["assets"][0]["notes"]) == (task.request, asset.notes)


@pytest.mark.parametrize("database_kind", ["sqlite"])
def test_a_manifest_with_a_number_above_the_exact_integers_is_read_again(parts: Parts) -> None:
    (task,) = archive(parts, 1)
    row = Callback(
        source="push", body=b'{"a": [1e16, -1e20, 1e21, 1e16, 9007199254740993]}', received_at=task.created_at
    )
    content, digest = manifest.build(task, [], [], row, "0", None)
    members = manifest.read(content)
    assert members["digest"] == digest
    assert members["delivery"]["body"] == {"a": [1e16, -1e20, 1e21, 1e16, "9007199254740993"]}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")) | st.text(st.characters(max_codepoint=0x7F)),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(max_codepoint=0xFF)), inner),
)  # fmt: skip


@given(JSON.map(lambda value: {"value": value}))
@example({"\U0001f6a4": 1, "\ufb33": 1})
@example({"value": 1.0})
@example({"value": [-1e-7]})
@example({"value": [0, 1e16]})
@example({"value": '"\\/ \x7f \x1f \b\f\n\r\t'})
def test_any_value_of_others_is_dumped_in_its_rfc_8785_form(value: dict[str, object]) -> None:
    assert manifest._dump(value, is_ours=False) == rfc8785.dumps(value)  # type: ignore[arg-type]


def _digested(members: dict[str, object]) -> dict[str, object]:
    return {**members, "digest": manifest.digest_of(members)}
