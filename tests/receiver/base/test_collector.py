"""What a start leaves out."""

from __future__ import annotations

import gc
import subprocess
import sys

from receiver.base.collector import collector_paused


def test_objects_made_during_a_pause_are_in_no_later_collection() -> None:
    """The first object after the pause would otherwise cause a collection over all of it."""
    before = gc.get_freeze_count()
    with collector_paused():
        made = [[number] for number in range(10_000)]
    assert gc.get_freeze_count() - before >= len(made)
    assert gc.isenabled()


def test_serve_imports_rich_only_when_a_table_is_printed() -> None:
    lines = (
        "import sys",
        "from receiver.base.collector import import_without_rich",
        "import_without_rich()",
        "import receiver.app.process, receiver.web.app",
        "assert 'rich' not in sys.modules, 'printing tables is all that needs it'",
        "import rich.console, httpx, structlog",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=60)
