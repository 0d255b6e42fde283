"""Forms and cookies: those of browsers are read, all others are refused, in time linear in their length."""

from __future__ import annotations

import time

import httpx
import pytest

from receiver.base.forms import MAX_FIELDS, Upload, cookie, parse_form

FORM = "multipart/form-data; boundary=x"


def part(head: str, content: str = "abc") -> bytes:
    return f"--x\r\n{head}\r\n\r\n{content}\r\n--x--\r\n".encode()


@pytest.mark.parametrize("name", ["a.csv", "图 片.png", 'q"uote.png', "per%cent.png", "semi;colon.png", "w" * 255])
def test_fields_and_files_of_a_client_are_read(name: str) -> None:
    files = [("file", (name, b"1\r\n--x2\r\n\r\n", "text/csv")), ("file", ("b", b"", None))]
    fields = {"csrf": "t", "id": ["1", "2"], "text": "two\r\nlines 文"}
    sent = httpx.Request("POST", "http://x", data=fields, files=files)
    pairs, uploads = parse_form(sent.headers["content-type"], sent.read())
    assert pairs == [("csrf", "t"), ("id", "1"), ("id", "2"), ("text", "two\r\nlines 文")]
    assert uploads["file"] == Upload(name.replace('"', "%22"), b"1\r\n--x2\r\n\r\n")
    assert uploads["file-5"] == Upload("b", b"")


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        (FORM, part("Content-Type: text/plain")),
        (FORM, part("Content-Disposition: form-data")),
        (FORM, part('Content-Disposition: form-data; name="a"' + ";" * 1_000)),
        (FORM, part('Content-Disposition: form-data; name="a"').removesuffix(b"--x--\r\n")),
        (FORM, b"--xy" + part('Content-Disposition: form-data; name="a"')[3:]),
        (FORM, b""),
        (FORM, b"--x\r\n" * 9),
        (FORM, b"".join([part('Content-Disposition: form-data; name="a"')[:-7]] * (MAX_FIELDS + 1)) + b"--x--"),
        ("multipart/form-data", part('Content-Disposition: form-data; name="a"')),
        (FORM + ";" * 200, part('Content-Disposition: form-data; name="a"')),
        ("multipart/form-data; boundary=" + "x" * 71, b""),
        ("application/x-www-form-urlencoded", b"a=1&" * (MAX_FIELDS + 1)),
        ("application/x-www-form-urlencoded", b"a=\xff"),
        ("text/plain", b"a=1"),
        ("", b"a=1"),
    ],
)
def test_malformed_forms_are_refused(content_type: str, body: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_form(content_type, body)


def test_as_many_fields_as_allowed_are_read() -> None:
    one = part('Content-Disposition: form-data; name="a"')[:-7]
    pairs, _ = parse_form(FORM, one * MAX_FIELDS + b"--x--")
    assert pairs == [("a", "abc")] * MAX_FIELDS


@pytest.mark.parametrize("hidden", [b";", b'; name="', b"; name=\\", b"\r\n", b"\r\n--x", b"--x\r\n", b":", b" "])
def test_forms_are_read_in_linear_time(hidden: bytes) -> None:
    before = time.process_time()
    for head in (b"", b"--x\r\n", b'--x\r\nContent-Disposition: form-data; name="a"'):
        with pytest.raises(ValueError, match=r"."):
            parse_form(FORM, head + hidden * (1_000_000 // len(hidden)))
    assert time.process_time() - before < 1


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("a=1", "1"),
        ("b=2; a=1", "1"),
        ("b=2;a=1;a=3", "1"),
        (" a = 1 ;b", "1"),
        ('a="1"', '"1"'),
        ("a=b=c", "b=c"),
        ("aa=1; b=a=2; a", ""),
        ("", None),
        ("aa=1; b=a", None),
    ],
)
def test_a_cookie_is_found_by_its_name(header: str, value: str | None) -> None:
    assert cookie(header, "a") == value
