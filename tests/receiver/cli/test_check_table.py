"""`receiver check` and the faults of the first day: one line names the remedy, and the exit code is 1."""

from __future__ import annotations

import os
import resource
import shutil
import ssl
import subprocess
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from time import time

import pytest
from sqlalchemy.exc import DBAPIError

from receiver.app import database_faults
from receiver.local_store.seaweed import Seaweed
from receiver.sandbox import Sandbox
from storage.bucket.bucket import Bucket
from storage.database.sessions import Database
from storage.operations import heartbeats
from tests.command_line import CommandLine, Done, variables
from tests.fault_proxy import Answer, FaultProxy, Forward, Request
from tests.forked import Forked
from tests.postgres import MigratedDatabases, Postgres
from tests.rows import new_assets

WORDS = "A header you provided implies functionality that is not implemented"
CHECKSUM_HEADERS = ("x-amz-checksum", "x-amz-sdk-checksum", "x-amz-trailer")


def said(status: int, code: str, message: str = "", **headers: str) -> Answer:
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    return Answer(status, {"content-type": "application/xml", **headers}, body)


def without_list(request: Request, forward: Forward) -> Answer:
    answer = forward(request)
    is_list = request.method == "GET" and "prefix=" in request.path
    denied = said(403, "AccessDenied", "Access Denied")
    return denied if is_list or (answer.status == 404 and request.method in ("GET", "HEAD")) else answer


def without_get(request: Request, forward: Forward) -> Answer:
    is_read = request.method in ("GET", "HEAD") and "?" not in request.path
    return said(403, "AccessDenied", "Access Denied") if is_read else forward(request)


def without_checksums(request: Request, forward: Forward) -> Answer:
    has_sum = any(name.startswith(CHECKSUM_HEADERS) for name in request.headers)
    return said(501, "NotImplemented", WORDS) if has_sum else forward(request)


def of_one_megabyte(request: Request, forward: Forward) -> Answer:
    page = Answer(413, {"content-type": "text/html"}, b"<html>413</html>")
    return page if len(request.body) > 1_000_000 else forward(request)


def ten_minutes_late(_request: Request, _forward: Forward) -> Answer:
    return said(403, "RequestTimeTooSkewed", "The difference is too large.", date=formatdate(time() - 600, usegmt=True))


def log_in_page(request: Request, forward: Forward) -> Answer:
    page = Answer(200, {"content-type": "text/html"}, b"<html><body>Log in</body></html>")
    return page if request.method == "GET" and "prefix=" in request.path else forward(request)


def empty_listing(request: Request, forward: Forward) -> Answer:
    listing = Answer(200, {"content-type": "application/xml"}, b"<ListBucketResult></ListBucketResult>")
    return listing if request.method == "GET" and "prefix=" in request.path else forward(request)


STORES: dict[str, tuple[Callable[[Request, Forward], Answer], str]] = {
    "a key without List": (without_list, "grant s3:ListBucket on the bucket itself (arn:aws:s3:::pictures, without"),
    "a key without Get": (without_get, "(needs s3:GetObject) (bucket pictures, AccessDenied, HTTP 403): grant s3:Get"),
    "refuses checksum headers": (without_checksums, "HTTP 501): set RECEIVER_S3_CHECKSUMS=never: the store"),
    "a page for a listing": (log_in_page, "answers a listing with what is not one: HTTP 200, an element html; a proxy"),
    "a proxy without a route": (
        lambda *_: Answer(404, {"content-type": "text/plain"}, b"404 page not found"),
        "a proxy in front of it may have no route (bucket pictures, 404, HTTP 404): check RECEIVER_S3_ENDPOINT_URL",
    ),
    "a redirect to https": (
        lambda *_: Answer(301, {"location": "https://user:secret@store.example.com/pictures/x?sign=1"}, b""),
        "redirects to https://store.example.com: set RECEIVER_S3_ENDPOINT_URL to the store's own address",
    ),
    "an empty listing": (empty_listing, "the store does not list an object that it has just stored"),
    "an expired token": (
        lambda *_: said(400, "ExpiredToken"),
        "says the session token has expired (bucket pictures, ExpiredToken, HTTP 400): fetch new credentials",
    ),
    "a wrong region": (lambda *_: said(400, "AuthorizationHeaderMalformed"), "set AWS_DEFAULT_REGION to the bucket's"),
    "a bucket elsewhere": (
        lambda *_: said(
            301, "PermanentRedirect", "Use the specified endpoint.", **{"x-amz-bucket-region": "eu-west-1"}
        ),
        "is in another region, eu-west-1 (bucket pictures, PermanentRedirect, HTTP 301): set AWS_DEFAULT_REGION to eu-",
    ),
    "a key of KMS that the role may not use": (
        lambda *_: said(
            403, "AccessDenied", "User: r is not authorized to perform: kms:GenerateDataKey on this resource"
        ),
        "(needs kms:GenerateDataKey) (bucket pictures, AccessDenied, HTTP 403): grant kms:GenerateDataKey",
    ),
    "a key of KMS that is off": (
        lambda *_: said(400, "KMS.DisabledException", "key/1 is disabled."),
        'failed: "key/1 is disabled." (bucket pictures, KMS.DisabledException, HTTP 400): mend the key there, or name',
    ),
    "a proxy of 1 MB": (of_one_megabyte, "refuses an object of 2,097,152 bytes (bucket pictures, HTTP 413): raise the"),
    "a clock ten minutes off": (ten_minutes_late, " s ahead of the bucket's: turn on time synchronisation (NTP)"),
}


@pytest.fixture
def receiver(migrated_sqlite: Path, bucket: Bucket, sandbox: Sandbox, tmp_path: Path) -> CommandLine:
    (tmp_path / "receiver.db").write_bytes(migrated_sqlite.read_bytes())
    return CommandLine(variables("sqlite:///receiver.db", bucket, sandbox), tmp_path)


def only_fault(done: Done) -> str:
    (line,) = [line for line in done.out.splitlines() if line.startswith("fault")]
    assert (done.code, done.err) == (1, "")
    return line


@pytest.mark.parametrize("name", STORES)
def test_store_that_cannot_be_used_is_named_with_the_remedy(receiver: CommandLine, seaweed: Seaweed, name: str) -> None:
    fault, words = STORES[name]
    with FaultProxy(seaweed, fault) as proxy:
        assert words in only_fault(receiver("check", RECEIVER_S3_ENDPOINT_URL=proxy.endpoint_url))


OF_BOTO3 = {
    "a profile that does not exist": (
        {"AWS_PROFILE": "missing"},
        'boto3 says "The config profile (missing) could not be found" (ProfileNotFound): correct the AWS_… variables',
    ),
    "a program for credentials that fails": (
        {"AWS_PROFILE": "vault", "AWS_CONFIG_FILE": "config", "AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
        'from custom-process: cat: locked: No such file or directory" (CredentialRetrievalError): correct the AWS_…',
    ),
    "a key with a line end": (
        {"AWS_ACCESS_KEY_ID": "hidden\r"},
        "a line end or another control character: export AWS_ACCESS_KEY_ID and AWS_SESSION_TOKEN without it",
    ),
}


@pytest.mark.parametrize("name", OF_BOTO3)
def test_what_boto3_refuses_before_it_sends_is_not_said_of_the_store(receiver: CommandLine, name: str) -> None:
    variables, words = OF_BOTO3[name]
    (receiver.folder / "config").write_text("[profile vault]\ncredential_process = cat locked\n")
    says = only_fault(receiver("check", **variables))
    assert words in says and "that the store runs" not in says and "hidden" not in says


def test_a_store_that_refuses_in_its_own_words_is_not_said_to_be_down(receiver: CommandLine, seaweed: Seaweed) -> None:
    with FaultProxy(seaweed, lambda *_: said(403, "AccountProblem", "Pay your bill.")) as proxy:
        says = only_fault(receiver("check", RECEIVER_S3_ENDPOINT_URL=proxy.endpoint_url))
    assert says.endswith('failed: "Pay your bill." (bucket pictures, AccountProblem, HTTP 403)')


@pytest.fixture
def private_ca(seaweed: Seaweed, tmp_path: Path) -> Iterator[tuple[FaultProxy, Path]]:
    """The store behind TLS, and the certificate of its private CA."""
    openssl, key, certificate = shutil.which("openssl"), tmp_path / "key.pem", tmp_path / "certificate.pem"
    if openssl is None:
        pytest.skip("no openssl to make a certificate with")
    request = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=test"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([openssl, *request.split(), *names], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with FaultProxy(seaweed) as proxy:
        proxy._server.socket = context.wrap_socket(proxy._server.socket, server_side=True)
        yield proxy, certificate


def test_private_ca_is_named_and_the_remedy_works(receiver: CommandLine, private_ca: tuple[FaultProxy, Path]) -> None:
    proxy, certificate = private_ca
    url = proxy.endpoint_url.replace("http:", "https:")
    says = only_fault(receiver("check", RECEIVER_S3_ENDPOINT_URL=url))
    assert "a certificate that is not trusted: set AWS_CA_BUNDLE to the file of the CA that signed it" in says
    assert receiver("check", RECEIVER_S3_ENDPOINT_URL=url, AWS_CA_BUNDLE=str(certificate)).code == 0


def test_private_ca_of_the_provider_is_named_too(receiver: CommandLine, private_ca: tuple[FaultProxy, Path]) -> None:
    url = private_ca[0].endpoint_url.replace("http:", "https:")
    says = only_fault(receiver("check", RECEIVER_KLING_BASE_URL=url))
    assert says.endswith("to those that this host trusts, or set SSL_CERT_FILE to its file")


def test_misspelt_setting_is_named_with_the_nearest(receiver: CommandLine) -> None:
    done = receiver("check", RECEIVER_WORKER="3")
    assert only_fault(done).endswith("nothing reads RECEIVER_WORKER: RECEIVER_WORKERS is the nearest there is")


def test_database_that_is_down_is_named_with_the_remedy(receiver: CommandLine) -> None:
    says = only_fault(receiver("check", RECEIVER_DATABASE_URL="postgresql://somebody:hush@127.0.0.1:1/receiver"))
    assert "Connection refused" in says and "hush" not in says
    assert says.endswith("check that it runs there and can be reached, or correct RECEIVER_DATABASE_URL")


def test_variables_of_postgresql_that_count_are_named(receiver: CommandLine, postgres: Postgres) -> None:
    said = {"PGHOST": "192.0.2.1", "PGCONNECT_TIMEOUT": "9"}
    url = f"{postgres.url()}?connect_timeout=5"
    done = receiver("check", RECEIVER_DATABASE_URL=url, PGSSLMODE="require", PGOPTIONS="-c nothing=1", **said)
    only_fault(done)
    assert "PGOPTIONS, PGSSLMODE of the environment: used, because RECEIVER_DATABASE_URL does not say it" in done.out


def test_missing_database_is_named_with_the_remedy(receiver: CommandLine, postgres: Postgres) -> None:
    says = only_fault(receiver("check", RECEIVER_DATABASE_URL=postgres.url("nope")))
    assert 'database "nope" does not exist): correct RECEIVER_DATABASE_URL, or let the server\'s owner make' in says


def test_read_only_database_is_named_with_the_remedy(
    receiver: CommandLine, migrated_databases: MigratedDatabases
) -> None:
    for url in migrated_databases.lend():
        only_reads = f"{url}?options=-cdefault_transaction_read_only%3Don"
        says = only_fault(receiver("check", RECEIVER_DATABASE_URL=only_reads))
        assert "read-only transaction" in says and "let it take writes, or name the server that does" in says
        says = only_fault(receiver("check", RECEIVER_DATABASE_URL=f"{only_reads}&target_session_attrs=read-write"))
        assert "session is read-only" in says and "let it take writes, or name the server that does" in says


def test_full_disk_of_the_database_is_named_with_the_remedy(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/full.db")
    with database.autocommit_writer() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1")
        with pytest.raises(DBAPIError, match="database or disk is full") as caught:
            connection.exec_driver_sql("CREATE TABLE row (id INTEGER)")
    assert database_faults.remedy(database, caught.value) == "its disk is full: make room there"
    database.close()


def test_database_file_that_may_not_grow_is_named_with_the_remedy(receiver: CommandLine, tmp_path: Path) -> None:
    """The log may not grow beyond a page, as on a full disk."""
    out, err = tmp_path / "out", tmp_path / "err"
    rest = {name: value for name, value in os.environ.items() if not name.startswith("RECEIVER_")}
    variables = {**rest, **receiver.variables, "COLUMNS": "80"}
    process = Forked(("check",), variables, tmp_path, out=out, err=err, limits={resource.RLIMIT_FSIZE: (4_096, 4_096)})
    code = process.wait(60)
    says = only_fault(Done(code, out.read_text(), err.read_text()))
    assert "cannot be used" in says and "check that it runs, may be written and has room" in says


def test_check_says_that_the_store_refuses_running_workers(receiver: CommandLine, tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/receiver.db")
    heartbeats.register(database, 1)
    new_assets(database, 2, error="the store at 127.0.0.1:1 says the session token has expired")
    database.close()
    done = receiver("check")
    (line,) = [line for line in done.out.splitlines() if "bucket: workers" in line]
    assert done.code == 0
    assert "2 files wait because a running worker was told otherwise: the store at 127.0.0.1:1 says the session" in line
