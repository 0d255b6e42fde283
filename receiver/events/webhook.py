"""Events to an HTTPS receiver: CloudEvents in structured JSON, signed as Standard Webhooks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime

from receiver.base.signature import Signer
from receiver.events.cloudevents import MEDIA_TYPE
from receiver.events.dispatcher import Message, Outcome, one_by_one
from receiver.events.http_post import Poster
from storage.errors import GiveUp, Retry

# One transaction settles this many messages. That halves the cost of rows, and bounds what a crash sends twice.
BATCH = 8
# Messages behind a slow answer go to another thread or process.
BATCH_SECONDS = 5.0
THREADS = 4


class Webhook:
    """A `receiver.events.dispatcher.Sink`. `url` is never shown, because it may contain a token."""

    batch = BATCH
    threads = THREADS

    def __init__(self, url: str, poster: Poster, signer: Signer) -> None:
        self._url = url
        self._poster = poster
        self._signer = signer

    def send(self, messages: Sequence[Message]) -> list[Outcome]:
        ends = time.monotonic() + BATCH_SECONDS
        return one_by_one(messages, self._post, until=lambda: time.monotonic() > ends)

    def _post(self, message: Message) -> Outcome:
        headers = self._signer.headers(message.id, message.body, datetime.now(UTC))
        try:
            return self._poster.post(self._url, message.body, {"Content-Type": MEDIA_TYPE, **headers}).outcome()
        except (Retry, GiveUp) as error:
            return error

    def check(self) -> str:
        """Resolve the name and check its addresses. Nothing is sent to the receiver."""
        return self._poster.check(self._url)

    def close(self) -> None:
        self._poster.close()
