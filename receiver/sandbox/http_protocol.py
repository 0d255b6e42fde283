"""Sends HTTP with an invalid header line. uvicorn refuses to write one, so it is inserted behind uvicorn."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# A header of this name is sent as an invalid line.
JUNK_NAME = "x-sandbox-junk"
WRITTEN, SENT = f"{JUNK_NAME}: junk\r\n".encode(), b"this line is no header\r\n"


class FaultyHttp(HttpToolsProtocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_FaultyTransport(transport))  # type: ignore[arg-type]


class _FaultyTransport:
    """A transport that replaces the header in the bytes that are written."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def write(self, data: bytes) -> None:
        self._transport.write(data.replace(WRITTEN, SENT, 1))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
