"""The cost of a hostile body: its structure is counted before it is parsed, and its long lists are not built."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress

import pytest
from pydantic import SecretStr

from receiver.providers.kling.client import Kling
from receiver.providers.kling.report import MAX_ENTRIES
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


@pytest.mark.parametrize("part", ["1", "[]", "{}", '""', '"":0', "[[]]"])
def test_a_body_full_of_structure_is_refused_before_it_is_parsed(part: str) -> None:
    """In 60 kB, 20,000 empty lists took the parser 19 ms."""
    many = f"{{{part}}}" if ":" in part else part
    body = f'{{"task_id":"1","task_status":"succeed","n":[{",".join([many] * (60_000 // len(many + ",")))}]}}'.encode()
    assert calls_in(lambda: READER.ids(body)) < 30
    with pytest.raises(ReportUnreadable, match="more than 10000 brackets, commas and colons"):
        READER.parse(body)


def test_a_report_of_the_most_files_is_read() -> None:
    file = {"index": 17, "url": "https://p9-fdl.klingai.com/1.png?a=1,2", "watermark_url": "https://h/1.png", "id": "7"}
    record = {"task_id": "1", "task_status": "succeed", "task_result": {"images": [file] * MAX_ENTRIES}}
    assert READER.ids(json.dumps(record).encode()) == (None, "1")


@pytest.mark.parametrize("place", ["images", "series_images", "videos", "audios", "outputs"])
def test_a_list_of_thousands_of_files_is_refused_before_it_is_mapped(place: str) -> None:
    files = {place: [{}] * 1_200}
    record = {"task_id": "1", "task_status": "succeed", "task_result": files, **files}
    body = json.dumps(record).encode()
    assert calls_in(lambda: READER.parse(body)) < 1_000
    with pytest.raises(ReportUnreadable, match=r"lists (1200|2400) files; at most 500"):
        READER.parse(body)


def test_a_list_of_thousands_of_billing_entries_is_ignored() -> None:
    record = {"id": "1", "status": "succeeded", "outputs": [{"url": "u"}], "billing": [{}] * 1_200}
    body = json.dumps(record).encode()
    assert calls_in(lambda: READER.parse(body)) < 1_000
    report = READER.parse(body)
    assert (report.units, len(report.outputs)) == (None, 1)


def test_the_ids_of_a_report_are_read_without_its_files() -> None:
    files = [{"url": f"https://p9-fdl.klingai.com/{number}.png"} for number in range(500)]
    record = {"task_id": "1", "task_status": "succeed", "task_result": {"images": files}, "external_task_id": "mine"}
    body = json.dumps(record).encode()
    assert READER.ids(body) == ("mine", "1")
    assert 2 * calls_in(lambda: READER.ids(body)) < calls_in(lambda: READER.parse(body))
