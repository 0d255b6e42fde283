"""Fixtures: real servers once per run, a fresh database and a fresh bucket prefix per test."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import gc
import importlib.util
import logging
import os
import re
import shutil
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from structlog._config import BoundLoggerLazyProxy

from receiver.app.wiring import Parts
from receiver.local_store.seaweed import Seaweed
from receiver.sandbox import Knobs, Sandbox
from receiver.sandbox.ledger import Ledger
from storage.database.sessions import Database
from storage.rows import migrations
from tests import manifest_checks
from tests.bytecode import compile_sources, compile_tests
from tests.forked_workers import WorkerForks
from tests.pipeline import Web, Wired, settings_for
from tests.postgres import MigratedDatabases, Postgres
from tests.process_wide import process_wide

if TYPE_CHECKING:
    from storage.bucket.bucket import Bucket


# Files with tests of 5 s and more. They and the campaigns start first, so that no worker is alone with one at the end.
SLOW = {
    "test_attacks.py", "test_axe.py", "test_bench.py", "test_canaries.py", "test_chaos.py", "test_check_table.py",
    "test_crashes.py", "test_large_files.py", "test_postgresql_outages.py", "test_rules.py",
    "test_shared_pages.py", "test_shutdown.py", "test_shutdown_with_creates.py", "test_store_outage.py",
}  # fmt: skip
# The same for files with a fixture of the whole file, which each worker would otherwise make for itself.
SLOW_AND_WHOLE = {"test_browser.py", "test_demo.py", "test_infra.py", "test_recipes.py", "test_serve_store.py"}

NOTHING_DONE = Ledger((), (), (), Counter(), 0, 0)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # set in a worker of xdist
        compile_sources()
        compile_tests(config)
    if (workers := config.getoption("tx")) and set(workers) == {"popen"}:
        forks = WorkerForks(config)
        config.add_cleanup(forks.close)
        config.option.tx = [forks.spec] * len(workers)


def pytest_addoption(parser: pytest.Parser) -> None:
    words = "run each test on both databases; without it a marked test runs on those that its mark names"
    parser.addoption("--both-databases", action="store_true", help=words)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("both_databases"):
        deselected = [item for item in items if is_for_both_databases_alone(item)]
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]
    deal_tests(items)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect the tests without collections of garbage: 1.6 of the 6.8 s of CPU that each worker takes for that.

    Then keep what exists now, the modules and the list of tests, out of all collections: 9 % of the tests' CPU. One
    after 10,000 new objects instead of 700 saves another 2 %.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(10_000, 10, 10)
        gc.enable()


def is_for_both_databases_alone(item: pytest.Item) -> bool:
    """Whether this is on another database than those that `@pytest.mark.databases(…)` or a campaign's mark names."""
    mark = item.get_closest_marker("databases") or item.get_closest_marker("campaign")
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return mark is not None and params.get("database_kind", mark.args[0]) not in mark.args


def deal_tests(items: list[pytest.Item]) -> None:
    """Give each worker its share of the slow, the ordinary and the quick tests, in this order. xdist deals out the
    tests in equal parts, in order. A worker that has done its part takes half of what is left of the longest.

    Slow tests mostly wait. The last worker gets none of them and uses the processor meanwhile. xdist leaves the last
    two tests to each worker, so those are quick, and the workers end together.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    names = {path: path.name for path in {item.path for item in items}}
    units = [[item] for item in items if names[item.path] in SLOW or item.get_closest_marker("campaign")]
    units += [[item for item in items if names[item.path] == name] for name in sorted(SLOW_AND_WHOLE)]
    taken = {item for unit in units for item in unit}
    ordinary = iter([item for item in items if item not in taken and not is_quick(item)])
    quick = [item for item in items if item not in taken and is_quick(item)]
    dealt: list[pytest.Item] = []
    shares = max(1, workers - 1)
    for worker in range(workers):
        last = quick[worker::workers]
        slow = [item for unit in units[worker::shares] for item in unit] if worker < shares else []
        end = len(items) * (worker + 1) // workers
        dealt += [*slow, *islice(ordinary, max(0, end - len(dealt) - len(slow) - len(last))), *last]
    items[:] = [*dealt, *ordinary]


def is_quick(item: pytest.Item) -> bool:
    """Whether the test starts neither a server nor a process, for which it would need a folder."""
    return not {"tmp_path", "sandbox", "seaweed", "postgres"} & set(item.fixturenames)  # type: ignore[attr-defined]


@pytest.fixture(scope="session", autouse=True)
def whole_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One fixture for all of it, because pytest looks at each fixture for each test: eight more cost each worker 0.3 s
    of CPU to collect the tests.
    """
    with process_wide(tmp_path_factory.mktemp("roots")):
        yield


@pytest.fixture(autouse=True)
def own_logs() -> Iterator[None]:
    """Restores logging after a test that configures it, because later loggers must not write to its closed streams."""
    yield
    if structlog.is_configured():
        structlog.reset_defaults()
        for module in filter(None, list(sys.modules.values())):  # None: see no_search_for_sniffio
            logger = vars(module).get("log")
            if isinstance(logger, BoundLoggerLazyProxy):
                vars(logger).pop("bind", None)  # where `cache_logger_on_first_use` stores the logger
        logging.getLogger().handlers.clear()


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """The S3 server of this worker. A test that stops it starts it again.

    It is killed at the end of the run, when nobody needs its data: an end in order takes 2 to 5 s of waiting.
    """
    server = Seaweed(tmp_path_factory.mktemp("seaweed"), "pictures")
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Makes what all workers of the run copy: `made_once(name, make)` calls `make` with a path in one of them."""
    folder = (
        tmp_path_factory.getbasetemp().parent
        if "PYTEST_XDIST_WORKER" in os.environ
        else tmp_path_factory.mktemp("once")
    )

    def made(name: str, make: Callable[[Path], None]) -> Path:
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / name).exists():
                with tempfile.TemporaryDirectory(dir=folder) as place:  # nothing stays of what failed
                    make(Path(place, name))
                    Path(place, name).rename(folder / name)
        return folder / name

    return made


@pytest.fixture(scope="session")
def postgres_data(made_once: Callable[[str, Callable[[Path], None]], Path], migrate: Callable[[str], None]) -> Path:
    """A PostgreSQL cluster to copy, with the template of `migrated_databases`.

    To make both takes 1.1 s of CPU, and to copy them 0.3.
    """

    def make(data: Path) -> None:
        with Postgres() as first:
            migrate(first.create_database(MigratedDatabases.template))
            first.stop()
            first.copy_data(data)

    return made_once("postgresql", make)


@pytest.fixture(scope="session")
def postgres(postgres_data: Path) -> Iterator[Postgres]:
    """The PostgreSQL server of this worker. A test that stops it starts it again."""
    with Postgres(data=postgres_data) as server:
        yield server


@pytest.fixture(scope="session")
def migrate() -> Callable[[str], None]:
    """Brings the database at a URL to the current schema."""

    def bring(url: str) -> None:
        database = Database(url)
        migrations.upgrade(database)
        database.close()

    return bring


@pytest.fixture(scope="session")
def migrated_sqlite(made_once: Callable[[str, Callable[[Path], None]], Path], migrate: Callable[[str], None]) -> Path:
    """A migrated file to copy, which is faster than a migration for every test."""
    return made_once("receiver.db", lambda file: migrate(f"sqlite:///{file}"))


@pytest.fixture(scope="session")
def migrated_databases(postgres: Postgres) -> Iterator[MigratedDatabases]:
    """Empty databases with the current schema."""
    with contextlib.closing(MigratedDatabases(postgres)) as databases:
        yield databases


@pytest.fixture(params=["sqlite", "postgresql"])
def database_kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def database_url(database_kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database of its own for the test, with the current schema, as a URL in a user's form."""
    yield from own_database(database_kind, request, tmp_path / "receiver.db")


@pytest.fixture
def another_database_url(database_kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A second one, which is of the same kind."""
    yield from own_database(database_kind, request, tmp_path / "another.db")


def own_database(kind: str, request: pytest.FixtureRequest, file: Path) -> Iterator[str]:
    if kind == "sqlite":
        shutil.copy(request.getfixturevalue("migrated_sqlite"), file)
        yield f"sqlite:///{file}"
    else:
        yield from request.getfixturevalue("migrated_databases").lend()


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """That database, opened."""
    opened = Database(database_url)
    yield opened
    opened.close()


@pytest.fixture
def empty_database_url(database_kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database of its own without any table, for tests of the migrations themselves."""
    if database_kind == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.db'}"
    else:
        server, name = request.getfixturevalue("postgres"), f"test_{uuid.uuid4().hex}"
        yield server.create_database(name)
        if server.process:
            server.drop_database(name)


def s3_variables(seaweed: Seaweed) -> dict[str, str]:
    nothing = {"AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}
    return {**nothing, "AWS_EC2_METADATA_DISABLED": "true", **seaweed.environment}


@pytest.fixture
def s3_environment(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of boto3's own chain, in this test and in the processes that it starts."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_variables(seaweed).items():
        monkeypatch.setenv(name, value)
    return s3_variables(seaweed)


@pytest.fixture(scope="session")
def store(seaweed: Seaweed) -> Bucket:
    """The run's bucket, connected and probed, which takes half a second once instead of in every test."""
    from storage.bucket.bucket import Bucket  # boto3 takes a second to import, so only tests that need it do

    whole = Bucket(seaweed.bucket, endpoint_url=seaweed.endpoint_url)
    with pytest.MonkeyPatch.context() as environment:
        for name, value in s3_variables(seaweed).items():
            environment.setenv(name, value)
        assert whole.capabilities().believed
    return whole


@pytest.fixture
def bucket(store: Bucket, s3_environment: dict[str, str], request: pytest.FixtureRequest) -> Iterator[Bucket]:
    """The run's bucket under a prefix that only this test uses. Its manifests are checked at the end of the test."""
    own = copy.copy(store)
    own.prefix = f"{re.sub(r'[^A-Za-z0-9]+', '-', request.node.name)[:60]}-{uuid.uuid4().hex[:8]}/"
    yield own
    manifest_checks.check(own)


@pytest.fixture(scope="session")
def endings() -> Iterator[ThreadPoolExecutor]:
    """A thread that ends unused servers, because uvicorn sleeps for a fifth of a second at its end."""
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture(scope="session")
def no_search_for_sniffio() -> Iterator[None]:
    """httpcore imports sniffio twice for each request of the sandbox. Where it is not installed, Python searches its
    path each time, which was half of the sandbox's CPU.
    """
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("sniffio") is None:
            patch.setitem(sys.modules, "sniffio", None)  # the import fails at once
        yield


@pytest.fixture(scope="session")
def unused_sandboxes(no_search_for_sniffio: None) -> Iterator[list[Sandbox]]:
    """Running sandboxes that are as they were started."""
    unused: list[Sandbox] = []
    yield unused
    for server in unused:
        server.stop()


@pytest.fixture
def sandbox(endings: ThreadPoolExecutor, unused_sandboxes: list[Sandbox]) -> Iterator[Sandbox]:
    """A provider that answers at once and draws small pictures.

    To start and stop one takes 7 ms of CPU. One that a test has neither changed nor asked for anything is for the next.
    """
    knobs = Knobs(picture_bytes=20_000, submitted_seconds=0, processing_seconds=0)
    server = unused_sandboxes.pop() if unused_sandboxes else Sandbox(knobs=knobs).start()
    yield server
    if server._server and server.world.knobs == knobs and server.ledger() == NOTHING_DONE:
        unused_sandboxes.append(server)
    else:
        endings.submit(server.stop)


@pytest.fixture
def changes() -> dict[str, Any]:
    """Changed settings of a test: `@pytest.mark.parametrize("changes", [{"confirm": "always"}])`."""
    return {}


@pytest.fixture
def parts(
    database_url: str, bucket: Bucket, sandbox: Sandbox, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Parts]:
    """All parts, wired together, on both databases. Nothing runs until the test starts it."""
    for name in [name for name in os.environ if name.startswith("RECEIVER_")]:
        monkeypatch.delenv(name)
    wired = Wired(settings_for(database_url, bucket, sandbox, **changes), bucket=bucket)
    yield wired
    wired.close()


@pytest.fixture
def web(parts: Parts) -> Iterator[Web]:
    """The receiver's web server, at the address in `parts`."""
    with Web(parts) as server:
        yield server


def pytest_xdist_auto_num_workers() -> int:
    """Three times the number of cores, because many tests wait for processes to start and for time to pass."""
    return 3 * (os.cpu_count() or 1)


@pytest.fixture(scope="session")
def sqs_server() -> Iterator[str]:
    """A real server of SQS's protocol, on loopback."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def queues(sqs_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of the queue server, with credentials that boto3's own chain finds in this test."""
    import boto3

    nothing = {"AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "eu-central-1"}
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    for name, value in {**nothing, **keys}.items():
        monkeypatch.setenv(name, value)
    opened = boto3.Session().client("sqs", endpoint_url=sqs_server)
    yield opened
    opened.close()
