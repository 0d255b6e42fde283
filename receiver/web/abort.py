"""Closing a connection from its handler, without sending what is buffered."""

from __future__ import annotations

from starlette.types import Receive, Scope

# The ASGI extension of `http_protocol.py` for this: a function without arguments.
ABORT = "receiver.abort"


async def abort(scope: Scope, receive: Receive) -> None:
    """Close the connection, then wait until uvicorn knows: it logs an incomplete answer as an error otherwise."""
    scope["extensions"][ABORT]()
    while (await receive())["type"] != "http.disconnect":
        pass
