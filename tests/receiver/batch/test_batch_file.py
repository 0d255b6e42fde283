"""A batch's file: the requests it contains, the ids that are made, and every fault with its line number."""

from __future__ import annotations

import csv
import gzip
import json
import time
import zipfile
from dataclasses import replace
from decimal import Decimal
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as some

from receiver.batch import batch_file
from receiver.batch.batch_file import MAX_FAULTS, BatchInvalid, Format, Line
from receiver.providers.base import PricesUnreadable
from receiver.providers.kling.prices import KLING, estimate, read_prices
from receiver.providers.kling.request import OmniImageRequest, parse_request
from tests.unreported_tasks import drawn, encoded

GOOD = {"model_name": "kling-v3-omni", "prompt": "a boat"}
ONE = {**GOOD, "model_name": "kling-image-o1"}
PICTURE = encoded(drawn(300, 300))

# One kind of fault each: (the line, a word of its message).
FAULTS: list[tuple[Any, str]] = [
    (b"a boat", "not JSON"),
    (b'{"model_name": "kling-v3-omni",', "not JSON"),
    (b"[1, 2]", "not a JSON object"),
    (b'{"prompt": "a", "prompt": "b", "model_name": "x"}', "occurs twice"),
    (b'{"n": NaN}', "not a JSON number"),
    (b'{"n": 1e999}', "too large"),
    (b'{"prompt": "\xff"}', "not UTF-8"),
    (b"[" * 200_000, "nested too deeply"),
    ({**GOOD, "promt": "a"}, "is not a field"),
    ({**GOOD, "callback_url": "https://a.example"}, "callback_url"),
    ({"model_name": "kling-v3-omni"}, "prompt: is required"),
    ({"prompt": "a boat"}, "model_name: is required"),
    ({**GOOD, "prompt": " "}, "must not be empty"),
    ({**GOOD, "prompt": "b" * 2_501}, "2501 characters"),
    ({**GOOD, "prompt": "a\0b"}, "NUL"),
    ({**GOOD, "prompt": 7}, "must be text"),
    ({**GOOD, "n": 0}, "1 to 9"),
    ({**GOOD, "n": "two"}, "whole number"),
    ({**GOOD, "result_type": "both"}, "single or series"),
    ({**ONE, "result_type": "series"}, "for this model"),
    ({**ONE, "resolution": "4k"}, "for this model"),
    ({**GOOD, "resolution": "8k"}, "1k or 2k or 4k"),
    ({**GOOD, "aspect_ratio": "5:4"}, "16:9"),
    ({**GOOD, "result_type": "series", "series_amount": 1}, "2 to 9"),
    ({**GOOD, "image_list": [{"image": "no base 64!"}]}, "URL or Base64"),
    ({**GOOD, "image_list": [{"image": encoded(b"no picture at all")}]}, "jpg or png"),
    ({**GOOD, "image_list": [{"image": encoded(drawn(299, 300))}]}, "at least 300"),
    ({**GOOD, "image_list": [{"image": encoded(drawn(900, 300))}]}, "ratio"),
    ({**GOOD, "image_list": [{"image": "https://a.example/b.png"}] * 11}, "at most 10"),
    ({**GOOD, "element_list": [{"element_id": 0}]}, "64-bit id"),
    ({**GOOD, "watermark_info": {"enabled": "yes"}}, "true or false"),
    ({**GOOD, "external_task_id": 12}, "external_task_id"),
    ({**GOOD, "external_task_id": "i" * 201}, "201 bytes"),
    ({**GOOD, "external_task_id": "taken"}, "taken by line 1"),
]


def jsonl(*lines: Any) -> bytes:
    return b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)


def read(content: bytes, format: Format | None = "jsonl", name: str = "night") -> list[Line]:
    return batch_file.read(BytesIO(content), format, name, parse_request)


def faults_in(content: bytes, format: Format | None = "jsonl", name: str = "night") -> list[tuple[int, str]]:
    with pytest.raises(BatchInvalid) as caught:
        read(content, format, name)
    return [(fault.line, fault.text) for fault in caught.value.faults]


def zipped(content: bytes) -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("xl/worksheets/sheet1.xml", content)
    return file.getvalue()


def faulty_file() -> bytes:
    """Every kind of fault, a good line before each."""
    lines: list[Any] = [{**GOOD, "external_task_id": "taken"}]
    for number, (line, _) in enumerate(FAULTS):
        lines += [line, {**GOOD, "prompt": f"good {number}"}]
    return jsonl(*lines)


def test_every_fault_is_listed_with_its_line() -> None:
    found = faults_in(faulty_file())
    assert len(FAULTS) >= 30
    assert [line for line, _ in found] == [2 + 2 * number for number in range(len(FAULTS))]
    assert all(word in text for (_, text), (_, word) in zip(found, FAULTS, strict=True))


@pytest.mark.parametrize(
    ("content", "format"),
    [
        (b"?\n" * 30_000, "jsonl"),
        (b'{"n": 0, "resolution": "?", "seed": 1}\n' * 30_000, "jsonl"),
        (b"model_name,prompt\n" + b"m\n" * 30_000, "csv"),
        (b'model_name,prompt\nm,"' + b"\xff\n" * 30_000, "csv"),
    ],
    ids=["no JSON", "no request", "columns are missing", "not UTF-8 in a cell"],
)
def test_file_is_not_read_on_behind_ten_thousand_faults(content: bytes, format: Format) -> None:
    found = faults_in(content, format)
    assert len(found) < MAX_FAULTS + 10 and found[-1][1] == "the rest of the file is not checked: 10,000 faults"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("model_name,prompt\nm,p\n".encode("utf-16-le"), "is UTF-16"),
        (zipped(b"model_name,prompt\nm,p\n" * 99), "is a workbook or an archive; save the file as UTF-8"),
        (gzip.compress(jsonl(GOOD)), "is compressed; unpack it"),
        (b"model_name,prompt\rm,p\rm,q\r", "CSV (Macintosh)"),
        (jsonl(GOOD, GOOD).replace(b"\n", b"\r"), "CSV (Macintosh)"),
        (json.dumps([GOOD, GOOD], indent=1).encode(), "JSON over several lines; write one request a line"),
        (json.dumps(GOOD, indent=1).encode(), "JSON over several lines; write one request a line"),
    ],
    ids=["UTF-16 without a mark", "workbook", "gzip", "CR", "CR in JSON", "array", "object"],
)
def test_a_file_of_another_format_is_named_in_one_line(content: bytes, named: str) -> None:
    for format in (None, "csv", "jsonl"):
        ((line, text),) = faults_in(content, format)
        assert line == 1 and named in text


def test_cell_of_very_many_images_is_one_fault() -> None:
    ((line, text),) = faults_in(b"model_name,prompt,image\nm,p," + b"a+ " * 60_000, "csv")
    assert line == 2 and text.startswith("image_list: 'more than 100 images'")


def test_a_line_with_two_faults_names_both() -> None:
    assert [line for line, _ in faults_in(jsonl({**GOOD, "n": 0, "aspect_ratio": "5:4"}))] == [1, 1]


def test_blank_lines_count_and_are_skipped() -> None:
    content = b"\xef\xbb\xbf" + jsonl(GOOD) + b"\n  \r\n" + jsonl(ONE).replace(b"\n", b"\r\n")
    assert [line.number for line in read(content)] == [1, 4]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"model_name,prompt\n"], ids=["empty", "blank", "header alone"])
def test_a_file_without_a_request_is_a_fault(content: bytes) -> None:
    assert "no request" in faults_in(content, "csv")[0][1]


@pytest.mark.parametrize("name", ["", "a\nb", "n" * 200, "\ud800"], ids=["empty", "break", "long", "surrogate"])
def test_a_name_that_makes_no_ids_is_a_fault(name: str) -> None:
    assert [line for line, _ in faults_in(jsonl(GOOD), name=name)] == [0]


# -- ids --------------------------------------------------------------------------------------------------------------


def ids(*lines: Any, name: str = "night") -> list[str]:
    return [line.external_task_id for line in read(jsonl(*lines), name=name)]


def test_generated_id_is_name_hash_and_number_among_equal_requests() -> None:
    digest = parse_request(GOOD).canonical_hash()[:16]
    assert ids(GOOD, {**GOOD, "n": 1}) == [f"night-{digest}-1", f"night-{digest}-2"]
    assert ids(GOOD, name="again") == [f"again-{digest}-1"]


def test_an_inserted_line_changes_no_other_id() -> None:
    before, between = [GOOD, ONE, GOOD], {**GOOD, "n": 2}
    assert set(ids(*before)) < set(ids(between, GOOD, ONE, {**between, "n": 3}, GOOD))


def test_external_id_in_the_file_is_used() -> None:
    assert ids({**GOOD, "external_task_id": "mine"}, {**GOOD, "external_task_id": ""})[0] == "mine"


# -- bounds -----------------------------------------------------------------------------------------------------------


def test_a_long_line_is_a_fault_and_the_next_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_file, "MAX_LINE_BYTES", 200)
    found = faults_in(jsonl({**GOOD, "prompt": "b" * 1_000}, {**GOOD, "n": 0}))
    assert [line for line, _ in found] == [1, 2]
    assert "longer than" in found[0][1]


@pytest.mark.parametrize(("bound", "word"), [("MAX_FILE_BYTES", "larger"), ("MAX_RECORDS", "more than")])
def test_a_large_file_is_refused(bound: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_file, bound, 2)
    assert word in faults_in(jsonl(GOOD, ONE, GOOD))[0][1]


# -- CSV --------------------------------------------------------------------------------------------------------------

HEADER = b"model_name,prompt,n,image,element_id,watermark,external_task_id\r\n"


def test_csv_row_makes_the_same_request_as_json() -> None:
    row = b'kling-v3-omni,"a boat,\nand ""sea""",2,https://a.example/1.png https://a.example/2.png,7 8,true,mine\r\n'
    (line,) = read(HEADER + row, "csv")
    assert line.number == 2
    assert line.external_task_id == "mine"
    assert line.request.wire() == {
        "model_name": "kling-v3-omni",
        "prompt": 'a boat,\nand "sea"',
        "n": 2,
        "image_list": [{"image": "https://a.example/1.png"}, {"image": "https://a.example/2.png"}],
        "element_list": [{"element_id": 7}, {"element_id": 8}],
        "watermark_info": {"enabled": True},
    }


def test_empty_cells_are_left_out() -> None:
    (line,) = read(HEADER + b"kling-v3-omni,a boat,,,,,\n", "csv")
    assert line.request == parse_request(GOOD)


def test_faults_in_csv_name_the_line_where_the_record_begins() -> None:
    rows = [
        b'm,"two\nlines",1,,,,',  # lines 2 and 3
        b'kling-v3-omni,"a\nboat",0,,,,',  # lines 4 and 5
        b"kling-v3-omni,a boat,two,,,,",  # line 6
        b"kling-v3-omni,a boat",  # line 7
        b'kling-v3-omni,"a" boat,1,,,,',  # line 8
        b"kling-v3-omni,\xff,1,,,,",  # line 9
        b"",  # line 10
        b"kling-v3-omni,a boat,1,,,yes,",  # line 11
        b"kling-v3-omni,a boat,1,,x,,",  # line 12
        b'kling-v3-omni,"never closed,1,,,,',  # line 13
    ]
    found = faults_in(HEADER + b"\r\n".join(rows), "csv")
    assert [line for line, _ in found] == [4, 6, 7, 8, 9, 11, 12, 13]


QUOTE_IN_LINE_4 = [
    b"kling-v3-omni,a boat,0,,,,",  # line 2
    b'kling-v3-omni,"a',  # line 3
    b'boat",1,,,,"id',  # line 4
    b"kling-v3-omni,a boat,two,,,,",  # line 5
    b"kling-v3-omni,\xff,1,,,,",  # line 6
    b"kling-v3-omni,a boat",  # line 7
]


@pytest.mark.parametrize(
    ("rest", "faulty"),
    [
        ([], [2, 4, 5, 6, 7]),
        ([b'kling-v3-omni,"a boat",1,,,,', b'kling-v3-omni,"a boat",0,,,,'], [2, 4, 5, 6, 7, 9]),
        ([b'kling-v3-omni,"a boat,1,,,,'], [2, 4, 5, 6, 7, 8]),
    ],
    ids=["none after", "quotes after", "another"],
)
def test_an_open_quote_hides_no_other_fault(rest: list[bytes], faulty: list[int]) -> None:
    found = faults_in(HEADER + b"\r\n".join(QUOTE_IN_LINE_4 + rest), "csv")
    assert [line for line, _ in found] == faulty
    assert [line for line, text in found if "opens a quote that is not closed" in text] == [4, 8][: 1 + (8 in faulty)]


def test_an_open_quote_in_the_header_is_reported_as_one_fault() -> None:
    ((line, text),) = faults_in(b'model_name,"prompt\na,b\nc,d\n', "csv")
    assert (line, text.partition(" (")[0]) == (1, "opens a quote that is not closed")


def test_open_quotes_in_every_line_are_read_in_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty thousand lines, each of which would be read to the end of the file to find its closing quote."""
    count = 30_000
    monkeypatch.setattr(batch_file, "MAX_FAULTS", 3 * count)
    started = time.process_time()
    found = faults_in(b"model_name,prompt\n" + b'm,"p\n' * count + b'm,"" p\n' * count, "csv")
    assert len(found) == 2 * count
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (b"model_name,prompt,colour", "colour"),
        (b"model_name,prompt,n,n", "2 times"),
        (b"prompt,n", "'model_name' is missing"),
    ],
    ids=["unknown", "twice", "missing"],
)
def test_a_wrong_header_is_reported_as_one_fault(header: bytes, word: str) -> None:
    ((line, text),) = faults_in(header + b"\na,b\nc,d\n", "csv")
    assert line == 1
    assert word in text


@given(some.binary(max_size=300), some.sampled_from(["jsonl", "csv"]))
@example(b'model_name,prompt\n"', "csv")
@example(b'{"a": ' + b"1" * 5_000 + b"}", "jsonl")
def test_any_bytes_are_read_or_refused(content: bytes, format: Format) -> None:
    try:
        assert all(isinstance(line.request, OmniImageRequest) for line in read(content, format))
    except BatchInvalid as error:
        assert error.faults  # noqa: PT017 - either way is right


# -- prices -----------------------------------------------------------------------------------------------------------


def test_prices_are_those_of_klings_page_with_its_date() -> None:
    asked = [
        {"n": 3},
        {"resolution": "4k"},
        {"result_type": "series", "series_amount": 5, "watermark_info": {"enabled": True}},
    ]
    found = estimate([parse_request({**GOOD, **fields}).wire() for fields in asked], KLING)
    assert (found.tasks, found.pictures, found.units, found.usd) == (3, 9, 3 * 8 + 16 + 5 * 8, Decimal("0.2800"))
    assert (found.auto, found.unpriced, found.date) == (0, 0, "2026-09")


def test_automatic_series_count_as_nine_and_unknown_resolutions_as_unpriced() -> None:
    series = parse_request({**GOOD, "result_type": "series", "series_amount": "auto"})
    unknown = parse_request({**GOOD, "model_name": "kling-v9", "resolution": "9k", "n": 2})
    found = estimate([series.wire(), unknown.wire()], KLING)
    assert (found.auto, found.unpriced, found.units) == (1, 2, 72)
    assert (found.as_dict()["units"], found.as_dict()["usd"], found.as_dict()["pictures"]) == (None, None, 11)


def test_prices_of_kling_are_for_the_known_models_and_those_of_a_file_for_all() -> None:
    unknown = parse_request({**GOOD, "model_name": "kling-v9", "n": 3})
    found = estimate([unknown.wire()], KLING)
    assert (found.pictures, found.unpriced, found.units) == (3, 3, 0)
    found = estimate([unknown.wire()], replace(KLING, models=None))
    assert (found.pictures, found.unpriced, found.units) == (3, 0, 24)


def test_a_price_table_is_read(tmp_path: Path) -> None:
    file = tmp_path / "prices.json"
    file.write_text('{"date": "2027-01", "usd_per_unit": "0.5", "units_per_picture": {"1k": 2}}')
    assert estimate([parse_request(GOOD).wire()], read_prices(file)).usd == 1


@pytest.mark.parametrize(
    "text", ["", "[]", '{"date": 1}', '{"date": "x", "usd_per_unit": "-1", "units_per_picture": {}}']
)
def test_invalid_price_table_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "prices.json").write_text(text)
    with pytest.raises(PricesUnreadable):
        read_prices(tmp_path / "prices.json")


TABLE = [["model-name", "prompt", "n"], ["kling-v3-omni", "a boat, at sea; by night", "2"], ["kling-v3-omni", "b", ""]]


def table(separator: str, *, first: str = "", columns: list[list[str]] | None = None) -> bytes:
    out = StringIO()
    csv.writer(out, delimiter=separator).writerows(columns or TABLE)
    return f"{first}{out.getvalue()}".encode("utf-8-sig")


@pytest.mark.parametrize("format", ["csv", None])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("directive", [False, True])
def test_the_header_proves_the_separator(separator: str, directive: bool, format: Format | None) -> None:
    first = f"sep={separator}\r\n" if directive else "\r\n"
    lines = batch_file.read(BytesIO(table(separator, first=first)), format, "night", parse_request)
    plain = batch_file.read(BytesIO(table(",")), "csv", "night", parse_request)
    assert [line.external_task_id for line in lines] == [line.external_task_id for line in plain]
    assert [line.number for line in lines] == [3, 4]


def test_semicolons_keep_a_fault_at_its_line() -> None:
    broken = table(";") + b'kling-v3-omni;"open;1\r\n' + b"kling-v3-omni;c;x\r\n"
    with pytest.raises(BatchInvalid) as caught:
        batch_file.read(BytesIO(broken), None, "night", parse_request)
    assert [(fault.line, fault.text.split(" ")[0]) for fault in caught.value.faults] == [(4, "opens"), (5, "n:")]


def test_a_header_that_proves_nothing_is_read_with_commas() -> None:
    with pytest.raises(BatchInvalid, match="'a;b' is not known"):
        batch_file.read(BytesIO(b"a;b\nx;y\n"), "csv", "night", parse_request)


@pytest.mark.parametrize("format", ["csv", None], ids=["csv", "no format"])
@pytest.mark.parametrize(
    ("header", "fault"),
    [("model_name;prompt;colour", "column 'colour' is not known"), ("prompt;n", "column 'model_name' is missing")],
)
def test_fault_of_a_header_names_its_columns(header: str, fault: str, format: Format | None) -> None:
    with pytest.raises(BatchInvalid) as caught:
        batch_file.read(BytesIO(f"{header}\nx;y;z\n".encode()), format, "night", parse_request)
    (found,) = caught.value.faults
    assert found.text.startswith(fault)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_file_in_utf_16_is_reported_as_one_fault(encoding: str) -> None:
    with pytest.raises(BatchInvalid) as caught:
        batch_file.read(BytesIO(("\ufeff" + table("\t").decode()).encode(encoding)), None, "night", parse_request)
    (found,) = caught.value.faults
    assert "UTF-16" in found.text and "UTF-8" in found.text


def test_json_lines_are_read_whatever_the_file_is_called() -> None:
    (line,) = batch_file.read(BytesIO(json.dumps(GOOD).encode()), None, "night", parse_request)
    assert line.request.wire()["prompt"] == "a boat"
