"""Statements are compiled once for all engines of a process, because each test and each command opens its own."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.util import LRUCache


def compile_once() -> None:
    """From now on until the process ends, also in processes that are forked from it.

    A compiled statement is kept by its dialect, so dialects of one class and one driver count as equal.
    """
    kept: LRUCache[Any, Any] = LRUCache(5_000)

    def use_kept(connection: Connection) -> None:
        connection.execution_options(compiled_cache=kept)

    DefaultDialect.__eq__ = lambda one, other: type(one) is type(other)  # type: ignore[method-assign]
    DefaultDialect.__hash__ = lambda one: hash(type(one))  # type: ignore[method-assign]
    event.listen(Engine, "engine_connect", use_kept)
