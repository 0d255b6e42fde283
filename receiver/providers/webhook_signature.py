"""Checks the signature of a callback by Standard Webhooks, for every provider that signs so."""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from standardwebhooks.webhooks import Webhook

from receiver.providers.base import BadSignature

# Standard Webhooks and Kling's page of 2026-08-07 both say five minutes, in both directions.
SIGNATURE_TOLERANCE_SECONDS = 300
# Two secrets sign during a rotation. More signatures than this only cost time.
MAX_SIGNATURES = 10
MAX_WEBHOOK_ID_CHARS = 200


def verify_standard_webhook(secrets: Sequence[Webhook], headers: Mapping[str, str], body: bytes, *, now: float) -> str:
    """Check a Standard Webhooks delivery against every secret. Returns its `webhook-id`.

    `now`: Unix seconds. Raises BadSignature. Source: standardwebhooks.com specification, Kling 2026-08-07. The package
    computes the signature. The checks are ours, because its `verify` raises ValueError and binascii.Error on hostile
    headers and reads the clock itself.
    """
    named = {name.lower(): value for name, value in headers.items()}
    webhook_id = named.get("webhook-id", "")
    timestamp = named.get("webhook-timestamp", "")
    signatures = named.get("webhook-signature", "").split(" ")
    if not (webhook_id and timestamp and signatures != [""]):
        raise BadSignature("a signature header is missing")
    if len(webhook_id) > MAX_WEBHOOK_ID_CHARS or not (webhook_id.isascii() and webhook_id.isprintable()):
        raise BadSignature("webhook-id is not an id")
    if not re.fullmatch(r"[1-9][0-9]{0,11}", timestamp):
        raise BadSignature("webhook-timestamp is not a time")
    if abs(now - int(timestamp)) > SIGNATURE_TOLERANCE_SECONDS:
        raise BadSignature("webhook-timestamp is more than 300 s from our clock")
    given = [signature.encode("utf-8", "replace") for signature in signatures[:MAX_SIGNATURES]]
    wanted = _signatures(secrets, webhook_id, int(timestamp), body)
    # sum() instead of any(), so that the time does not depend on which secret matched.
    if not sum(hmac.compare_digest(ours, theirs) for ours in wanted for theirs in given):
        raise BadSignature("no signature matches")
    return webhook_id


def _signatures(secrets: Sequence[Webhook], webhook_id: str, timestamp: int, body: bytes) -> list[bytes]:
    moment = datetime.fromtimestamp(timestamp, tz=UTC)
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise BadSignature("no signature matches") from None
    return [str(secret.sign(webhook_id, moment, text)).encode() for secret in secrets]
