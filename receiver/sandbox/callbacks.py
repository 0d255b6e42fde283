"""Sends callbacks as the provider does: Java's HTTP client, no redirects, a few tries."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from urllib.parse import urlsplit

import httpx
from standardwebhooks import Webhook

from receiver.sandbox.access import is_loopback
from receiver.sandbox.knobs import Knobs
from receiver.sandbox.ledger import Attempt, Callback

# Recorded from real traffic.
HEADERS = {
    "Content-Type": "application/json; charset=utf-8",
    "User-Agent": "Apache-HttpClient/4.5.14 (Java/17.0.9)",
    "Accept-Encoding": "gzip,deflate",
    "Connection": "Keep-Alive",
}
# What Java's HttpClient and `curl --http2` add (RFC 7540 §3.2); the settings are empty.
HTTP2_OFFER = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": ""}
MAX_AT_ONCE = 32
# A short answer is read to its end, undecoded, so that its connection is kept.
MAX_ANSWER_BYTES = 64 * 1024


def signed_headers(callback: Callback, secrets: Sequence[str], now: datetime) -> dict[str, str]:
    """Standard Webhooks headers, one signature per secret; none without secrets. `now`: aware, in UTC."""
    if not secrets:
        return {}
    body = callback.body.decode("utf-8")
    signatures = [Webhook(secret).sign(callback.webhook_id, now, body) for secret in secrets]
    return {
        "webhook-id": callback.webhook_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(signatures),
    }


class Sender:
    """Delivers callbacks and notes every attempt in them. Used and closed within one event loop."""

    def __init__(self) -> None:
        # No proxy from the environment, so a callback goes to its URL or nowhere.
        self._client = httpx.AsyncClient(trust_env=False, follow_redirects=False, headers=HEADERS)
        del self._client.headers["Accept"]  # httpx's own default; the recorded client sends none
        self._turns = asyncio.Semaphore(MAX_AT_ONCE)

    async def close(self) -> None:
        await self._client.aclose()

    async def send_all(self, callbacks: Sequence[Callback], knobs: Knobs) -> None:
        """Send them one after the other, each until it is answered 200 or its tries are used up."""
        await asyncio.sleep(knobs.callback_delay_seconds)
        for callback in callbacks:
            await self._send(callback, knobs)

    async def _send(self, callback: Callback, knobs: Knobs) -> None:
        for number in range(knobs.callback_tries):
            if number:
                await asyncio.sleep(knobs.callback_backoff_seconds * 2 ** (number - 1))
            async with self._turns:
                attempt = await self._send_once(callback, knobs)
            callback.attempts.append(attempt)
            if attempt.http_status == 200:
                return

    async def _send_once(self, callback: Callback, knobs: Knobs) -> Attempt:
        at_ms = time.time_ns() // 1_000_000
        host = urlsplit(callback.url).hostname or ""
        # Checked again before every try, because a name may resolve differently by now.
        if not knobs.allow_remote_callbacks and not await asyncio.to_thread(is_loopback, host):
            return Attempt(at_ms, None, "NotLoopback")
        headers = signed_headers(callback, knobs.webhook_secrets, datetime.now(UTC))
        headers |= HTTP2_OFFER if knobs.callback_offers_http2 else {}
        try:
            async with asyncio.timeout(knobs.callback_timeout_seconds):
                sent = self._client.stream("POST", callback.url, content=callback.body, headers=headers)
                async with sent as answer:
                    await _read_a_little(answer)
        except Exception as error:  # noqa: BLE001 - a listener killed meanwhile shows as an AttributeError of asyncio's
            return Attempt(at_ms, None, type(error).__name__)
        return Attempt(at_ms, answer.status_code)


async def _read_a_little(answer: httpx.Response) -> None:
    async for _ in answer.aiter_raw():
        if answer.num_bytes_downloaded > MAX_ANSWER_BYTES:
            return
