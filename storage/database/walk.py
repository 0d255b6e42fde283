"""Walks through a table along an index, in parts of a bounded number of rows: no statement grows with the table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import or_
from sqlmodel import select

from storage.database.sessions import Database


def parts(
    database: Database, order: Sequence[Any], size: int, *within: Any, column: Any = None
) -> Iterator[tuple[list[Any], Any]]:
    """The conditions of each part, and the value of `column` in its last row; None for the last part.

    `order`: one or two columns that an index begins with, together unique. Rows may change between two parts, but not
    in these columns.
    """
    behind: list[Any] = []
    columns: Any = (*order, order[0] if column is None else column)
    while True:
        ahead = select(*columns).where(*within, *behind).order_by(*order).offset(size - 1).limit(1)
        with database.read() as session:
            last = session.execute(ahead).first()
        if last is None:
            yield [*within, *behind], None
            return
        *key, value = last
        yield [*within, *behind, *_up_to(order, key)], value
        behind = _behind(order, key)


def _behind(order: Sequence[Any], key: Sequence[Any]) -> list[Any]:
    """The condition for rows behind this one. Its first part can use the index; PostgreSQL uses none for a pair."""
    if len(order) == 1:
        return [order[0] > key[0]]
    return [order[0] >= key[0], or_(order[0] > key[0], order[1] > key[1])]


def _up_to(order: Sequence[Any], key: Sequence[Any]) -> list[Any]:
    if len(order) == 1:
        return [order[0] <= key[0]]
    return [order[0] <= key[0], or_(order[0] < key[0], order[1] <= key[1])]
