"""A batch's file, JSON lines or CSV, read and checked whole. Every fault names the line that an editor shows.

bytes ─▶ records (line, fields) ─▶ requests ─▶ external ids ─▶ Lines, or `BatchInvalid` with the faults
"""

from __future__ import annotations

import csv
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, BinaryIO, Literal, NamedTuple

from receiver.providers.base import ProviderRequest, RequestInvalid, is_storable, plain
from storage.keys import MAX_ID_BYTES, check_new_id, encode_id

Format = Literal["jsonl", "csv"]
NumberedLines = Iterator[tuple[int, str | None]]

# Room for a few pictures in Base64. The whole file is held in memory, so more pictures belong behind URLs.
MAX_LINE_BYTES = 32 * 2**20
MAX_FILE_BYTES = 256 * 2**20
# The queue of this many rows is searched whenever a slot is free. At twenty slots they are a week of pictures.
MAX_RECORDS = 100_000
# Behind so many faults a file is not read on: each takes some hundred bytes.
MAX_FAULTS = 10_000
# Values of one CSV cell that are told apart. No request takes so many.
MAX_VALUES = 1_000
HASH_CHARS = 16
# Columns of a CSV file that are no fields of the request. Several values are separated by spaces.
IMAGES, ELEMENTS, WATERMARK, ID = "image", "element_id", "watermark", "external_task_id"
PLAIN = ("model_name", "prompt", "resolution", "n", "result_type", "series_amount", "aspect_ratio")
# Spreadsheets write `;` where the comma is the decimal sign, and tabs for pasting.
SEPARATORS = (",", ";", "\t")
# A complete CSV cell with the separator behind it, and a quote that is not closed on its own line.
CLOSED_CELL = {each: re.compile(rf'(?:"(?:[^"]++|"")*+"|(?!")[^{each}\r\n]*+){each}') for each in SEPARATORS}
# Excel reads and writes this first line to name the separator.
SEPARATOR_LINE = re.compile(r'"?sep=([,;\t])"?\s*')
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
OPEN_QUOTE = re.compile(r'"(?:[^"\r\n]++|"")*+(?!")')
COLUMNS = (*PLAIN, IMAGES, ELEMENTS, WATERMARK, ID)


class Fault(NamedTuple):
    """`line`: from 1, where the record or the fault begins. 0: the file as a whole."""

    line: int
    text: str


class BatchInvalid(ValueError):
    """The file cannot be submitted. `faults`: in the order of the lines, some MAX_FAULTS at most.

    `inserted`: lines that have a row all the same, because another process took an id behind them meanwhile.
    """

    def __init__(self, faults: Iterable[Fault], *, inserted: int = 0) -> None:
        self.faults = sorted(faults, key=lambda fault: fault.line)
        self.inserted = inserted
        super().__init__("\n".join(f"line {line}: {text}" if line else text for line, text in self.faults))


@dataclass(frozen=True)
class Line:
    """One request of the file with its permanent external id."""

    number: int
    external_task_id: str
    request: ProviderRequest
    request_hash: str

    @property
    def has_made_id(self) -> bool:
        """Whether the id itself says which request it is for."""
        return f"-{self.request_hash[:HASH_CHARS]}-" in self.external_task_id


class Record(NamedTuple):
    line: int
    fields: dict[str, Any]


Check = Callable[[Mapping[str, Any]], ProviderRequest]


def read(file: BinaryIO, format: Format | None, name: str, check: Check) -> list[Line]:
    """Read and check a whole file. `name`: the batch's. `check` parses a line's fields or raises `RequestInvalid`.

    `format`: None = CSV if the first line is a CSV header, else JSON lines.

    The id of a line without an external id consists of `name`, the first 16 hex digits of the hash of its request, and
    its number among equal requests. It is the same in every run, wherever the line stands. Raises `BatchInvalid`.
    """
    faults = list(name_faults(name))
    lines, separator = _separated(_lines(file, faults))
    is_csv = format == "csv" or (format is None and separator is not None)
    records = _csv_records(lines, separator or ",", faults) if is_csv else _json_records(lines, faults)
    found: list[Line] = []
    equal: Counter[str] = Counter()
    count = 0
    for record in records:
        count += 1
        if count > MAX_RECORDS:
            faults.append(Fault(record.line, f"the file has more than {MAX_RECORDS:,} requests; split it"))
            break
        line = _line(record, name, equal, check, faults)
        found += [line] if line else []
    faults += _twins(found)
    if len(faults) >= MAX_FAULTS:
        faults.append(
            Fault(max(fault.line for fault in faults), f"the rest of the file is not checked: {MAX_FAULTS:,} faults")
        )
    if not count and not faults:
        faults.append(Fault(0, "the file holds no request"))
    if faults:
        raise BatchInvalid(faults)
    return found


def composed(name: str) -> str:
    """The name with each accent in its letter (NFC), as it is typed everywhere."""
    return unicodedata.normalize("NFC", name)


def name_faults(name: str) -> Iterator[Fault]:
    """What is wrong with the name of a batch."""
    longest = f"{name}-{'0' * HASH_CHARS}-{MAX_RECORDS}"
    if not name.strip():
        yield Fault(0, "the batch has no name: give it one")
        return
    if not is_storable(name) or not name.isprintable():
        yield Fault(0, f"the batch's name {plain(name, 60)!r} must be printable text")
        return
    try:
        encode_id(longest)
    except ValueError:
        yield Fault(0, f"the batch's name is too long: ids made from it pass {MAX_ID_BYTES} bytes")


def _lines(file: BinaryIO, faults: list[Fault]) -> NumberedLines:
    """(number, text) of every line, numbered as editors do. `text` is None for a line that cannot be read."""
    size, number = 0, 0
    while len(faults) < MAX_FAULTS and (line := file.readline(MAX_LINE_BYTES + 1)):
        size, number = size + len(line), number + 1
        if number == 1 and (other := _other_format(line)):
            faults.append(Fault(1, other))
            return
        if size > MAX_FILE_BYTES:
            faults.append(Fault(number, f"the file is larger than {MAX_FILE_BYTES // 2**20} MiB; split it"))
            return
        if len(line) > MAX_LINE_BYTES:
            faults.append(Fault(number, f"is longer than {MAX_LINE_BYTES // 2**20} MiB; give large pictures as URLs"))
            while not line.endswith(b"\n") and (line := file.readline(MAX_LINE_BYTES)):
                pass
            yield number, None
            continue
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            faults.append(Fault(number, f'is not UTF-8 (byte {error.start + 1}); save the file as UTF-8 ("CSV UTF-8")'))
            yield number, None


def _other_format(line: bytes) -> str | None:
    """What a file with this first line is, and what to do; None if it may be one of ours."""
    as_utf_8 = 'save the file as UTF-8 ("CSV UTF-8")'
    if line.startswith(b"PK\x03\x04"):
        return f"is a workbook or an archive; {as_utf_8}"
    if line.startswith(b"\x1f\x8b"):
        return "is compressed; unpack it, or pipe it: `zcat FILE | receiver submit --batch - --name NAME`"
    if line.startswith(UTF_16) or b"\0" in line[:100]:
        return f'is UTF-16, as Excel\'s "Unicode Text" is, or no text; {as_utf_8}'
    if b"\r" in line.strip(b"\r\n"):
        return f'its lines end as those of Excel\'s "CSV (Macintosh)"; {as_utf_8}'
    return "is JSON over several lines; write one request a line, {…}" if line.strip() in (b"[", b"{") else None


def _separated(lines: NumberedLines) -> tuple[NumberedLines, str | None]:
    """The lines from the first non-empty one on, and the header's separator. None if the first line is no header."""
    separator = None
    for number, line in lines:
        text = line or ""
        if separator is None and (directive := SEPARATOR_LINE.fullmatch(text)):
            separator = directive[1]
        elif line is None or text.strip():
            proven = next((each for each in SEPARATORS if _is_proven(text, each)), None)
            return chain([(number, line)], lines), separator or proven
    return iter(()), separator


def _is_proven(text: str, separator: str) -> bool:
    """Whether the line names several columns, a required one among them. Later checks report the rest of its faults."""
    try:
        names = [_column(cell) for cell in next(csv.reader([text], delimiter=separator))]
    except csv.Error:
        return False
    return len(names) > 1 and not {"model_name", "prompt"}.isdisjoint(names)


def _column(cell: str) -> str:
    return cell.strip().replace("-", "_").lower()


# -- JSON lines -------------------------------------------------------------------------------------------------------


def _json_records(lines: NumberedLines, faults: list[Fault]) -> Iterator[Record]:
    for number, text in lines:
        if text is None or not text.strip():
            continue
        try:
            fields = json.loads(text, object_pairs_hook=_no_twins, parse_constant=_no_constant, parse_float=_finite)
        except json.JSONDecodeError as error:
            faults.append(Fault(number, f"is not JSON: {error.msg} (column {error.colno})"))
        except RecursionError:
            faults.append(Fault(number, "is nested too deeply"))
        except ValueError as error:
            faults.append(Fault(number, plain(str(error), 200)))
        else:
            if isinstance(fields, dict):
                yield Record(number, fields)
            else:
                faults.append(Fault(number, "is not a JSON object: write one request a line, {…}"))


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = next((name for name, count in Counter(name for name, _ in pairs).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{plain(twice, 60)}: occurs twice")
    return dict(pairs)


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{plain(text, 40)} is too large")
    return number


# -- CSV --------------------------------------------------------------------------------------------------------------


class _Source:
    """The lines for a `csv.reader`. Those of the current record can be given back."""

    def __init__(self, lines: NumberedLines, separator: str) -> None:
        self._lines = lines
        self._closed_cell = CLOSED_CELL[separator]
        self._again: list[tuple[int, str | None]] = []  # lines given back; the next one is last
        self._record: list[tuple[int, str | None]] = []

    def __iter__(self) -> _Source:
        return self

    def __next__(self) -> str:
        line = self._again.pop() if self._again else next(self._lines)
        self._record.append(line)
        return "\n" if line[1] is None else line[1]

    def begin(self) -> None:
        """Begin a record at the next line."""
        self._record.clear()

    @property
    def first(self) -> int:
        """The number of the record's first line."""
        return self._record[0][0]

    @property
    def is_unread(self) -> bool:
        """Whether a line of the record could not be read. It is reported as a fault already."""
        return any(text is None for _, text in self._record)

    def give_back_behind_quote(self) -> tuple[int, bool]:
        """Give back the lines of a faulty record behind the line with the fault.

        Returns that line's number and whether it opens a quote that it does not close. A line comes back at most twice:
        a quote stays open over lines that hold no quotes or pairs of them, and none of those opens another.
        """
        text = "".join(text or "\n" for _, text in self._record)
        end = 0
        while cell := self._closed_cell.match(text, end):
            end = cell.end()
        place = text.count("\n", 0, end)
        self._again += reversed(self._record[place + 1 :])
        return self._record[place][0], bool(OPEN_QUOTE.match(text, end))


def _csv_records(lines: NumberedLines, separator: str, faults: list[Fault]) -> Iterator[Record]:
    """Records of a file whose first line names the columns. A record's line is where it begins."""
    csv.field_size_limit(MAX_LINE_BYTES)
    source = _Source(lines, separator)
    reader = csv.reader(source, strict=True, delimiter=separator)
    header: list[str] | None = None
    while len(faults) < MAX_FAULTS:
        source.begin()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            number, is_open = source.give_back_behind_quote()
            words = f"opens a quote that is not closed ({error})" if is_open else f"is not CSV: {error}"
            faults.append(Fault(number, words))
            if header is None:
                return
            continue
        if source.is_unread or not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = [_column(cell) for cell in cells]
            if not _is_header(header, source.first, faults):
                return
        elif len(cells) != len(header):
            faults.append(Fault(source.first, f"has {len(cells)} columns; the header names {len(header)}"))
        else:
            yield Record(source.first, _fields(dict(zip(header, cells, strict=True))))


def _is_header(header: list[str], line: int, faults: list[Fault]) -> bool:
    before = len(faults)
    for name, count in Counter(header).items():
        if name not in COLUMNS:
            faults.append(Fault(line, f"column {plain(name, 60)!r} is not known; columns are {', '.join(COLUMNS)}"))
        elif count > 1:
            faults.append(Fault(line, f"column {name!r} occurs {count} times"))
    faults += [Fault(line, f"column {name!r} is missing") for name in ("model_name", "prompt") if name not in header]
    return len(faults) == before


def _fields(cells: dict[str, str]) -> dict[str, Any]:
    """A row as a request's fields, without empty cells."""
    given = {name: value for name, value in cells.items() if value.strip()}
    fields: dict[str, Any] = {name: given[name] for name in (*PLAIN, ID) if name in given}
    if re.fullmatch("[0-9]{1,9}", fields.get("n", "")):
        fields["n"] = int(fields["n"])
    if IMAGES in given:
        fields["image_list"] = [{"image": one} for one in given[IMAGES].split(maxsplit=MAX_VALUES)]
    if ELEMENTS in given:
        fields["element_list"] = [{"element_id": one} for one in given[ELEMENTS].split(maxsplit=MAX_VALUES)]
    if WATERMARK in given:
        word = given[WATERMARK].strip().lower()
        fields["watermark_info"] = {"enabled": {"true": True, "false": False}.get(word, given[WATERMARK])}
    return fields


# -- requests and their ids -------------------------------------------------------------------------------------------


def _line(
    record: Record,
    name: str,
    equal: Counter[str],
    check: Check,
    faults: list[Fault],
) -> Line | None:
    own_id = record.fields.pop(ID, None) or None
    wrong = _id_fault(own_id) if own_id is not None else None
    if wrong:
        faults.append(Fault(record.line, wrong))
    try:
        request = check(record.fields)
    except RequestInvalid as error:
        faults += [Fault(record.line, text) for text in error.faults]
        return None
    digest = request.canonical_hash()
    return None if wrong else Line(record.line, own_id or made_id(name, digest, equal), request, digest)


def made_id(name: str, digest: str, equal: Counter[str]) -> str:
    """The external id of the next request with this hash. `equal`: how many there were of each hash; it is counted."""
    equal[digest] += 1
    return f"{name}-{digest[:HASH_CHARS]}-{equal[digest]}"


def _id_fault(external_task_id: Any) -> str | None:
    if not isinstance(external_task_id, str) or not is_storable(external_task_id):
        return "external_task_id: must be text"
    try:
        check_new_id(external_task_id)
    except ValueError as error:
        return str(error)
    return None


def _twins(lines: list[Line]) -> Iterator[Fault]:
    first: dict[str, int] = {}
    for line in lines:
        before = first.setdefault(line.external_task_id, line.number)
        if before != line.number:
            shown = plain(line.external_task_id, 80)
            yield Fault(line.number, f"external_task_id: {shown!r} is taken by line {before}")
