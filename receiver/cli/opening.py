"""What every verb begins with: settings, logs, the database with its schema, and their faults in one line each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from receiver.app.wiring import Parts


@contextmanager
def opened(
    allow_http: bool = False,
    *,
    migrate: bool = False,
    ready: bool = True,
    quiet: bool = True,
    store: Path | None = None,
    starts_store: bool = False,
    **settings: Any,
) -> Iterator[Parts]:
    """The parts of a verb, closed at its end.

    `migrate`: the verb makes rows, so it may make the schema where the settings allow it; without, nothing is made.
    `ready`: look at the schema first. `quiet`: log warnings alone. `store`: the folder of a store of our own, and
    `starts_store`: the verb needs it to run. `settings`: what the verb's other options say.
    """
    from receiver.app import process
    from receiver.app.database_faults import explained
    from receiver.app.wiring import Parts
    from receiver.base import config, telemetry
    from receiver.local_store import serve_store

    chosen = config.load(allow_http=allow_http or None, store=store, **settings)
    telemetry.configure("warning" if quiet else chosen.log_level, chosen.log_format)
    with serve_store.running(chosen) if starts_store else nullcontext():
        parts = Parts(chosen)
        try:
            with explained(parts.database):
                if ready:
                    process.ready_schema(parts.database, migrate=migrate and chosen.migrates_on_start)
                yield parts
        finally:
            parts.close()
