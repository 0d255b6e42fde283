"""Settings that hold a URL: a password that is not percent-encoded is refused, and no part of it is shown."""

from __future__ import annotations

import pytest
from sqlalchemy import make_url

from receiver.base.config import SettingsInvalid, load
from storage.egress import EgressProxy

REFUSED = [
    *(("egress_proxy", f"http://user:{password}@proxy:3128") for password in (
        "hunter/2", "hunter#2", "123#hunter", "123/hunter", "123?hunter", "hunter%2", "hunter@2",
        "hunter\N{ACCOUNT OF}2",
    )),
    ("egress_proxy", "http://proxy:3128?hunter"),
    ("egress_proxy", "http://proxy:3128#hunter"),
    ("database_url", "postgresql://user:12@hunter@host/name"),
    ("database_url", "postgresql://user:12@ho/hunter@host/name"),
    ("database_url", "postgresql://user:12@ho?hunter=1@host/name"),
    ("database_direct_url", "postgresql://user:12@hunter@host/name"),
    *((name, f"https://user:{password}@host") for password in ("hunter/2", "123/hunter", "123#hunter") for name in (
        "public_url", "kling_base_url", "s3_endpoint_url", "s3_public_endpoint_url", "cors_origins",
    )),
    ("event_sinks", "https://user:hunter/2@host/hook"),
    ("event_sinks", "https://user:hunter#2@host/hook"),
    ("event_sinks", "https://user:443#hunter@host/hook"),
    ("event_sinks", "sqs+https://user:hunter/2@host/queue"),
    ("event_sinks", "sqs+https://user:12/hunter@host/queue"),
    ("event_sinks", "file://user:hunter/2@host/events"),
    ("private_event_hosts", "http://user:hunter/2@host"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "url"), REFUSED, ids=[f"{name}{number}" for number, (name, _) in enumerate(REFUSED)])
def test_password_that_cuts_a_url_in_two_is_refused_and_not_shown(name: str, url: str) -> None:
    with pytest.raises(SettingsInvalid, match=f"^RECEIVER_{name.upper()}: ") as refused:
        load(s3_bucket="pictures", event_secrets="whsec_" + "a" * 44, **{"callback_secrets": "s" * 40, name: url})
    assert "hunter" not in str(refused.value) and "123" not in str(refused.value)


def test_refusal_says_to_percent_encode() -> None:
    for given in ({"egress_proxy": "http://us:12/3@proxy:3128"}, {"database_url": "postgresql://us:1@2@host/name"}):
        with pytest.raises(SettingsInvalid, match=r"percent-encode special characters .*%2F for /"):
            load(s3_bucket="pictures", **given)


def test_percent_encoded_password_is_decoded() -> None:
    proxy = EgressProxy("http://user:hunter%2F2%23%40@proxy:3128/")
    assert proxy.place == "proxy:3128" and b"Basic dXNlcjpodW50ZXIvMiNA" in proxy._request("host", 443)
    given = load(s3_bucket="pictures", database_url="postgresql://user%40azure:h%2F2%23%40@host/name?sslmode=require")
    assert make_url(given.database_url.get_secret_value()).password == "h/2#@"


@pytest.mark.parametrize("written", ["{}\n", "{}\r\n", " {} "])
@pytest.mark.parametrize("name", ["database_url", "database_direct_url"])
def test_line_end_and_blanks_around_a_postgresql_url_are_removed(name: str, written: str) -> None:
    url = "postgresql://user:hunter2@host/name?sslmode=require"
    given = load(s3_bucket="pictures", **{"database_url": url, name: written.format(url)})
    assert getattr(given, name).get_secret_value() == url
