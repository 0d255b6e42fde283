"""A record with lists of thousands of entries costs the parser of JSON alone: nothing is built of their entries."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress

import pytest
from pydantic import SecretStr

from receiver.providers.kling.client import Kling
from storage.errors import ReportUnreadable

READER = Kling(base_url="https://api-singapore.klingai.com", api_key=SecretStr("a-key-of-tests"))


def calls_in(work: Callable[[], object]) -> int:
    """The number of Python functions that it calls, whether it returns or refuses the body."""
    calls = 0

    def count(_frame: object, kind: str, _word: object) -> None:
        nonlocal calls
        calls += kind == "call"

    sys.setprofile(count)
    try:
        with suppress(ReportUnreadable):
            work()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("place", ["images", "series_images", "videos", "audios", "outputs"])
def test_a_list_of_thousands_of_files_is_refused_before_it_is_mapped(place: str) -> None:
    files = {place: [{}] * 16_000}
    record = {"task_id": "1", "task_status": "succeed", "task_result": files, **files}
    body = json.dumps(record).encode()
    assert calls_in(lambda: READER.parse(body)) < 2_000
    with pytest.raises(ReportUnreadable, match=r"lists (16|32)000 files; at most 500"):
        READER.parse(body)


def test_a_list_of_thousands_of_bills_is_no_bill() -> None:
    record = {"id": "1", "status": "succeeded", "outputs": [{"url": "u"}], "billing": [{}] * 16_000}
    body = json.dumps(record).encode()
    assert calls_in(lambda: READER.parse(body)) < 2_000
    report = READER.parse(body)
    assert (report.units, len(report.outputs)) == (None, 1)


def test_the_ids_of_a_report_are_read_without_its_files() -> None:
    files = [{"url": f"https://p9-fdl.klingai.com/{number}.png"} for number in range(500)]
    record = {"task_id": "1", "task_status": "succeed", "task_result": {"images": files}, "external_task_id": "mine"}
    body = json.dumps(record).encode()
    assert READER.ids(body) == ("mine", "1")
    assert 2 * calls_in(lambda: READER.ids(body)) < calls_in(lambda: READER.parse(body))
