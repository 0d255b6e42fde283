"""Values that no setting of their kind can use are refused at the start, whichever variable has them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from receiver.base.config import Settings, SettingsInvalid, load

QUOTED = ('"{}"', "'{}'", '"{}" ', '""')

HOST_FAULTS = {
    "https://a.example": "an entry has a scheme", "a.example/b": "an entry has a path",
    "user@a.example": "an entry has a user", "a.*.example": "an entry has a wildcard",
    "a b": "an entry is no host name or address",
}  # fmt: skip
HOST_LISTS = ("private_result_hosts", "private_event_hosts", "private_callback_hosts")
SECONDS = ("poll_after_seconds", "poll_max_seconds", "result_lifetime_seconds", "lease_seconds", "grace_seconds")
HEADERS = ("s3_cache_control", "s3_storage_class", "s3_kms_key_id")
URLS = ("public_url", "kling_base_url", "s3_endpoint_url", "s3_public_endpoint_url", "egress_proxy")

REFUSED = [
    *(("result_hosts", f"b.example,{host}", fault) for host, fault in HOST_FAULTS.items()),
    ("result_hosts", "a.example:8443", "an entry has a port"),
    ("result_hosts", "[2001:db8::1]:8443", "an entry has a port"),
    *((name, f"{host}:8443", fault) for name in HOST_LISTS for host, fault in HOST_FAULTS.items()),
    ("private_result_hosts", "a.example:\N{SUPERSCRIPT TWO}", "write HOST:PORT"),
    *((name, value, "input should be") for name in (*SECONDS, "audit_days") for value in ("inf", "nan", "1e12")),
    *(("event_retry_seconds", f"1,{value}", "input should be") for value in ("inf", "nan")),
    *((name, value, "is sent as a header") for name in HEADERS for value in ("a\nb", "\N{EURO SIGN}", "\t", " ")),
    *((name, "a=b\nc", "holds a control character") for name in ("s3_prefix", "s3_tags")),
    *((name, "http://a b:80", "holds a blank or a control character") for name in URLS),
    *((name, "http://a\nb:80", "holds a blank or a control character") for name in URLS),
    *(("metrics_token", value, "write printable ASCII") for value in (" ", "a b", "a\nb", "\N{EURO SIGN}")),
    *(("s3_bucket", value, "write the bucket's name alone") for value in ("s3://b", "b/c", " b", "a b")),
    ("database_url", "sqlite:///a?b.db", "an SQLite URL takes no options: write a ? that is part of the file's name"),
    ("cors_origins", "https://", "an entry is no host name"),
    ("cors_origins", "https://a b", "an entry is no host name"),
    ("callback_secrets", "\udcff" + "s" * 40, "is not UTF-8 text"),
    ("s3_prefix", "\udcff", "is not UTF-8 text"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "fault"), REFUSED)
def test_value_that_cannot_work_is_refused_and_not_shown(name: str, value: str, fault: str) -> None:
    with pytest.raises(SettingsInvalid) as refused:
        load(**{"s3_bucket": "pictures", "callback_secrets": "s" * 40, name: value})
    assert str(refused.value).splitlines()[0].startswith(f"RECEIVER_{name.upper()}: {fault}")
    assert "a.example" not in str(refused.value) and "8443" not in str(refused.value)


@pytest.mark.parametrize("is_file", [False, True], ids=["variable", "file"])
def test_value_in_quotes_is_refused_for_every_setting(
    is_file: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    every_kind = [("s3_bucket", quoted) for quoted in QUOTED]
    for name, quoted in [*every_kind, *zip(Settings.model_fields, itertools.cycle(QUOTED), strict=False)]:
        value, variable = quoted.format("hunter2"), f"RECEIVER_{name.upper()}"
        (tmp_path / "value").write_text(value + "\n")
        with monkeypatch.context() as environment:
            if name != "s3_bucket":
                environment.setenv("RECEIVER_S3_BUCKET", "pictures")
            environment.setenv(*((f"{variable}_FILE", str(tmp_path / "value")) if is_file else (variable, value)))
            with pytest.raises(SettingsInvalid, match=f"^{variable}: is in quotes, .*; remove them") as refused:
                load()
        assert "hunter2" not in str(refused.value)


def test_secret_may_hold_a_quote_at_one_end_or_inside() -> None:
    secrets = ['"' + "s" * 40, "s" * 40 + "'", "s" * 20 + '"' + "s" * 20, "'" + "s" * 40 + '"']
    for secret in secrets:
        given = load(s3_bucket="pictures", callback_secrets=secret)
        assert [each.get_secret_value() for each in given.callback_secrets] == [secret]


def test_secret_that_was_used_with_its_quotes_may_stay_behind_a_new_one() -> None:
    given = load(s3_bucket="pictures", callback_secrets="n" * 40 + ',"' + "o" * 40 + '"')
    assert [each.get_secret_value() for each in given.callback_secrets] == ["n" * 40, '"' + "o" * 40 + '"']


def test_dotenv_file_may_quote_its_values(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text('RECEIVER_S3_BUCKET="pictures"\n')
    (tmp_path / ".env").chmod(0o600)
    assert load().s3_bucket == "pictures"


def test_hosts_and_origins_are_kept_in_the_spelling_that_they_are_compared_with() -> None:
    given = load(
        s3_bucket="pictures",
        result_hosts="*.C.example, .d.example,[2001:DB8::1],b\N{LATIN SMALL LETTER U WITH DIAERESIS}cher.example.",
        private_result_hosts="::1:80,[2001:DB8:0::1]:443,A.example:08443",
        cors_origins="https://A.example:443,http://a.example:8080,https://[2001:DB8::1],*",
    )
    assert given.result_hosts == ("c.example", "d.example", "2001:db8::1", "xn--bcher-kva.example")
    assert given.private_result_hosts == ("[::1]:80", "[2001:db8::1]:443", "a.example:8443")
    assert given.cors_origins == ("https://a.example", "http://a.example:8080", "https://[2001:db8::1]", "*")


def test_blanks_around_a_url_and_a_header_are_removed() -> None:
    given = load(s3_bucket="pictures", s3_endpoint_url=" https://a.example ", s3_cache_control="max-age=1 ")
    assert (given.s3_endpoint_url, given.s3_cache_control) == ("https://a.example", "max-age=1")


def test_path_may_have_bytes_that_are_no_utf_8() -> None:
    assert load(s3_bucket="pictures", spool_dir="spool-\udcff").spool_dir == Path("spool-\udcff")
