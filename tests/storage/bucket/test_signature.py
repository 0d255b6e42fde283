"""Our signature equals botocore's, header for header."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from storage.bucket.signed_requests import Signer

SHA256 = "f" * 64
CREDENTIALS = [Credentials("AKIA", "secret/+key"), Credentials("ASIA", "another", "token/+=")]
HEADERS: list[dict[str, str]] = [
    {},
    {"content-type": "image/png", "if-none-match": "*", "x-amz-checksum-sha256": "abc="},
    {"cache-control": "  max-age=60,   public ", "x-amz-meta-task": "bild-%C3%B6", "x-amz-tagging": "a=b%26c"},
]


class BotocoreSigner(S3SigV4Auth):
    def payload(self, request: AWSRequest) -> str:
        return SHA256


@pytest.mark.parametrize("credentials", CREDENTIALS, ids=["long-lived", "session token"])
@pytest.mark.parametrize("headers", HEADERS, ids=["none", "put", "blanks"])
@pytest.mark.parametrize(
    ("url", "host"), [("http://s3.example:8333", "s3.example:8333"), ("https://b.s3.io", "b.s3.io")]
)
def test_signature_is_that_of_botocore(credentials: Credentials, headers: dict[str, str], url: str, host: str) -> None:
    path = "/bucket/a%20b%2Bc~/%C3%B6.png"
    request = AWSRequest("PUT", url + path, headers=headers)
    BotocoreSigner(credentials, "s3", "eu-central-1").add_auth(request)
    expected = {name.lower(): value for name, value in request.headers.items()}
    now = datetime.strptime(expected["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    signed = Signer(credentials, "eu-central-1", host).headers("PUT", path, SHA256, headers, now)
    assert signed == {**expected, "host": host}


def test_key_is_derived_again_for_another_day_and_other_credentials() -> None:
    days = [datetime(2026, 11, day, 12, tzinfo=UTC) for day in (1, 2)]
    signer = Signer(CREDENTIALS[0], "us-east-1", "h")

    def signature(day: datetime) -> str:
        return signer.headers("PUT", "/k", SHA256, {}, day)["authorization"]

    assert signature(days[0]) == signature(days[0]) != signature(days[1])
    first = signature(days[1])
    signer._credentials = CREDENTIALS[1]
    assert signature(days[1]) != first
