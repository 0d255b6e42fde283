"""Make a sink from its entry in the settings."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import SecretStr

from receiver.base.signature import Signer
from receiver.base.sink_setting import Entry
from receiver.events.dispatcher import Sink
from receiver.events.http_post import Poster
from receiver.events.lines import Lines
from receiver.events.webhook import THREADS, Webhook
from storage.fetch.addresses import AddressPolicy
from storage.fetch.connection import Tunnel


def make(entry: Entry, policy: AddressPolicy, secrets: Sequence[SecretStr], tunnel: Tunnel | None = None) -> Sink:
    """Make the sink of an entry. It opens nothing before it sends. `tunnel`: for webhooks."""
    match entry.kind:
        case "webhook":
            return Webhook(entry.url, Poster(policy, connections=THREADS, tunnel=tunnel), Signer(secrets))
        case "sqs":
            from receiver.events.sqs import Sqs  # boto3 takes a second to import

            return Sqs(entry.url)
        case "file":
            return Lines(entry.path)
        case "stdout":
            return Lines(None)
