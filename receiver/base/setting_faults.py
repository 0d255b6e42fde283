"""Faults of settings that are valid each by itself: two that exclude each other, and weak secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from receiver.base.signature import key_of
from storage.url_parts import is_on_loopback

if TYPE_CHECKING:
    from receiver.base.config import Settings

PREFIX = "RECEIVER_"
SECRET_MIN_CHARACTERS = 32
KEY_MIN_CHARACTERS = 24
CREDENTIAL = re.compile(r"[\x21-\x7e]+")


def contradictions(settings: Settings) -> Iterator[str]:
    """A line for each fault of settings that are valid each by itself, with the variables to change."""
    urls = [url.get_secret_value() for url in (settings.database_url, settings.database_direct_url) if url]
    if len(urls) == 2 and any(url.startswith("sqlite") for url in urls):
        yield f"{PREFIX}DATABASE_DIRECT_URL: is for PostgreSQL behind a pooler; leave it out with SQLite"
    if settings.public_url and not settings.callback_secrets:
        yield f"{PREFIX}CALLBACK_SECRETS: required with {PREFIX}PUBLIC_URL; `receiver check` prints a fresh one"
    if any(len(secret.get_secret_value()) < SECRET_MIN_CHARACTERS for secret in settings.callback_secrets):
        yield f"{PREFIX}CALLBACK_SECRETS: each needs at least {SECRET_MIN_CHARACTERS} characters"
    if any(not secret.get_secret_value().startswith("whsec_") for secret in settings.kling_webhook_secrets):
        yield f"{PREFIX}KLING_WEBHOOK_SECRETS: each starts with whsec_, as the provider's console shows it"
    if bool(settings.kling_access_key) != bool(settings.kling_secret_key):
        yield f"{PREFIX}KLING_ACCESS_KEY and {PREFIX}KLING_SECRET_KEY: set both or neither"
    if settings.s3_kms_key_id and settings.s3_sse != "aws:kms":
        yield f"{PREFIX}S3_KMS_KEY_ID: needs {PREFIX}S3_SSE=aws:kms"
    if settings.store and settings.s3_endpoint_url:
        yield f"{PREFIX}STORE and {PREFIX}S3_ENDPOINT_URL: each names a store; leave one out"
    if bool(settings.s3_lock_mode) != bool(settings.s3_lock_days):
        yield f"{PREFIX}S3_LOCK_MODE and {PREFIX}S3_LOCK_DAYS: set both or neither"
    bearers = {"API_KEYS": settings.api_keys, "METRICS_TOKEN": filter(None, [settings.metrics_token])}
    for name, keys in bearers.items():
        if any(not CREDENTIAL.fullmatch(key.get_secret_value()) for key in keys):
            yield f"{PREFIX}{name}: write printable ASCII without spaces, as it stands in an Authorization header"
    try:
        _ = settings.console_people
    except ValueError as error:
        yield from (f"{PREFIX}CONSOLE_KEYS: {line}" for line in str(error).splitlines())
    yield from _event_faults(settings)
    yield from _credential_faults(settings)
    for name, url in (("PUBLIC_URL", settings.public_url), ("KLING_BASE_URL", settings.kling_base_url)):
        if url and url.startswith("http://") and not settings.allow_http and not is_on_loopback(url):
            yield f"{PREFIX}{name}: must be https, or give --allow-http if the network in between is yours"


def _credential_faults(settings: Settings) -> Iterator[str]:
    keys = {"KLING_API_KEY": settings.kling_api_key, "KLING_SECRET_KEY": settings.kling_secret_key}
    given = {name: key.get_secret_value() for name, key in keys.items() if key is not None}
    for name, key in {**given, "KLING_ACCESS_KEY": settings.kling_access_key or "-"}.items():
        if key.lower().startswith("bearer "):
            yield f'{PREFIX}{name}: write the key alone, without "Bearer" before it'
        elif not CREDENTIAL.fullmatch(key):
            yield f"{PREFIX}{name}: must be printable ASCII without spaces, as the provider shows it"


def _event_faults(settings: Settings) -> Iterator[str]:
    try:
        wanted = settings.event_entries
    except ValueError as error:
        yield from (f"{PREFIX}EVENT_SINKS: {line}" for line in str(error).splitlines())
        wanted = []
    try:
        for secret in settings.event_secrets:
            key_of(secret)
    except ValueError as error:
        yield f"{PREFIX}EVENT_SECRETS: {error}"
    if not settings.event_secrets and any(entry.kind == "webhook" for entry in wanted):
        yield f"{PREFIX}EVENT_SECRETS: required with a webhook in {PREFIX}EVENT_SINKS, which would be unsigned"


def weak_secrets(settings: Settings) -> Iterator[tuple[str, str]]:
    """Each variable with a secret that can be guessed, and what it needs. The next release refuses those."""
    # Only the secret of ACCESS_KEY:SECRET_KEY counts. Kling's have 32 characters, as HS256 requires (RFC 7518 §3.2).
    keys = [key.get_secret_value().rpartition(":") for key in settings.api_keys]
    if any(len(key) < (SECRET_MIN_CHARACTERS if access else KEY_MIN_CHARACTERS) for access, _, key in keys):
        least = f"{KEY_MIN_CHARACTERS} characters, a secret key {SECRET_MIN_CHARACTERS}"
        yield f"{PREFIX}API_KEYS", f"each needs at least {least}"
    if settings.metrics_token and len(settings.metrics_token.get_secret_value()) < KEY_MIN_CHARACTERS:
        yield f"{PREFIX}METRICS_TOKEN", f"needs at least {KEY_MIN_CHARACTERS} characters"
    try:
        for secret in settings.kling_webhook_secrets:
            key_of(secret)
    except ValueError as error:
        yield f"{PREFIX}KLING_WEBHOOK_SECRETS", str(error)
