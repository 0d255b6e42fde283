"""A part of an object that is made when it is first asked for, once, whoever asks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class made_once(Generic[T]):
    """As `functools.cached_property`, under a lock: from Python 3.12 on that has none, so several threads that come
    first each make one, and all but the last are leaked with their connections. Once made it costs no lock."""

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self._name = make.__name__
        self._making = threading.RLock()
        self.__doc__ = make.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        if instance is None:
            return self  # type: ignore[return-value] # asked of the class, as tools do
        made: dict[str, T] = instance.__dict__  # found there before this method from then on
        with self._making:
            if self._name not in made:
                made[self._name] = self._make(instance)
            return made[self._name]
