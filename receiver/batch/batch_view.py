"""The progress of a batch in the terminal: how many tasks are in each state, their rate, and the time that is left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from storage.accounts.batches import Counts

POLL_INTERVAL_SECONDS = 1.0
# A task takes half a minute (KLING §7). A rate over five minutes is steady enough to estimate the time that is left.
RATE_SECONDS = 300.0
# Without a terminal, one line in this interval.
LINE_SECONDS = 30.0
WAITS_INTERVAL_SECONDS = 10.0


class Rate:
    """Tasks that ended per second, over the last five minutes. `now`: monotonic seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def see(self, over: int, now: float) -> float:
        """Note how many tasks are over. Returns tasks per second, 0 if unknown."""
        self._seen.append((now, over))
        while self._seen[0][0] < now - RATE_SECONDS:
            self._seen.popleft()
        first_at, first = self._seen[0]
        return (over - first) / (now - first_at) if now > first_at else 0.0


def words(counts: Counts, rate: float = 0) -> str:
    """One line: the tasks in each state, the failures, and when all are over at this rate."""
    stand = {
        "queued": counts.queued,
        "sending": counts.sending,
        "running": counts.running,
        "archiving": counts.archiving,
        "archived": counts.archived,
        "incomplete": counts.incomplete,
        "failed": counts.failed,
        "deleted": counts.deleted,
    }
    always = ("queued", "running", "archived", "failed")
    parts = [f"{name} {count:,}" for name, count in stand.items() if count or name in always]
    if counts.silent:
        parts.append(f"silent for a day {counts.silent:,}")
    if rate > 0:
        left = timedelta(seconds=round((counts.total - counts.over) / rate))
        parts.append(f"{rate * 60:,.1f}/min, {left} left")
    return " · ".join(parts)


def watch(
    look: Callable[[], Counts],
    workers: Callable[[], int],
    console: Console,
    paused: Callable[[], Sequence[str]] = lambda: (),
    waiting: Callable[[], Sequence[str]] = lambda: (),
) -> Counts:
    """Show the progress until all tasks of the batch are over. Returns their counts. Ctrl-C ends only the display.

    `paused`: a line for each account or model whose creates wait. `waiting`: one for each answer that keeps others.
    """
    rate, is_live = Rate(), console.is_terminal
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not is_live) as progress:
        bar = progress.add_task("", total=None)
        looked_at = said_at = float("-inf")
        alive, waits = 1, list[str]()
        while True:
            now, counts = time.monotonic(), look()
            if now - looked_at > WAITS_INTERVAL_SECONDS:
                looked_at, alive, waits = now, workers(), [*waiting()]
            notes = [*(paused() if counts.queued else ()), *waits, *([] if alive else ["NO WORKER IS ALIVE"])]
            line = " · ".join([words(counts, rate.see(counts.over, now)), *notes])
            progress.update(bar, total=counts.total, completed=counts.over, description=escape(line))
            is_over = counts.over == counts.total
            if not is_live and (is_over or now - said_at > LINE_SECONDS):
                said_at = now
                console.print(f"{counts.over:,}/{counts.total:,} {line}", highlight=False, markup=False, soft_wrap=True)
            if is_over:
                return counts
            time.sleep(POLL_INTERVAL_SECONDS)
