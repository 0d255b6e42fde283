"""The store of the compose file: what web and workers can reach of it, and the rights of its identity."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import boto3
import pytest
import yaml
from botocore.exceptions import ClientError

from receiver.local_store.seaweed import pick_ports, weed_binary
from storage.bucket.bucket import Bucket
from storage.bucket.probe import Capabilities
from storage.errors import StoreUnavailable
from tests.harness import wait_until
from tests.pipeline import free_port
from tests.test_infra import COMPOSE, INFRA, SERVICES, _program

KEYS = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_DEFAULT_REGION": "us-east-1"}


def neighbours(name: str) -> set[str]:
    """The services that share a network with this one."""
    own = set(SERVICES[name].get("networks", ()))
    return {other for other, service in SERVICES.items() if own & set(service.get("networks", ())) and other != name}


def test_nothing_that_runs_our_code_reaches_the_open_ports_of_the_store() -> None:
    assert neighbours("seaweedfs") == {"bucket", "s3"}
    assert neighbours("s3") >= {"web", "worker", "seaweedfs"}
    assert "proxy" not in neighbours("s3")
    assert COMPOSE["networks"]["objects"] == {"internal": True}


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_no_container_has_rights_to_spare(name: str) -> None:
    service = SERVICES[name]
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    is_root = service["user"].startswith("0:")
    assert is_root == (name == "owners") == ("cap_add" in service)
    if is_root:
        assert (service["network_mode"], service["cap_add"]) == ("none", ["CHOWN", "DAC_READ_SEARCH"])


@contextmanager
def running(*command: str | Path, **environment: str) -> Iterator[None]:
    """Killed at the end, because an orderly stop takes half a minute and the data is not needed."""
    with subprocess.Popen(command, env={"PATH": os.environ["PATH"], **environment}, stdout=-3, stderr=-3) as started:
        try:
            yield
        finally:
            started.kill()


def store_command(folder: Path, secrets: Path, ports: dict[str, int]) -> list[str]:
    """The compose file's command on loopback."""
    places = {"/data": str(folder), "=seaweedfs": "=127.0.0.1", "0.0.0.0": "127.0.0.1", "/run/secrets": str(secrets)}  # noqa: S104 - what is replaced
    words = [f"-{part}.port={ports[part]}" for part in ("master", "volume", "filer", "s3")]
    for word in SERVICES["seaweedfs"]["command"]:
        for before, after in places.items():
            word = word.replace(before, after)
        words += [] if word.startswith("-s3.port=") else [word]
    return [str(weed_binary()), words[4], *words[:4], *words[5:]]


@contextmanager
def forwarder(folder: Path, store: int) -> Iterator[int]:
    """The shipped settings in the real program; yields its port."""
    port, probe = free_port(), free_port()
    static = yaml.safe_load((INFRA / "proxy" / "store.yaml").read_text())
    static["entryPoints"]["s3"]["address"] = f"127.0.0.1:{port}"
    static["entryPoints"]["probe"]["address"] = f"127.0.0.1:{probe}"
    static["providers"]["file"]["filename"] = str(INFRA / "proxy" / "store-routes.yaml")
    (folder / "store.yaml").write_text(yaml.safe_dump(static))
    with running(_program("traefik"), f"--configFile={folder / 'store.yaml'}", STORE_ADDRESS=f"127.0.0.1:{store}"):
        yield port


def make_bucket(ports: dict[str, int], name: str) -> bool:
    """Run the compose file's script. Returns whether it found the bucket in the end."""
    script = SERVICES["bucket"]["command"][0].replace("$$", "$").replace("weed shell", f"{weed_binary()} shell")
    script = script.replace("seaweedfs:9333", f"127.0.0.1:{ports['master']}")
    script = script.replace("seaweedfs:8888", f"127.0.0.1:{ports['filer']}")
    environment = {"PATH": os.environ["PATH"], "BUCKET": name}
    return subprocess.run(["/bin/sh", "-c", script], env=environment, timeout=60, check=False).returncode == 0


def probed(url: str) -> Capabilities | None:
    """None while the proxy in front of the store still starts."""
    with suppress(StoreUnavailable):
        return Bucket("pictures", endpoint_url=url).probe()
    return None


def test_the_stores_identity_can_do_what_we_do_in_one_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets, data, ports = tmp_path / "secrets", tmp_path / "data", pick_ports(None)
    data.mkdir()
    named = {"PATH": os.environ["PATH"], "RECEIVER_S3_BUCKET": "pictures"}
    subprocess.run([INFRA / "make-secrets", secrets], env=named, timeout=30, check=True, capture_output=True)
    for name, value in {**KEYS, "AWS_SHARED_CREDENTIALS_FILE": str(secrets / "s3_credentials")}.items():
        monkeypatch.setenv(name, value)
    with running(*store_command(data, secrets, ports)), forwarder(tmp_path, ports["s3"]) as port:
        wait_until(lambda: make_bucket(ports, "pictures"), seconds=60)
        assert make_bucket(ports, "private")
        url = f"http://127.0.0.1:{port}"
        found = wait_until(lambda: probed(url), seconds=30)
        assert (found.conditional_put, found.refuses_wrong_checksum, found.multipart, found.delete) == (True,) * 4
        client = boto3.Session().client("s3", endpoint_url=url)  # the module's own session keeps the first keys it saw
        for refused in (
            lambda: client.list_objects_v2(Bucket="private"),
            lambda: client.delete_bucket(Bucket="private"),
        ):
            with pytest.raises(ClientError, match="AccessDenied"):
                refused()
