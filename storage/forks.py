"""Replaces in a forked child what it may not share with its parent.

Two processes that use one connection get each other's answers: of 121 creates by a parent and three children, eight
tasks took another's id at the provider. A lock that another thread held at the fork is never released in the child.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

# How long a fork waits for other threads. A transaction takes some milliseconds.
WAIT_SECONDS = 5.0


class Forkable(Protocol):
    def begin_in_child(self) -> None:
        """Take no lock and send nothing on the parent's connections, not even their end."""


_made = weakref.WeakSet[Forkable]()
_forking = threading.Lock()
_inside = dict[int, int]()  # how many `unforked` blocks a thread is in


def renew_in_children(made: Forkable) -> None:
    """Call `begin_in_child` in every child that this process forks, while `made` is in use."""
    _made.add(made)


@contextmanager
def unforked() -> Iterator[None]:
    """Enclose what no other thread may fork in, for example the use of a library with locks of its own.

    A fork waits for the end of these blocks, at most `WAIT_SECONDS`, and lets none begin meanwhile.
    """
    me = threading.get_ident()
    while True:
        depth = _inside.get(me, 0)
        _inside[me] = depth + 1
        if depth or not _forking.locked():
            break
        del _inside[me]
        with _forking:
            pass
    try:
        yield
    finally:
        if depth:
            _inside[me] = depth
        else:
            del _inside[me]


def _before() -> None:
    _forking.acquire()
    end = time.monotonic() + WAIT_SECONDS
    while _inside.keys() - {threading.get_ident()} and time.monotonic() < end:
        time.sleep(0.0005)


def _after() -> None:
    _forking.release()  # looked up at each fork, because a child has another lock than its parent


def _begin_in_child() -> None:
    global _forking
    _forking = threading.Lock()
    for thread in _inside.keys() - {threading.get_ident()}:
        del _inside[thread]
    for made in list(_made):
        made.begin_in_child()


os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_begin_in_child)
