"""Constructs every part of one process from the settings. Only entry points and tests import it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import receiver
from receiver.app import jobs
from receiver.base.cached_property import cached_property
from receiver.base.config import Settings, private_pairs
from receiver.base.tokens import Tokens
from receiver.events.cloudevents import Envelope
from receiver.events.dispatcher import Sink
from receiver.events.http_post import Poster
from receiver.events.make import make
from receiver.gateway import client_callback
from receiver.gateway.answers import ResponseFormat
from receiver.local_store import serve_store
from receiver.providers import registry
from receiver.providers.base import Provider
from receiver.providers.kling.client import Kling
from receiver.tasks.apply_deliveries import Confirmation, trusted_hosts
from receiver.tasks.create_step import CreateStep
from receiver.tasks.submit import Submitter
from receiver.workers.lanes import Lane, PeriodicJob
from receiver.workers.worker import Worker
from storage.accounts.rate_limit import ReadRateLimit
from storage.accounts.slots import Slots
from storage.archive.slow_hosts import spare_threads
from storage.bucket.bucket import Bucket
from storage.circuit import Circuit
from storage.database.sessions import Database
from storage.fetch.addresses import AddressPolicy
from storage.fetch.client import TOTAL_SECONDS, Fetcher
from storage.fetch.connection import Tunnel
from storage.operations import outbox
from storage.rows.reports import Schedule

if TYPE_CHECKING:
    from receiver.console.console import Console
    from receiver.gateway.api_keys import ApiKeys
    from receiver.gateway.gateway import Gateway
    from receiver.web.app import Web
    from receiver.web.event_stream import Stream

# Threads of the web server: 40 for pages, the gateway's 64 creates with a lease renewal beside each, 8 for the rest,
# the group commit. What remains is reserve.
WEB_THREADS = 180
# A download may take TOTAL_SECONDS, or as long as the largest file allowed takes at this speed.
SLOWEST_BYTES_PER_SECOND = 450_000.0
# Without a public URL nothing calls back: reads 5, 15, 35 and 75 s after a create, then by RECEIVER_POLL_AFTER_SECONDS.
# A picture takes the provider some ten seconds or more; four reads more a task are far below its rate limit.
FIRST_POLL_SECONDS = (5.0, 10.0, 20.0, 40.0)
# The source of events (CloudEvents) where the installation has no public URL.
NAMELESS = "urn:kling-receiver"


@dataclass(frozen=True)
class Parts:
    """The parts of one process, each made at its first use."""

    settings: Settings

    @cached_property
    def database(self) -> Database:
        chosen = self.settings
        direct = chosen.database_direct_url.get_secret_value() if chosen.database_direct_url else None
        url = chosen.database_url.get_secret_value()
        return Database(url, direct_url=direct, connections=self.database_threads)

    @property
    def database_threads(self) -> int:
        """How many threads of one process, a worker or the web server, may need a connection at the same time.

        A worker has the threads of its lanes, one to renew the lease beside each create, and a feeder for each sink.
        """
        sinks = (len(self.settings.event_entries) + 1) * (jobs.SINK_THREADS + 1)
        rows = 2 * jobs.CALLBACK_THREADS + 1 + 3 * jobs.TASK_THREADS + self.archive_threads
        return max(rows + sinks + jobs.OTHER_THREADS, WEB_THREADS)

    @property
    def archive_threads(self) -> int:
        """More than there are downloads at once: a thread that waits for a commit lends its place."""
        downloads = self.settings.worker_threads
        return (1 + jobs.LENT_SHARE) * downloads + spare_threads(downloads)

    @cached_property
    def kling(self) -> Kling:
        return registry.make_kling(self.settings, self.provider_circuit)

    @cached_property
    def provider_circuit(self) -> Circuit:
        return Circuit()

    @cached_property
    def providers(self) -> dict[str, Provider]:
        return {self.kling.name: self.kling}

    @cached_property
    def tokens(self) -> Tokens:
        return Tokens(self.settings.callback_secrets)

    @cached_property
    def schedule(self) -> Schedule:
        chosen = self.settings
        is_chosen = "poll_after_seconds" in chosen.model_fields_set
        return Schedule(
            poll_after_seconds=chosen.poll_after_seconds,
            poll_max_seconds=chosen.poll_max_seconds,
            first_poll_seconds=() if chosen.public_url or is_chosen else FIRST_POLL_SECONDS,
            result_lifetime_seconds=chosen.result_lifetime_seconds,
            url_expiry=self.kling.url_expiry,
        )

    @cached_property
    def read_rate_limit(self) -> ReadRateLimit:
        return ReadRateLimit(self.database)

    @cached_property
    def store_address(self) -> tuple[str | None, tuple[str, str] | None]:
        """The store's endpoint, and its keys if we run it ourselves."""
        return serve_store.address(self.settings)

    @cached_property
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
            connections=self.archive_threads + jobs.TASK_THREADS,
        )

    @cached_property
    def address_policy(self) -> AddressPolicy:
        private = private_pairs(self.settings.private_result_hosts)
        return AddressPolicy(result_hosts=self.settings.result_hosts, private_hosts=private)

    @property
    def tunnel(self) -> Tunnel | None:
        """How files are fetched and webhooks are posted if a proxy is the only way out."""
        return self.settings.egress_proxy.connect if self.settings.egress_proxy else None

    @cached_property
    def fetcher(self) -> Fetcher:
        most = self.settings.max_asset_bytes
        seconds = max(TOTAL_SECONDS, most / SLOWEST_BYTES_PER_SECOND)
        return Fetcher(
            self.address_policy,
            max_bytes=most,
            trusted_hosts=self.confirmation.trusted_hosts,
            connections=self.archive_threads,
            total_seconds=seconds,
            tunnel=self.tunnel,
            user_agent=self.settings.fetch_user_agent,
        )

    @cached_property
    def confirmation(self) -> Confirmation:
        chosen = self.settings
        extra = (*chosen.result_hosts, *(host for host, _ in private_pairs(chosen.private_result_hosts)))
        return Confirmation(chosen.confirm, trusted_hosts(self.kling.result_hosts, chosen.kling_base_url, extra))

    @cached_property
    def slots(self) -> Slots:
        return Slots(Kling.name, self.settings.kling_slots)

    @cached_property
    def submitter(self) -> Submitter:
        lease_seconds = self.settings.lease_seconds
        create_step = CreateStep(
            self.database,
            self.kling,
            self.schedule,
            self.slots,
            read_rate_limit=self.read_rate_limit,
            lease_seconds=lease_seconds,
        )
        return Submitter(
            self.database,
            self.kling,
            self.tokens,
            self.slots,
            create_step,
            public_url=self.settings.public_url,
            lease_seconds=lease_seconds,
            has_credentials=bool(self.settings.kling_api_key or self.settings.kling_access_key),
        )

    @cached_property
    def gateway(self) -> Gateway | None:
        """The ASGI application below `/kling`; None without API keys."""
        chosen = self.settings
        if not chosen.api_keys:
            return None
        from receiver.gateway.creates import Creates
        from receiver.gateway.gateway import Gateway  # imports the HTTP server, which most commands do not need
        from receiver.gateway.openapi import document
        from receiver.gateway.queries import Queries

        creates = Creates(
            self.database, self.submitter, self.response_format, chosen.callback_policy,
            own_only=chosen.gateway_tasks == "own",
        )  # fmt: skip
        queries = Queries(self.database, self.response_format)
        return Gateway(self._api_keys(), creates, queries, document(receiver.__version__, chosen.public_url))

    def _api_keys(self) -> ApiKeys:
        from receiver.gateway.api_keys import ApiKeys

        return ApiKeys(self.settings.api_keys, own_only=self.settings.gateway_tasks == "own")

    @cached_property
    def response_format(self) -> ResponseFormat:
        """How the gateway words a result for its clients."""
        from receiver.web.assets import asset_link  # imports the HTTP server, as above

        url = self.settings.public_url if self.settings.callback_secrets else None
        link = (lambda asset: asset_link(self.tokens, url, asset)) if url else (lambda _: None)
        return ResponseFormat(self.settings.gateway_results, link)

    @cached_property
    def envelope(self) -> Envelope:
        return Envelope(self.settings.public_url or NAMELESS, self.settings.s3_bucket)

    @cached_property
    def sinks(self) -> dict[str, Sink]:
        """The sinks of events, by name."""
        policy, secrets, tunnel = self.settings.event_policy, self.settings.event_secrets, self.tunnel
        sinks = {entry.name: make(entry, policy, secrets, tunnel) for entry in self.settings.event_entries}
        seconds = client_callback.TIMEOUT_SECONDS
        threads = client_callback.THREADS
        poster = Poster(self.settings.callback_policy, connections=threads, timeout_seconds=seconds, tunnel=tunnel)
        return {
            **sinks,
            client_callback.NAME: client_callback.Clients(self.database, poster, secrets, self.response_format),
        }

    @cached_property
    def subscriptions(self) -> Sequence[outbox.Subscription]:
        sinks = [outbox.Subscription(entry.name, entry.names) for entry in self.settings.event_entries]
        names = client_callback.events(self.settings.gateway_results)
        return (*sinks, outbox.Subscription(client_callback.NAME, names, of_clients=True))

    def sequence(self) -> int:
        """Number new events and queue them for their sinks. Returns how many."""
        return outbox.sequence_all(self.database, self.subscriptions)

    @cached_property
    def stream(self) -> Stream | None:
        if not self.settings.api_keys:
            return None
        from receiver.web.event_stream import Stream  # imports the HTTP server, as above

        return Stream(self.database, self.envelope, self._api_keys())

    @cached_property
    def console(self) -> Console | None:
        """The pages below `/console`; None without keys."""
        if not self.settings.console_keys:
            return None
        from receiver.app.console_parts import make_console  # imports what serves HTTP, as above

        return make_console(self)

    def web(self) -> Web:
        """The ASGI application."""
        from receiver.web import app  # imports the HTTP server, as above
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
            sinks=[each.sink for each in self.subscriptions],
            console=self.console,
            path_prefix=urlsplit(chosen.public_url or "").path,
        )

    def lanes(self) -> Sequence[Lane]:
        return jobs.lanes(self)

    def periodic_jobs(self) -> Sequence[PeriodicJob]:
        return jobs.periodic_jobs(self)

    def worker(self, lanes: Sequence[Lane] | None = None) -> Worker:
        """A worker process over all lanes, or over the given ones."""
        chosen = self.settings
        self.database.at_group_end = lambda session: outbox.sequence_recorded(
            self.database, session, self.subscriptions
        )
        return Worker(
            self.database,
            lanes or self.lanes(),
            lease_seconds=chosen.lease_seconds,
            grace_seconds=chosen.grace_seconds,
            periodic_jobs=self.periodic_jobs(),
        )

    def close(self) -> None:
        """Close the parts that exist."""
        for sink in self.__dict__.get("sinks", {}).values():
            sink.close()
        for name in ("fetcher", "kling", "database"):
            if name in self.__dict__:
                getattr(self, name).close()
