"""The product's own processes with provider, store and database around them, for long runs."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import pytest

from receiver.app.wiring import Parts
from receiver.base import config
from receiver.local_store.seaweed import Seaweed
from receiver.sandbox import Knobs, Sandbox
from storage.rows import migrations
from tests.chaos.plan import WEB_KILLED, WORKER_KILLED
from tests.chaos.processes import ROOT, Kept
from tests.pipeline import free_port
from tests.postgres import Postgres

BUCKET = "pictures"


class Scene:
    """A context manager whose processes all end with it, also after an error. A subclass builds its parts in `_build`.

    All of it listens on loopback alone, and ends with this process (Linux) even if that is killed. `postgres_data`: a
    cluster that PostgreSQL copies instead of making one.
    """

    def __init__(self, folder: Path, postgres_data: Path | None = None) -> None:
        self.folder = folder
        self._postgres_data = postgres_data
        self.stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _build(self) -> None:
        raise NotImplementedError

    def start_servers(self, database: str, knobs: Knobs) -> None:
        """Store, provider and, if `database` says so, PostgreSQL."""
        self.seaweed = self.stack.enter_context(Seaweed(self.folder / "seaweed", BUCKET))
        self.sandbox = self.stack.enter_context(Sandbox(knobs=knobs))
        is_postgresql, data = database == "postgresql", self._postgres_data
        self.postgres = self.stack.enter_context(Postgres(data=data)) if is_postgresql else None

    def know_the_store(self) -> None:
        """Let this process put objects into the store, too."""
        ours = self.stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in self.seaweed.environment.items():
            ours.setenv(name, value)

    def start_processes(self, workers: int, *, store_url: str | None = None, **variables: str) -> None:
        """The web server and this many workers, ready. `store_url`: of the proxy in front of the store."""
        self.environment = {**self._environment(store_url or self.seaweed.endpoint_url), **variables}
        self.parts = Parts(settings_in(self.environment))
        self.stack.callback(self.parts.close)
        migrations.upgrade(self.parts.database)
        self.web = Kept(WEB_KILLED, ["serve"], self.environment, self.folder)
        self.workers = [Kept(WORKER_KILLED, ["work"], self.environment, self.folder) for _ in range(workers)]
        for each in (self.web, *self.workers):
            self.stack.callback(each.stop)
            each.start()
        for each in (self.web, *self.workers):
            if not each.wait_until_ready():
                raise RuntimeError(f"a process did not start:\n{each.log.read_text()[-3_000:]}")

    def bugs(self) -> list[str]:
        """The lines of all logs about unexpected errors."""
        return [line for each in (self.web, *self.workers) for line in each.bugs()]

    def _environment(self, store_url: str) -> dict[str, str]:
        """The whole environment of the processes. Only Python's path is taken from the caller's."""
        port = free_port()
        url = self.postgres.url() if self.postgres else f"sqlite:///{self.folder / 'receiver.db'}"
        return {
            "PATH": os.defpath,
            "PYTHONPATH": str(ROOT),
            "HOME": str(self.folder),
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            **self.seaweed.environment,
            "RECEIVER_DATABASE_URL": url,
            "RECEIVER_PORT": str(port),
            "RECEIVER_PUBLIC_URL": f"http://127.0.0.1:{port}",
            "RECEIVER_CALLBACK_SECRETS": "a-secret-of-more-than-thirty-two-characters",
            "RECEIVER_KLING_BASE_URL": self.sandbox.url,
            "RECEIVER_KLING_API_KEY": self.sandbox.api_key,
            "RECEIVER_PRIVATE_RESULT_HOSTS": self.sandbox.url.removeprefix("http://"),
            "RECEIVER_S3_BUCKET": BUCKET,
            "RECEIVER_S3_ENDPOINT_URL": store_url,
            "RECEIVER_SPOOL_DIR": str(self.folder),
            "RECEIVER_WORKERS": "0",
            "RECEIVER_LOG_FORMAT": "json",
        }


def settings_in(environment: dict[str, str]) -> config.Settings:
    """The settings of the processes, for work that is done in this one."""
    prefix = config.PREFIX
    mine = {name.removeprefix(prefix).lower(): value for name, value in environment.items() if name.startswith(prefix)}
    return config.load(**mine)
