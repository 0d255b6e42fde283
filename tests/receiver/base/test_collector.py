"""The garbage collector beside imports."""

from __future__ import annotations

import gc

from receiver.base.collector import collector_paused


def test_what_a_pause_made_is_in_no_later_collection() -> None:
    """The first object after the pause would otherwise cause a collection over all of it."""
    before = gc.get_freeze_count()
    with collector_paused():
        made = [[number] for number in range(10_000)]
    assert gc.get_freeze_count() - before >= len(made)
    assert gc.isenabled()
