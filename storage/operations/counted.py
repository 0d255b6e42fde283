"""A number of things in words."""

from __future__ import annotations


def counted(number: int, one: str, many: str = "") -> str:
    """`1 task` or `1,200 tasks`. `many`: where it is not `one` with an s."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"
