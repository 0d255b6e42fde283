"""Everything put together from the settings. Imported by the entry points and tests alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlmodel import col

import receiver
from receiver.app import local_store
from receiver.app.worker import LINGER_SECONDS, Lane, PeriodicJob, Worker
from receiver.base.config import Settings, private_pairs
from receiver.base.once import made_once
from receiver.base.tokens import Tokens
from receiver.events.cloudevents import Envelope
from receiver.events.dispatcher import Dispatcher, Sink
from receiver.events.http_post import Poster
from receiver.events.make import make
from receiver.gateway import client_callback
from receiver.gateway.answers import ResponseFormat
from receiver.providers.base import Provider
from receiver.providers.kling.client import Kling
from receiver.tasks.apply_deliveries import BATCH, Confirmation, DeliveryApplier, trusted_hosts
from receiver.tasks.reconcile import Reader, UnmatchedDeliveries
from receiver.tasks.submit import Submitter
from storage.accounts import idempotency
from storage.accounts.rate_limit import ReadRateLimit
from storage.accounts.slots import Slots, give_back_silent
from storage.archive import continuous_audit
from storage.archive.archiver import Archiver
from storage.archive.folders import sweep_uploads
from storage.archive.manifest import Finisher
from storage.bucket.bucket import Bucket
from storage.circuit import Circuit
from storage.fetch.addresses import AddressPolicy
from storage.fetch.client import TOTAL_SECONDS, Fetcher
from storage.operations import deadlines, outbox
from storage.rows.database import Database
from storage.rows.models import Asset, Callback, Dispatch, Task
from storage.rows.tasks import Schedule
from storage.states import CallbackState, Step

if TYPE_CHECKING:
    from receiver.console.console import Console
    from receiver.gateway.gateway import Gateway
    from receiver.web.app import Web
    from receiver.web.event_stream import Stream

# Deliveries are short work on one database; two threads keep one busy while the other commits.
CALLBACK_THREADS = 2
# A create or a read waits up to 20 s for the provider; four at once are below its 5 reads a second.
TASK_THREADS = 4
# No sink has more.
SINK_THREADS = 4
# Threads of a worker process beside those of its lanes: a feeder for each of the six lanes that are not a sink's, eight
# chores, the wake-up call, heartbeat, suspects, renewal, checkpoints; the rest is room.
OTHER_THREADS = 24
# Threads of the web server: 40 for pages, the gateway's 64 creates, a renewal beside each and 8 for all else, the
# inbox; the rest is room.
WEB_THREADS = 180
# Deadlines are hours away; one look a minute and worker costs an index look-up.
DEADLINE_INTERVAL_SECONDS = 60.0
# Half uploaded files lie there for a day before they are swept; a few looks a day cost as many list requests.
UPLOADS_INTERVAL_SECONDS = 6 * 3_600.0
# The largest file allowed must come within TOTAL_SECONDS, or within what it takes at this pace.
SLOWEST_BYTES_PER_SECOND = 450_000.0
# A day's silence is noticed a minute later, at the cost of a look into the index of held slots.
SILENT_INTERVAL_SECONDS = 60.0
# Events are numbered at once where a commit wakes workers, and this late at most: one index look-up by each worker.
SEQUENCE_INTERVAL_SECONDS = 0.5
# When the next step of the audit is due its row says; a look reads that one row.
AUDIT_INTERVAL_SECONDS = 1.0
# An audit that was switched off is forgotten by the next worker that starts, and by those that go on.
AUDIT_OFF_INTERVAL_SECONDS = 86_400.0
# Names this installation in events where it has no public URL.
NAMELESS = "urn:kling-receiver"


# A key stands for its answer for a day; an hour more or less of a small row costs nothing.
IDEMPOTENCY_INTERVAL_SECONDS = 3_600.0


@dataclass(frozen=True)
class Parts:
    """The parts of one process, each made when it is first asked for."""

    settings: Settings

    @made_once
    def database(self) -> Database:
        return Database(self.settings.database_url.get_secret_value(), connections=self.database_threads)

    @property
    def database_threads(self) -> int:
        """The most threads of one process, a worker or the web server, that need a connection at once.

        One for each thread of a lane, one to renew the claim beside each create, one for each sink's feeder.
        """
        sinks = (len(self.settings.event_entries) + 1) * (SINK_THREADS + 1)
        rows = 2 * CALLBACK_THREADS + 1 + 3 * TASK_THREADS + self.settings.worker_threads
        return max(rows + sinks + OTHER_THREADS, WEB_THREADS)

    @made_once
    def kling(self) -> Kling:
        chosen = self.settings
        return Kling(
            base_url=chosen.kling_base_url,
            api_key=chosen.kling_api_key,
            access_key=chosen.kling_access_key,
            secret_key=chosen.kling_secret_key,
            webhook_secrets=chosen.kling_webhook_secrets,
            circuit=self.provider_circuit,
        )

    @made_once
    def provider_circuit(self) -> Circuit:
        return Circuit()

    @made_once
    def providers(self) -> dict[str, Provider]:
        return {self.kling.name: self.kling}

    @made_once
    def tokens(self) -> Tokens:
        return Tokens(self.settings.callback_secrets)

    @made_once
    def schedule(self) -> Schedule:
        chosen = self.settings
        return Schedule(
            poll_after_seconds=chosen.poll_after_seconds,
            poll_max_seconds=chosen.poll_max_seconds,
            result_lifetime_seconds=chosen.result_lifetime_seconds,
            url_expiry=self.kling.url_expiry,
        )

    @made_once
    def read_rate_limit(self) -> ReadRateLimit:
        return ReadRateLimit(self.database)

    @made_once
    def store_address(self) -> tuple[str | None, tuple[str, str] | None]:
        """The store's endpoint, and its keys where we run it ourselves."""
        return local_store.address(self.settings)

    @made_once
    def bucket(self) -> Bucket:
        chosen = self.settings
        endpoint_url, keys = self.store_address
        return Bucket(
            chosen.s3_bucket,
            endpoint_url=endpoint_url,
            keys=keys,
            prefix=chosen.s3_prefix,
            public_endpoint_url=chosen.s3_public_endpoint_url,
            checksum_mode=chosen.s3_checksums,
            addressing=chosen.s3_addressing,
            put_options=chosen.put_options,
            connections=chosen.worker_threads + TASK_THREADS,
        )

    @made_once
    def address_policy(self) -> AddressPolicy:
        private = private_pairs(self.settings.private_result_hosts)
        return AddressPolicy(result_hosts=self.settings.result_hosts, private_hosts=private)

    @made_once
    def fetcher(self) -> Fetcher:
        threads = self.settings.worker_threads
        most = self.settings.max_asset_bytes
        seconds = max(TOTAL_SECONDS, most / SLOWEST_BYTES_PER_SECOND)
        return Fetcher(self.address_policy, max_bytes=most, connections=threads, total_seconds=seconds)

    @made_once
    def confirmation(self) -> Confirmation:
        chosen = self.settings
        extra = (*chosen.result_hosts, *chosen.private_result_hosts)
        return Confirmation(chosen.confirm, trusted_hosts(self.kling.result_hosts, chosen.kling_base_url, extra))

    @made_once
    def slots(self) -> Slots:
        return Slots(Kling.name, self.settings.kling_slots)

    @made_once
    def submitter(self) -> Submitter:
        return Submitter(
            self.database,
            self.kling,
            self.tokens,
            self.schedule,
            public_url=self.settings.public_url,
            read_rate_limit=self.read_rate_limit,
            lease_seconds=self.settings.lease_seconds,
            slots=self.slots,
        )

    @made_once
    def gateway(self) -> Gateway | None:
        """The ASGI application below `/kling`; None without API keys."""
        from receiver.gateway.api_keys import ApiKeys
        from receiver.gateway.creates import Creates
        from receiver.gateway.gateway import Gateway  # with what serves HTTP, which most commands do without
        from receiver.gateway.openapi import document
        from receiver.gateway.queries import Queries

        chosen = self.settings
        if not chosen.api_keys:
            return None
        creates = Creates(self.database, self.submitter, self.response_format, chosen.callback_policy)
        queries = Queries(self.database, self.response_format)
        return Gateway(ApiKeys(chosen.api_keys), creates, queries, document(receiver.__version__, chosen.public_url))

    @made_once
    def response_format(self) -> ResponseFormat:
        """How the gateway tells its clients of results."""
        from receiver.web.assets import asset_link  # with what serves HTTP, as above

        url = self.settings.public_url if self.settings.callback_secrets else None
        link = (lambda asset: asset_link(self.tokens, url, asset)) if url else (lambda _: None)
        return ResponseFormat(self.settings.gateway_results, link)

    @made_once
    def envelope(self) -> Envelope:
        return Envelope(self.settings.public_url or NAMELESS, self.settings.s3_bucket)

    @made_once
    def sinks(self) -> dict[str, Sink]:
        """Where events go, by name."""
        policy, secrets = self.settings.event_policy, self.settings.event_secrets
        sinks = {entry.name: make(entry, policy, secrets) for entry in self.settings.event_entries}
        seconds = client_callback.TIMEOUT_SECONDS
        poster = Poster(self.settings.callback_policy, connections=client_callback.THREADS, timeout_seconds=seconds)
        return {
            **sinks,
            client_callback.NAME: client_callback.Clients(self.database, poster, secrets, self.response_format),
        }

    @made_once
    def subscriptions(self) -> Sequence[outbox.Subscription]:
        asked = [outbox.Subscription(entry.name, entry.names) for entry in self.settings.event_entries]
        return (*asked, outbox.Subscription(client_callback.NAME, client_callback.EVENTS, of_clients=True))

    def sequence(self) -> int:
        """Number the events there are and queue them for their sinks. Returns how many."""
        return outbox.sequence_all(self.database, self.subscriptions)

    @made_once
    def stream(self) -> Stream | None:
        from receiver.web.event_stream import Stream  # with what serves HTTP, as above

        keys = self.settings.api_keys
        return Stream(self.database, self.envelope, keys) if keys else None

    @made_once
    def console(self) -> Console | None:
        """The pages below `/console`; None without keys."""
        if not self.settings.console_keys:
            return None
        from receiver.app.console_parts import make_console  # with what serves HTTP, as above

        return make_console(self)

    def web(self) -> Web:
        """The ASGI application."""
        from receiver.web import app  # with what serves HTTP, as above
        from receiver.web.assets import Assets

        chosen = self.settings
        assets = Assets(
            self.database, self.bucket, self.tokens, streams=chosen.stream_assets, origins=chosen.cors_origins
        )
        return app.build(
            self.database,
            self.providers,
            self.tokens,
            self.schedule,
            bucket=self.bucket,
            assets=assets,
            metrics_token=chosen.metrics_token,
            gateway=self.gateway,
            stream=self.stream,
            slots=self.slots,
            console=self.console,
        )

    def _event_lane(self, name: str, sink: Sink) -> Lane:
        """A sink's own lane: one that is slow or down holds up nothing else."""
        circuit = None if name == client_callback.NAME else Circuit()
        retry_seconds = self.settings.event_retry_seconds
        work = Dispatcher(self.database, name, sink, self.envelope, retry_seconds=retry_seconds, circuit=circuit)
        return Lane(
            f"events-{name}",
            Dispatch,
            work.work,
            sink.threads,
            (col(Dispatch.sink) == name,),
            circuit=circuit,
            work_many=work.work_many,
            batch=lambda: sink.batch,
            linger_seconds=LINGER_SECONDS,
        )

    def lanes(self) -> Sequence[Lane]:
        """Everything a worker does. A row's step says which lane it waits for."""
        settings, step = self.settings, Task.step
        unmatched = col(Callback.state) == CallbackState.UNMATCHED
        applier = DeliveryApplier(self.database, self.providers, self.schedule, self.confirmation)
        reader = Reader(self.database, self.providers, self.schedule, self.read_rate_limit)
        unmatched_deliveries = UnmatchedDeliveries(self.database, self.providers, self.schedule, self.read_rate_limit)
        store, provider = Circuit(), self.provider_circuit
        finisher = Finisher(self.database, self.bucket, self.schedule, version=receiver.__version__, circuit=store)
        archiver = Archiver(
            self.database, self.bucket, self.fetcher, self.schedule, spool_dir=settings.spool_dir, circuit=store
        )
        return (
            Lane(
                "callbacks",
                Callback,
                applier.work,
                CALLBACK_THREADS,
                (~unmatched,),
                work_many=applier.work_many,
                batch=lambda: BATCH,
            ),
            Lane("unmatched", Callback, unmatched_deliveries.work, 1, (unmatched,), circuit=provider),
            Lane(
                "creates",
                Task,
                self.submitter.work,
                TASK_THREADS,
                (step == Step.CREATE,),
                circuit=provider,
                slots=self.slots,
            ),
            Lane(
                "reads",
                Task,
                reader.work,
                TASK_THREADS,
                (step == Step.READ,),
                circuit=provider,
                work_many=reader.work_many,
                batch=reader.batch,
            ),
            Lane("finishes", Task, finisher.work, CALLBACK_THREADS, (step == Step.FINISH,), circuit=store),
            Lane("assets", Asset, archiver.work, settings.worker_threads, circuit=store),
            *(self._event_lane(name, sink) for name, sink in self.sinks.items()),
        )

    def periodic_jobs(self) -> Sequence[PeriodicJob]:
        """What every worker looks after beside its lanes."""
        lead = deadlines.lead_seconds(self.settings.result_lifetime_seconds)
        return (
            PeriodicJob("idempotency keys", IDEMPOTENCY_INTERVAL_SECONDS, lambda: idempotency.prune_all(self.database)),
            PeriodicJob("deadlines", DEADLINE_INTERVAL_SECONDS, lambda: deadlines.announce(self.database, lead)),
            PeriodicJob("uploads", UPLOADS_INTERVAL_SECONDS, lambda: sweep_uploads(self.bucket)),
            PeriodicJob("silent", SILENT_INTERVAL_SECONDS, lambda: give_back_silent(self.database)),
            PeriodicJob("sequence", SEQUENCE_INTERVAL_SECONDS, self.sequence, wakes=True),
            PeriodicJob("disabled sinks", DEADLINE_INTERVAL_SECONDS, lambda: outbox.end_disabled(self.database)),
            self._audit_job(),
        )

    def _audit_job(self) -> PeriodicJob:
        chosen = self.settings
        if chosen.audit_days is None:
            return PeriodicJob("audit", AUDIT_OFF_INTERVAL_SECONDS, lambda: continuous_audit.forget(self.database))
        work = continuous_audit.ContinuousAudit(
            self.database,
            self.bucket,
            days=chosen.audit_days,
            bytes_per_second=chosen.audit_bytes_per_second,
            lease_seconds=chosen.lease_seconds,
        )
        return PeriodicJob("audit", AUDIT_INTERVAL_SECONDS, work.run)

    def worker(self, lanes: Sequence[Lane] | None = None) -> Worker:
        """A worker process's loop over all lanes, or over the given ones."""
        chosen = self.settings
        return Worker(
            self.database,
            lanes or self.lanes(),
            lease_seconds=chosen.lease_seconds,
            grace_seconds=chosen.grace_seconds,
            periodic_jobs=self.periodic_jobs(),
        )

    def close(self) -> None:
        """Close what was opened; nothing is opened to be closed."""
        for sink in self.__dict__.get("sinks", {}).values():
            sink.close()
        for name in ("fetcher", "kling", "database"):
            if name in self.__dict__:
                getattr(self, name).close()
