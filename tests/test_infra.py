"""Operators' files: image, locks, compose file, proxy. No container starts; the proxy's program does, if installed."""

from __future__ import annotations

import ast
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

from receiver.base.config import Settings, load
from receiver.cli.main import app
from receiver.web.callbacks import BODY_SECONDS
from tests.pipeline import free_port

ROOT = Path(__file__).parent.parent
INFRA = ROOT / "infra"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = ("web", "worker", "migrate", "sandbox")
CALLBACK = "/callbacks/kling/canary-token"


def _program(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return found or pytest.skip(f"{name} is not installed")


def _passes(*command: str | Path) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# The image


def test_dockerfile_lints() -> None:
    _passes(_program("hadolint"), "Dockerfile")


def test_everything_the_image_copies_is_there_and_not_ignored() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for source in " ".join(copied).split():
        assert (ROOT / source).exists()
        assert any(source == name or source.startswith(f"{name}/") for name in allowed)


def test_image_runs_without_privileges_and_stops_in_order() -> None:
    final = DOCKERFILE.rsplit("\nFROM ", 1)[1]
    for line in ("USER 10001:10001", "STOPSIGNAL SIGTERM", 'ENTRYPOINT ["receiver"]'):
        assert f"\n{line}\n" in final
    assert "pip install" not in final
    assert DOCKERFILE.count("--require-hashes") == 2


@pytest.mark.parametrize(("status", "exit_code"), [(200, 0), (503, 1)])
def test_health_check_requests_healthz(status: int, exit_code: int) -> None:
    _, python_option, program = ast.literal_eval(re.search(r"^ +CMD (\[.+\])$", DOCKERFILE, re.MULTILINE)[1])  # type: ignore[index]
    with _web(status=status) as web:
        environment = os.environ | {"RECEIVER_PORT": str(web.server_port)}
        done = subprocess.run([sys.executable, python_option, program], env=environment, timeout=30, check=False)
    assert (done.returncode, web.seen) == (exit_code, [("GET", "/healthz", b"")])


# The locks


def _locked(name: str) -> dict[str, str]:
    lines = (INFRA / "lock" / f"{name}.txt").read_text().splitlines()
    pins = (line.split(";")[0].rstrip(" \\").split("==") for line in lines if not line.startswith(" "))
    return {canonicalize_name(package): version for package, version in pins}


def _wanted() -> dict[str, list[str]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = [text for texts in project["project"]["optional-dependencies"].values() for text in texts]
    runtime = project["project"]["dependencies"]
    own = f"{project['project']['name']}["
    return {
        "runtime": runtime,
        "all": runtime + [text for text in extras if not text.startswith(own)],
        "build": project["build-system"]["requires"],
    }


@pytest.mark.parametrize("name", ["runtime", "all", "build"])
def test_lock_is_in_step_with_the_project(name: str) -> None:
    pins = _locked(name)
    for requirement in map(Requirement, _wanted()[name]):
        pinned = pins.get(canonicalize_name(requirement.name), "nothing")
        assert pinned != "nothing", f"{requirement.name} is missing: see infra/README.md, Locks"
        assert requirement.specifier.contains(pinned, prereleases=True), f"{requirement} but {pinned}"


@pytest.mark.parametrize("name", ["runtime", "all", "build"])
def test_lock_has_hashes_and_no_index_url(name: str) -> None:
    text = (INFRA / "lock" / f"{name}.txt").read_text()
    line = r"([A-Za-z0-9._-]+==[^\s/@]+( ; [^/@\\]+)?( \\)?|    --hash=sha256:[0-9a-f]{64}( \\)?)"
    assert [bad for bad in text.splitlines() if not re.fullmatch(line, bad)] == []
    assert all("--hash" in block for block in re.split(r"\n(?=\S)", text.rstrip()))


# The compose file


def test_compose_follows_its_specification() -> None:
    _passes(_program("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", INFRA / "compose.yaml")


def test_only_the_proxy_is_reachable_from_outside() -> None:
    assert {name for name, service in SERVICES.items() if "ports" in service} == {"proxy"}
    assert SERVICES["proxy"]["ports"] == ["443:8443"]
    assert COMPOSE["networks"]["store"] == {"internal": True}
    assert "store" not in SERVICES["proxy"]["networks"]


@pytest.mark.parametrize("name", OURS)
def test_our_containers_run_as_the_images_user(name: str) -> None:
    assert SERVICES[name]["user"] == "10001:10001"


def test_every_image_has_a_version() -> None:
    images = {service["image"] for service in SERVICES.values()}
    assert all(re.search(r":[^/:]*\d|:local}$", image) for image in images), images


# The image, the command or the routes of the proxy decide these. An empty value would replace the image's folder.
CONTAINERS_OWN = {"host", "port", "workers", "store", "spool_dir", "console_thumbnail_dir"}


def _variable(name: str) -> str:
    return f"RECEIVER_{name.upper()}"


@pytest.mark.parametrize("name", ["web", "worker", "migrate"])
def test_every_setting_reaches_the_containers_from_the_env_file(name: str) -> None:
    given = SERVICES[name]["environment"]
    ours = {key: value for key, value in given.items() if key.startswith("RECEIVER_")}
    assert {key.removesuffix("_FILE") for key in ours} <= set(map(_variable, Settings.model_fields))
    for setting in map(_variable, Settings.model_fields.keys() - CONTAINERS_OWN):
        assert re.fullmatch(rf"\$\{{{setting}:?-[^}}]*}}", given.get(setting, "")), setting
    for setting in map(_variable, CONTAINERS_OWN):
        assert "$" not in given.get(setting, "")


def test_secrets_reach_the_containers_from_files_and_the_sandbox_gets_none() -> None:
    keys = {name for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation)}
    urls = {"database_direct_url", "event_sinks"}
    assert keys > urls
    for name in ("web", "worker"):
        for setting in (keys - urls) | {"kling_access_key"}:
            assert SERVICES[name]["environment"][f"{_variable(setting)}_FILE"] == f"/run/secrets/{setting}"
            assert setting in SERVICES[name]["secrets"]
    assert (SERVICES["sandbox"]["environment"], SERVICES["sandbox"]["secrets"]) == ({}, [])


def test_web_has_no_workers_and_the_sandbox_is_a_profile() -> None:
    assert SERVICES["web"]["environment"]["RECEIVER_WORKERS"] == "0"
    assert (SERVICES["sandbox"]["profiles"], SERVICES["worker"]["command"]) == (["sandbox"], ["work"])
    assert SERVICES["worker"]["scale"] == "${WORKERS:-1}"  # not `up --scale`, which the next `up` takes back
    for name in ("web", "worker"):
        assert SERVICES[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}


@pytest.mark.parametrize("name", OURS)
def test_compose_commands_exist_in_the_program(name: str) -> None:
    done = CliRunner().invoke(app, [*SERVICES[name]["command"], "--help"])
    assert done.exit_code == 0, done.output


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    subprocess.run([INFRA / "make-secrets", tmp_path / "secrets"], timeout=30, check=True, capture_output=True)
    return tmp_path / "secrets"


def test_secrets_are_made_once_and_kept_from_others(secrets: Path) -> None:
    named = {Path(secret["file"]).name for secret in COMPOSE["secrets"].values()}
    before = {path.name: path.read_text() for path in secrets.iterdir()}
    assert set(before) == named
    assert secrets.stat().st_mode & 0o777 == 0o700
    subprocess.run([INFRA / "make-secrets", secrets], timeout=30, check=True, capture_output=True)
    assert {path.name: path.read_text() for path in secrets.iterdir()} == before


@pytest.mark.parametrize(
    "value",
    [
        "pics",
        '"pics"',
        "'pics' # ours",
        "pics # ours",
        "pics\r",
        "old\nRECEIVER_S3_BUCKET=pics",
        " pics",
        "old\nexport RECEIVER_S3_BUCKET = pics",
    ],
)
def test_the_stores_identity_opens_the_bucket_that_compose_reads_in_the_env_file(tmp_path: Path, value: str) -> None:
    shutil.copy(INFRA / "make-secrets", tmp_path)
    (tmp_path / ".env").write_bytes(f"PUBLIC_HOST=localhost\nRECEIVER_S3_BUCKET={value}\n".encode())
    subprocess.run([tmp_path / "make-secrets"], timeout=30, check=True, capture_output=True)
    (identity,) = json.loads((tmp_path / "secrets" / "seaweedfs_s3").read_text())["identities"]
    assert identity["actions"] == ["Read:pics", "Write:pics", "List:pics", "Tagging:pics"]


def _read_as_web(secrets: Path, monkeypatch: pytest.MonkeyPatch, **env_file: str) -> Settings:
    """The settings of the service `web` with these lines in `.env`."""
    monkeypatch.chdir(secrets)  # no .env of the developer's
    given = {"RECEIVER_PUBLIC_URL": "https://callbacks.example.com", **env_file}
    for name, value in SERVICES["web"]["environment"].items():
        plain = re.sub(r"\$\{(\w+):?-([^}]*)}", lambda found: given.get(found[1], found[2]), value)
        monkeypatch.setenv(name, plain.replace("/run/secrets", str(secrets)))
    return load()


def test_settings_read_what_compose_gives_them(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = _read_as_web(secrets, monkeypatch)
    assert settings.database_url.get_secret_value() == (secrets / "database_url").read_text()
    assert (settings.workers, settings.s3_bucket, settings.migrates_on_start) == (0, "kling", False)
    assert (len(settings.callback_secrets), settings.kling_api_key, settings.kling_webhook_secrets) == (1, None, ())
    changed = {"database_url", "callback_secrets", "public_url", "s3_bucket", "s3_endpoint_url", "metrics_token"}
    others = Settings.model_fields.keys() - changed - CONTAINERS_OWN
    assert {name for name in others if getattr(settings, name) != Settings.model_fields[name].get_default()} == set()


def test_what_the_env_file_and_the_secret_files_say_reaches_the_settings(
    secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (secrets / "console_keys").write_text("anna=" + "k" * 24)
    settings = _read_as_web(secrets, monkeypatch, RECEIVER_WORKER_THREADS="16", RECEIVER_API_KEYS="a" * 24)
    assert ([person.name for person in settings.console_people], settings.worker_threads) == (["anna"], 16)
    assert [key.get_secret_value() for key in settings.api_keys] == ["a" * 24]


# The proxy


class _Web(ThreadingHTTPServer):
    """A stand-in for the receiver's web server. Records requests. `refusals`: how many it answers 503 at first."""

    daemon_threads = True
    refusals = 0

    def __init__(self, port: int, status: int) -> None:
        self.seen: list[tuple[str, str, bytes]] = []
        self.status = status
        super().__init__(("127.0.0.1", port), _Answer)


class _Answer(BaseHTTPRequestHandler):
    server: _Web

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.command, self.path, body))
        refused = len(self.server.seen) <= self.server.refusals
        self.send_response(503 if refused else self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def _web(port: int = 0, status: int = 200) -> Iterator[_Web]:
    with _Web(port, status) as web:
        thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield web
        finally:
            web.shutdown()
            thread.join()


# The shipped deadlines, which the tests of the proxy would wait for, and the ones that they have instead.
SHORTER = {"readTimeout: 10s": "readTimeout: 2s", "initialInterval: 1s": "initialInterval: 200ms",
           "timeout: 20s": "timeout: 4s"}  # fmt: skip


def _shortened(name: str) -> str:
    return re.sub("|".join(SHORTER), lambda found: SHORTER[found[0]], (INFRA / "proxy" / name).read_text())


def test_proxy_has_the_deadlines_of_the_receiver() -> None:
    texts = [(INFRA / "proxy" / name).read_text() for name in ("traefik.yaml", "routes.yaml")]
    assert [sum(text.count(f" {each} ") + text.count(f" {each}\n") for text in texts) for each in SHORTER] == [1, 1, 1]
    assert f"readTimeout: {BODY_SECONDS:g}s" in SHORTER


class _Proxy:
    """The shipped proxy settings in the real program: loopback ports, a self-signed certificate, shorter deadlines."""

    def __init__(self, folder: Path) -> None:
        self.public, self.web, probe = (free_port() for _ in range(3))
        self.log = folder / "proxy.log"
        static = yaml.safe_load(_shortened("traefik.yaml"))
        static["entryPoints"]["public"]["address"] = f"127.0.0.1:{self.public}"
        static["entryPoints"]["probe"]["address"] = f"127.0.0.1:{probe}"
        static["providers"]["file"]["filename"] = str(folder / "routes.yaml")
        del static["certificatesResolvers"]
        self.settings = folder / "traefik.yaml"
        self.settings.write_text(yaml.safe_dump(static))
        (folder / "routes.yaml").write_text(_shortened("routes.yaml"))

    @contextmanager
    def running(self, program: str) -> Iterator[_Proxy]:
        names = {"PUBLIC_HOST": "localhost", "WEB_ADDRESS": f"127.0.0.1:{self.web}", "PATH": os.environ["PATH"]}
        with self.log.open("w") as log:
            started = subprocess.Popen([program, f"--configFile={self.settings}"], env=names, stdout=log, stderr=log)
        try:
            self._wait(program)
            yield self
        finally:
            started.terminate()
            started.wait(30)

    def _wait(self, program: str) -> None:
        command = [program, "healthcheck", f"--configFile={self.settings}"]
        give_up = time.monotonic() + 30
        while subprocess.run(command, capture_output=True, timeout=30, check=False).returncode:
            assert time.monotonic() < give_up, self.log.read_text()
            time.sleep(0.1)
        while self.ask("GET", "/") == 404:  # it is healthy before its routes are read
            assert time.monotonic() < give_up, self.log.read_text()
            time.sleep(0.1)

    def ask(self, method: str, path: str, body: bytes = b"", host: str = "localhost") -> int:
        trusting = ssl.create_default_context()
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection("127.0.0.1", self.public, timeout=40, context=trusting)
        try:
            connection.request(method, path, body, {"Host": host})
            return connection.getresponse().status
        finally:
            connection.close()


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Proxy]:
    program = _program("traefik")
    with _Proxy(tmp_path_factory.mktemp("proxy")).running(program) as running:
        yield running


def test_proxy_holds_a_callback_while_the_web_is_away(proxy: _Proxy) -> None:
    answers: list[int] = []
    caller = threading.Thread(target=lambda: answers.append(proxy.ask("POST", CALLBACK, b"{}")))
    caller.start()
    time.sleep(1)  # the state under test: a callback waits and no server listens
    with _web(proxy.web) as web:
        caller.join(40)
    assert (answers, web.seen) == ([200], [("POST", CALLBACK, b"{}")])


def test_proxy_tries_again_when_the_web_cannot_store(proxy: _Proxy) -> None:
    with _web(proxy.web) as web:
        web.refusals = 2
        assert proxy.ask("POST", CALLBACK, b"{}") == 200
    assert web.seen == [("POST", CALLBACK, b"{}")] * 3


def test_proxy_bounds_how_often_a_callback_is_sent(proxy: _Proxy) -> None:
    for status, most in ((503, 12), (429, 1)):
        with _web(proxy.web, status=status) as web:
            assert proxy.ask("POST", CALLBACK, b"{}") == status
        assert 1 <= len(web.seen) <= most


@pytest.mark.parametrize(("size", "status"), [(262_144, 200), (262_145, 413)])
def test_proxy_caps_a_callback_where_the_receiver_does(proxy: _Proxy, size: int, status: int) -> None:
    with _web(proxy.web) as web:
        assert proxy.ask("POST", CALLBACK, b"x" * size) == status
    assert [len(body) for _, _, body in web.seen] == ([size] if status == 200 else [])


@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/readyz", "/readyz?strict=1"])
def test_proxy_does_not_expose_internal_paths(proxy: _Proxy, path: str) -> None:
    with _web(proxy.web) as web:
        assert proxy.ask("GET", path) == 404
        assert proxy.ask("GET", "/assets/token.png") == 200
        assert proxy.ask("POST", CALLBACK, host="other.example") == 404
    assert [seen for _, seen, _ in web.seen] == ["/assets/token.png"]


def test_proxy_passes_on_no_unfinished_body_and_logs_no_path(proxy: _Proxy) -> None:
    request = f"POST {CALLBACK} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{{"
    trusting = ssl._create_unverified_context()  # noqa: S323 - the proxy made its certificate itself
    with _web(proxy.web) as web:
        with (
            socket.create_connection(("127.0.0.1", proxy.public), 40) as plain,
            trusting.wrap_socket(plain, server_hostname="localhost") as stalled,
        ):
            stalled.sendall(request.encode())
            assert stalled.recv(1000).startswith(b"HTTP/1.1 4")
    assert web.seen == []
    assert "canary-token" not in proxy.log.read_text()
