"""From an entry of the setting to the sink it asks for."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import SecretStr

from receiver.notify import Sink
from receiver.sinks.lines import Lines
from receiver.sinks.post import Poster
from receiver.sinks.setting import Entry
from receiver.sinks.signature import Signer
from receiver.sinks.webhook import THREADS, Webhook
from storage.addresses import AddressPolicy


def make(entry: Entry, policy: AddressPolicy, secrets: Sequence[SecretStr]) -> Sink:
    """Nothing is opened before something is sent."""
    match entry.kind:
        case "webhook":
            return Webhook(entry.url, Poster(policy, connections=THREADS), Signer(secrets))
        case "sqs":
            from receiver.sinks.sqs import Sqs  # boto3 takes a second to import: only for those who have a queue

            return Sqs(entry.url)
        case "file":
            return Lines(entry.path)
        case "stdout":
            return Lines(None)
