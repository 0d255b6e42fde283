"""Whether what is secret could be guessed or overheard: weak secrets, and a store that is spoken to in clear text."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

from receiver.app.findings import Result, Status
from receiver.app.wiring import Parts
from receiver.base import setting_faults
from receiver.base.config import PREFIX, Settings
from storage.fetch import addresses, connection


def weak_secrets(settings: Settings) -> Iterator[Result]:
    advice = "take random ones; the next release refuses to start with those"
    for name, fault in setting_faults.weak_secrets(settings):
        yield Result(name, Status.NOTE, f"is easily guessed: {fault}", advice)


def clear_text(parts: Parts) -> Iterator[Result]:
    """Whether pictures and presigned links cross a public network unencrypted."""
    chosen = parts.settings
    urls = {"S3_ENDPOINT_URL": chosen.s3_endpoint_url, "S3_PUBLIC_ENDPOINT_URL": chosen.s3_public_endpoint_url}
    for name, url in urls.items():
        if url and url.startswith("http://") and not chosen.allow_http and _is_public(urlsplit(url).hostname or ""):
            line = "is http:// at a public address: pictures and presigned links can be read on the way"
            advice = "write https://, or set RECEIVER_ALLOW_HTTP=true; the next release refuses to start without either"
            yield Result(f"{PREFIX}{name}", Status.NOTE, line, advice)


def _is_public(host: str) -> bool:
    """Whether any address of the host may be reached over the internet. False if the name is not resolved now."""
    try:
        found = map(ipaddress.ip_address, connection.resolve(host, addresses.DEFAULT_PORTS["http"]))
        return any(addresses.forbidden(address) is None for address in found)
    except (socket.gaierror, UnicodeError, ValueError):
        return False
