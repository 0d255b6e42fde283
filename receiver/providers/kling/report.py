"""Parses Kling's bodies into Reports: both shapes, bare or wrapped, complete or not.

An unusable value counts as missing. A body without a task record raises `ReportUnreadable`, and nothing else is raised.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from urllib.parse import parse_qs, urlsplit

from receiver.providers.base import Record, is_storable, plain
from storage.errors import ReportUnreadable
from storage.states import MAX_INDEX, Output, OutputType, Report, TaskState

MAX_ID_CHARS = 200
MAX_URL_CHARS = 16_384  # observed: about 1 kB
# The most entries in all lists of files of a record, and in its billing. A request has at most nine pictures, 18 with
# watermark. Entries are counted before they are mapped: 64 KiB have room for 32,000 of them.
MAX_ENTRIES = 500
# Brackets, commas and colons of a body, those inside texts included. 500 entries have some 7,000. They are counted
# before the parser runs: in 60 kB, 20,000 empty lists took it 19 ms, and 30,000 numbers 4.
MAX_TOKENS = 10_000
STRUCTURE = (b"{", b"[", b",", b":")
# The lists of files in the old shape. The new one has a single list, of entries with a type.
OLD_LISTS = ("images", "series_images", "videos", "audios")
Entries = list[Mapping[str, Any]]
STATES = {
    "submitted": TaskState.SUBMITTED,
    "processing": TaskState.PROCESSING,
    "succeed": TaskState.SUCCEEDED,
    "succeeded": TaskState.SUCCEEDED,
    "failed": TaskState.FAILED,
    # Status words of other providers, which gateways pass on. An unknown word causes one read.
    "pending": TaskState.SUBMITTED,
    "queued": TaskState.SUBMITTED,
    "running": TaskState.PROCESSING,
    "in_progress": TaskState.PROCESSING,
    "success": TaskState.SUCCEEDED,
    "successful": TaskState.SUCCEEDED,
    "complete": TaskState.SUCCEEDED,
    "completed": TaskState.SUCCEEDED,
    "done": TaskState.SUCCEEDED,
    "fail": TaskState.FAILED,
    "failure": TaskState.FAILED,
    "error": TaskState.FAILED,
    "cancelled": TaskState.FAILED,
    "canceled": TaskState.FAILED,
}

# Signed URLs give their expiry in Unix seconds, decimal (observed) or hexadecimal (third). Other numbers are no times.
EXPIRY_PARAMETERS = (("Expires", re.compile("[0-9]{8,10}"), 10), ("ksTime", re.compile("[0-9a-fA-F]{8,10}"), 16))
EXPIRY_RANGE = (1_577_836_800, 4_102_444_800)  # 2020-01-01 .. 2100-01-01
# The first bytes of a gzip file. No provider is known to compress callbacks.
GZIP = b"\x1f\x8b"
_DECODER = json.JSONDecoder(
    parse_int=lambda digits: int(digits) if len(digits) <= 20 else None,
    parse_float=lambda digits: number if math.isfinite(number := float(digits)) else None,
    parse_constant=lambda _word: None,
)


def loads(body: bytes) -> Any:
    """Parse JSON. Numbers that no column holds become null."""
    return _DECODER.decode(body.decode("utf-8-sig"))


def find_record(document: Any, depth: int = 0) -> dict[str, Any] | None:
    """The task record in a body, bare or wrapped in `{code, data: …}`. The innermost one counts."""
    if isinstance(document, list) and len(document) == 1:
        document = document[0]
    if not isinstance(document, dict):
        return None
    inner = find_record(document.get("data"), depth + 1) if depth < 3 else None
    is_record = "task_id" in document or "task_status" in document or ("id" in document and "status" in document)
    return inner or (document if is_record else None)


def record_in(body: bytes) -> dict[str, Any]:
    """The task record in a callback or a `Record.body`."""
    if sum(body.count(token) for token in STRUCTURE) > MAX_TOKENS:
        raise ReportUnreadable(f"more than {MAX_TOKENS} brackets, commas and colons")
    try:
        record = find_record(loads(body))
    except (ValueError, RecursionError) as error:
        if body.startswith(GZIP):
            raise ReportUnreadable("compressed with gzip, which is not undone") from None
        raise ReportUnreadable(f"not readable as JSON ({type(error).__name__})") from None
    if record is None:
        raise ReportUnreadable("no task in it: neither task_id nor id with a status")
    return record


def read_record(record: dict[str, Any]) -> Record:
    try:
        body = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    except RecursionError:
        raise ReportUnreadable("nested too deeply") from None
    return Record(body, read_report(record))


def read_ids(record: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The external id and the provider's own, of what `read_report` can read. It maps no list."""
    if not status_word(record):
        raise ReportUnreadable("the task has no status")
    result = _object(record.get("task_result"))
    lists = [*map(result.get, OLD_LISTS), record.get("outputs")]
    if (count := sum(len(items) for items in lists if isinstance(items, list))) > MAX_ENTRIES:
        raise ReportUnreadable(f"lists {count} files; at most {MAX_ENTRIES}")
    info = _object(record.get("task_info"))
    externals = (info.get("external_task_id"), record.get("external_task_id"), record.get("external_id"))
    return next(filter(None, map(usable_id, externals)), None), usable_id(task_id_in(record))


def read_report(record: Mapping[str, Any]) -> Report:
    """The record of either shape as a Report. An unusable value counts as missing."""
    external_task_id, provider_task_id = read_ids(record)
    word = status_word(record)
    result = _object(record.get("task_result"))
    images, series_images, videos, sounds = (_entries(result.get(name)) for name in OLD_LISTS)
    outputs = _outputs([*images, *series_images], videos, sounds) or _new_outputs(record.get("outputs"))
    messages = (record.get("task_status_msg"), record.get("message"))
    kind = result.get("result_type")
    is_series = True if result.get("series_images") and not result.get("images") else None
    return Report(
        provider_task_id=provider_task_id,
        external_task_id=external_task_id,
        status=STATES.get(word.lower()),
        raw_status=plain(word, 100),
        message=next(filter(None, (plain(value, 1_000) for value in messages if isinstance(value, str))), ""),
        outputs=tuple(outputs),
        series=kind == "series" if kind in ("series", "single") else is_series,
        created_ms=_milliseconds(record.get("created_at", record.get("create_time"))),
        updated_ms=_milliseconds(record.get("updated_at", record.get("update_time"))),
        units=_units(record),
    )


def task_id_in(record: Mapping[str, Any]) -> Any:
    return record.get("task_id", record.get("id"))


def status_word(record: Mapping[str, Any]) -> str:
    word = record.get("task_status", record.get("status"))
    return word.strip() if isinstance(word, str) else ""


def _new_outputs(items: Any) -> list[Output]:
    by_type: dict[Any, Entries] = {"image": [], "video": [], "audio": []}
    for entry in _entries(items):
        word = entry.get("type", "image")
        if isinstance(word, str) and word in by_type:
            by_type[word].append(entry)
    return _outputs(*by_type.values())


def _outputs(images: Entries, videos: Entries, sounds: Entries) -> list[Output]:
    return [*_pictures(images, "image"), *_pictures(videos, "video"), *_sounds(sounds)]


def _pictures(entries: Entries, kind: OutputType) -> list[Output]:
    """The usable pictures. The reported indexes count if all are present and distinct, else the places in the list.

    So the old shape (indexed) and the new one (a plain list) give the same picture the same name, and an entry that is
    left out renames no other.
    """
    urls = [(_url(entry.get("url")), _url(entry.get("watermark_url"))) for entry in entries]
    places = [place for place, each in enumerate(urls) if any(each)]
    reported = [whole(entries[place].get("index")) for place in places]
    given = [index for index in reported if index is not None and 0 <= index <= MAX_INDEX]
    indexes = given if len(set(given)) == len(places) else places
    return [Output(kind, urls[place][0], index, urls[place][1]) for place, index in zip(places, indexes, strict=True)]


def _sounds(entries: Entries) -> list[Output]:
    """Each entry has up to two files (mp3, wav) and two indexes, so a file that comes later renames none."""
    sounds = []
    for place, fields in enumerate(entries):
        urls = (_url(fields.get("url_mp3")) or _url(fields.get("url")), _url(fields.get("url_wav")))
        sounds += [Output("audio", url, 2 * place + step) for step, url in enumerate(urls) if url]
    return sounds


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _entries(value: Any) -> Entries:
    return [*map(_object, value)] if isinstance(value, list) and len(value) <= MAX_ENTRIES else []


def usable_id(value: Any) -> str | None:
    """An id as text; None if the value is no id or too long for a column."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    usable = isinstance(text, str) and 0 < len(text) <= MAX_ID_CHARS and is_storable(text)
    return text if usable else None


def _url(value: Any) -> str | None:
    """A URL byte for byte, because its query is part of a signature."""
    usable = isinstance(value, str) and value.strip() and len(value) <= MAX_URL_CHARS and is_storable(value)
    return value if usable else None


def whole(value: Any) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _milliseconds(value: Any) -> int | None:
    """Milliseconds since 1970 between 2001 and 5138. Anything else, seconds included, counts as missing."""
    number = int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{13,14}", value) else whole(value)
    return number if number is not None and 10**12 <= number < 10**14 else None


def _units(record: Mapping[str, Any]) -> str | None:
    """The cost of the task: the old shape's field, or the sum of the new shape's unit charges."""
    if _amount(record.get("final_unit_deduction")) is not None:
        return str(record["final_unit_deduction"])
    charges = [bill.get("amount") for bill in _entries(record.get("billing")) if bill.get("charge_type") == "unit"]
    known = [amount for amount in map(_amount, charges) if amount is not None]
    return str(sum(known)) if known else None


def _amount(value: Any) -> Decimal | None:
    text = str(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else ""
    return Decimal(text) if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,6})?", text) else None


def url_expiry(url: str) -> datetime | None:
    """When a signed URL expires; None if the URL does not contain it."""
    try:
        query = parse_qs(urlsplit(url).query, max_num_fields=100)
    except ValueError:
        return None
    for name, digits, base in EXPIRY_PARAMETERS:
        for value in query.get(name, ()):
            if digits.fullmatch(value) and EXPIRY_RANGE[0] <= int(value, base) <= EXPIRY_RANGE[1]:
                return datetime.fromtimestamp(int(value, base), UTC)
    return None
