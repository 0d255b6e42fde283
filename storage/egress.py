"""A proxy for all connections except those to the database and the bucket: a tunnel to a host by its name.

The proxy resolves the name, so the address is unknown here.
"""

from __future__ import annotations

import base64
import errno
import re
import socket
import time
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from storage.url_parts import ENCODE, host_and_port, split_url

MAX_HEAD_BYTES = 16 * 1024
# Used if the caller gives no timeout. The proxy has to resolve the name and to connect.
TUNNEL_SECONDS = 10.0
# RFC 3986 §3.2.1. Anything else has to be percent-encoded.
USERINFO = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:-]|%[0-9A-Fa-f]{2})*")
STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3})[ \r]")


@dataclass(frozen=True)
class EgressProxy:
    """An HTTP proxy. `url`: `http://[USER:PASSWORD@]HOST:PORT`. Raises ValueError for another form."""

    url: str = field(repr=False)

    def __post_init__(self) -> None:
        parts = split_url(self.url)
        is_plain = parts.path in ("", "/") and not set("?#") & set(self.url)
        is_encoded = USERINFO.fullmatch(parts.netloc.rpartition("@")[0])
        if parts.scheme != "http" or not parts.hostname or not parts.port or not is_plain or not is_encoded:
            raise ValueError(f"write http://HOST:PORT or http://USER:PASSWORD@HOST:PORT, and {ENCODE}")

    @property
    def place(self) -> str:
        """Host and port, without the password."""
        return host_and_port(self.url)

    @property
    def name(self) -> str:
        return f"the egress proxy {self.place}"

    def connect(self, host: str, port: int, timeout: float | None) -> socket.socket:
        """A connection to `host` through the proxy (CONNECT, RFC 9110 §9.3.6). Raises OSError that names the proxy."""
        ends = time.monotonic() + (timeout or TUNNEL_SECONDS)
        tunnel = self._reach(timeout or TUNNEL_SECONDS)
        try:
            tunnel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            tunnel.sendall(self._request(host, port))
            head = b""
            while b"\r\n\r\n" not in head:
                tunnel.settimeout(max(0.001, ends - time.monotonic()))
                try:
                    received = tunnel.recv(MAX_HEAD_BYTES)
                except OSError as error:
                    raise OSError(error.errno or errno.ETIMEDOUT, f"{self.name} gave no answer") from error
                head += received
                if not received or len(head) > MAX_HEAD_BYTES:
                    raise OSError(errno.EPROTO, f"{self.name} broke off its answer")
            status = STATUS.match(head)
            if status is None or not status[1].startswith(b"2"):
                said = status[1].decode() if status else "no HTTP"
                raise OSError(errno.ECONNREFUSED, f"{self.name} answered {said}")
            if not head.endswith(b"\r\n\r\n"):  # no host that we reach through a proxy sends before it gets a request
                raise OSError(errno.EPROTO, f"{self.name} added bytes to its answer")
        except BaseException:
            tunnel.close()
            raise
        return tunnel

    def _reach(self, timeout: float) -> socket.socket:
        parts = urlsplit(self.url)
        try:
            return socket.create_connection((str(parts.hostname), parts.port or 0), timeout)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise OSError(error.errno or errno.ETIMEDOUT, f"{self.name} cannot be reached ({reason})") from error

    def _request(self, host: str, port: int) -> bytes:
        authority, parts = f"[{host}]:{port}" if ":" in host else f"{host}:{port}", urlsplit(self.url)
        lines = [f"CONNECT {authority} HTTP/1.1", f"Host: {authority}"]
        if parts.username:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            lines.append(f"Proxy-Authorization: Basic {base64.b64encode(pair).decode()}")
        return "\r\n".join([*lines, "", ""]).encode("ascii")
