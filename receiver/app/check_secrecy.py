"""Checks of what an attacker could guess or overhear: weak secrets, and a store that is reached in clear text."""

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
    """Check whether pictures and presigned links cross a network unencrypted. A private network may have other users,
    too.
    """
    chosen = parts.settings
    urls = {"S3_ENDPOINT_URL": chosen.s3_endpoint_url, "S3_PUBLIC_ENDPOINT_URL": chosen.s3_public_endpoint_url}
    for name, url in urls.items():
        if not url or not url.startswith("http://") or chosen.allow_http:
            continue
        found = _addresses(urlsplit(url).hostname or "")
        if found and all(address.is_loopback for address in found):
            continue
        is_public = any(addresses.forbidden(address) is None for address in found)
        where = "at a public address" if is_public else "over a network"
        line = f"is http:// {where}: pictures and presigned links can be read on the way"
        advice = "write https://, or set RECEIVER_ALLOW_HTTP=true"
        advice += "; the next release refuses to start without either" if is_public else " if the network is yours"
        yield Result(f"{PREFIX}{name}", Status.NOTE, line, advice)


def _addresses(host: str) -> list[addresses.Address]:
    """The addresses of the host. Empty if its name does not resolve now."""
    try:
        return [ipaddress.ip_address(each) for each in connection.resolve(host, addresses.DEFAULT_PORTS["http"])]
    except (socket.gaierror, UnicodeError, ValueError):
        return []
