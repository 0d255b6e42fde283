"""A lazy attribute that is made once, even if several threads need it first."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class cached_property(Generic[T]):
    """`functools.cached_property` with a lock, which the original lacks from Python 3.12 on.

    Without a lock each of several first threads makes a value, and all values but the last leak their connections.
    Reading a value that exists takes no lock.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self._name = make.__name__
        self._making = threading.RLock()
        self.__doc__ = make.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        if instance is None:
            return self  # type: ignore[return-value] # on the class, for tools
        made: dict[str, T] = instance.__dict__  # attribute lookup finds the value there first from then on
        with self._making:
            if self._name not in made:
                made[self._name] = self._make(instance)
            return made[self._name]
