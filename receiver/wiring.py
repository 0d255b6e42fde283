"""Everything put together from the settings. Imported by the entry points and tests alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from sqlmodel import col

import receiver
from receiver.config import Settings
from receiver.match import BATCH, Confirmation, Matcher, trusted_hosts
from receiver.provider import Provider
from receiver.providers.kling import Kling
from receiver.reconcile import Finder, Reader
from receiver.submit import Submitter
from receiver.tokens import Tokens
from receiver.worker import Chore, Lane, Worker
from storage import deadlines
from storage.addresses import AddressPolicy
from storage.archive import Archiver
from storage.circuit import Circuit
from storage.database import Database
from storage.fetch import Fetcher
from storage.manifest import Finisher
from storage.models import Asset, Callback, Task
from storage.objects import Bucket
from storage.pace import ReadLimit
from storage.states import CallbackState, Step
from storage.tasks import Schedule

# Deliveries are short work on one database; two threads keep one busy while the other commits.
CALLBACK_THREADS = 2
# A create or a read waits up to 20 s for the provider; four at once are below its 5 reads a second.
TASK_THREADS = 4
# Deadlines are hours away; one look a minute and worker costs an index look-up.
DEADLINE_LOOK_SECONDS = 60.0


@dataclass(frozen=True)
class Parts:
    """The parts of one process, each made when it is first asked for."""

    settings: Settings

    @cached_property
    def database(self) -> Database:
        return Database(self.settings.database_url.get_secret_value())

    @cached_property
    def kling(self) -> Kling:
        chosen = self.settings
        return Kling(
            base_url=chosen.kling_base_url,
            api_key=chosen.kling_api_key,
            access_key=chosen.kling_access_key,
            secret_key=chosen.kling_secret_key,
            webhook_secrets=chosen.kling_webhook_secrets,
        )

    @cached_property
    def providers(self) -> dict[str, Provider]:
        return {self.kling.name: self.kling}

    @cached_property
    def tokens(self) -> Tokens:
        return Tokens(self.settings.callback_secrets)

    @cached_property
    def schedule(self) -> Schedule:
        chosen = self.settings
        return Schedule(
            poll_after_seconds=chosen.poll_after_seconds,
            poll_max_seconds=chosen.poll_max_seconds,
            result_lifetime_seconds=chosen.result_lifetime_seconds,
            url_expiry=self.kling.url_expiry,
        )

    @cached_property
    def read_limit(self) -> ReadLimit:
        return ReadLimit(self.database)

    @cached_property
    def bucket(self) -> Bucket:
        chosen = self.settings
        return Bucket(
            chosen.s3_bucket,
            endpoint_url=chosen.s3_endpoint_url,
            prefix=chosen.s3_prefix,
            public_endpoint_url=chosen.s3_public_endpoint_url,
            checksum_mode=chosen.s3_checksums,
            put_options=chosen.put_options,
            connections=chosen.worker_threads + TASK_THREADS,
        )

    @cached_property
    def address_policy(self) -> AddressPolicy:
        private = (entry.rpartition(":") for entry in self.settings.private_result_hosts)
        return AddressPolicy(
            result_hosts=self.settings.result_hosts,
            private_hosts=frozenset((host.strip("[]").lower(), int(port)) for host, _, port in private),
        )

    @cached_property
    def fetcher(self) -> Fetcher:
        threads = self.settings.worker_threads
        return Fetcher(self.address_policy, max_bytes=self.settings.max_asset_bytes, connections=threads)

    @cached_property
    def confirmation(self) -> Confirmation:
        chosen = self.settings
        extra = (*chosen.result_hosts, *chosen.private_result_hosts)
        return Confirmation(chosen.confirm, trusted_hosts(self.kling.result_hosts, chosen.kling_base_url, extra))

    @cached_property
    def submitter(self) -> Submitter:
        return Submitter(
            self.database,
            self.kling,
            self.tokens,
            self.schedule,
            public_url=self.settings.public_url,
            read_limit=self.read_limit,
            lease_seconds=self.settings.lease_seconds,
        )

    def lanes(self) -> Sequence[Lane]:
        """Everything a worker does. A row's step says which lane it waits for."""
        settings, step = self.settings, Task.step
        unmatched = col(Callback.state) == CallbackState.UNMATCHED
        matcher = Matcher(self.database, self.providers, self.schedule, self.confirmation)
        reader = Reader(self.database, self.providers, self.schedule, self.read_limit)
        finder = Finder(self.database, self.providers, self.schedule, self.read_limit)
        finisher = Finisher(self.database, self.bucket, self.schedule, version=receiver.__version__)
        store = Circuit()
        archiver = Archiver(
            self.database, self.bucket, self.fetcher, self.schedule, spool_dir=settings.spool_dir, circuit=store
        )
        return (
            Lane(
                "callbacks",
                Callback,
                matcher.work,
                CALLBACK_THREADS,
                (~unmatched,),
                work_many=matcher.work_many,
                batch=lambda: BATCH,
            ),
            Lane("unmatched", Callback, finder.work, 1, (unmatched,)),
            Lane("creates", Task, self.submitter.work, TASK_THREADS, (step == Step.CREATE,)),
            Lane(
                "reads",
                Task,
                reader.work,
                TASK_THREADS,
                (step == Step.READ,),
                work_many=reader.work_many,
                batch=reader.batch,
            ),
            Lane("finishes", Task, finisher.work, CALLBACK_THREADS, (step == Step.FINISH,), circuit=store),
            Lane("assets", Asset, archiver.work, settings.worker_threads, circuit=store),
        )

    def chores(self) -> Sequence[Chore]:
        """What every worker looks after beside its lanes."""
        lead = deadlines.lead_seconds(self.settings.result_lifetime_seconds)
        return (Chore("deadlines", DEADLINE_LOOK_SECONDS, lambda: deadlines.announce(self.database, lead)),)

    def worker(self, lanes: Sequence[Lane] | None = None) -> Worker:
        """A worker process's loop over all lanes, or over the given ones."""
        chosen = self.settings
        return Worker(
            self.database,
            lanes or self.lanes(),
            lease_seconds=chosen.lease_seconds,
            grace_seconds=chosen.grace_seconds,
            chores=self.chores(),
        )

    def close(self) -> None:
        """Close what was opened; nothing is opened to be closed."""
        for name in ("fetcher", "kling", "database"):
            if name in self.__dict__:
                getattr(self, name).close()
