"""Columns and indexes that several tables share."""

from __future__ import annotations

import uuid
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, Dialect, Index, Text, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeDecorator
from sqlmodel import Field, SQLModel

from storage.database.clock import UtcTime


class Word(TypeDecorator[str]):
    """A StrEnum stored as text."""

    impl = Text
    cache_ok = True

    def __init__(self, words: type[StrEnum]) -> None:
        super().__init__()
        self.words = words

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        return None if value is None else self.words(value)


Json = JSON().with_variant(JSONB(), "postgresql")
KeyText = Text().with_variant(Text(collation="C"), "postgresql")  # sorted by bytes, as stores list keys


def time_column(*, nullable: bool = True) -> Any:
    return Field(default=None, sa_type=UtcTime, nullable=nullable)


def text_column(default: str | None = None, **options: Any) -> Any:
    return Field(default=default, sa_type=Text, nullable=default is None, **options)


class Row(SQLModel):
    """The base of all tables. Rows are not validated by pydantic, so no start builds its validators."""

    model_config = {"defer_build": True}
    # Values go to SQLAlchemy's descriptors alone. SQLModel would give each to pydantic too, which validates no row.
    __setattr__ = object.__setattr__  # type: ignore[assignment]


class Claimable(Row):
    """The claim columns. `attempts`: claims since the last progress. `losses`: claims whose lease ran out."""

    due_at: datetime | None = time_column()
    attempts: int = 0
    losses: int = 0
    lease: uuid.UUID | None = None


def partial_index(name: str, condition: str, *columns: Any, unique: bool = False) -> Index:
    where = text(condition)
    return Index(name, *columns, unique=unique, postgresql_where=where, sqlite_where=where)


def due_indexes(table: str, *, lane: str | None = None, expires: bool = False) -> tuple[Index, ...]:
    """Indexes in the orders of claims (rows/claims.py), so that a claim stops after the rows that it takes.

    `lane`: a column for which every claim of the table names a value; each lane's rows are adjacent. `expires`: the
    files have a time at which the provider deletes them. `_suspect`: the rows that may be in quarantine.
    """
    lead = [lane] if lane else []
    waits = "due_at IS NOT NULL"
    indexes = [
        partial_index(f"{table}_due", waits, *lead, "due_at", "attempts"),
        partial_index(f"{table}_suspect", f"{waits} AND losses >= 2", *lead, "due_at"),
    ]
    if expires:
        indexes.append(partial_index(f"{table}_urgent", waits, *lead, "files_expire_at", "due_at"))
    return tuple(indexes)
