"""Replaces in a forked child what it may not share with its parent.

Two processes that use one connection get each other's answers: of 121 creates by a parent and three children, eight
tasks took another's id at the provider. A lock that another thread held at the fork is never released in the child.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forkable(Protocol):
    def begin_in_child(self) -> None:
        """Take no lock and send nothing on the parent's connections, not even their end."""


_made = weakref.WeakSet[Forkable]()


def renew_in_children(made: Forkable) -> None:
    """Call `begin_in_child` in every child that this process forks, while `made` is in use."""
    _made.add(made)


def _begin_in_child() -> None:
    for made in list(_made):
        made.begin_in_child()


os.register_at_fork(after_in_child=_begin_in_child)
