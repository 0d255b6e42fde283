"""The findings of a run: figures and faults."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Outcome:
    """The findings at the end. `faults`: empty = the promise holds."""

    faults: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def report(self) -> int:
        """Print all of it. Returns the exit code of the run."""
        lines = [f"{name}: {figure}\n" for name, figure in self.figures.items()]
        sys.stdout.write("".join(lines + [f"FAULT {fault}\n" for fault in self.faults]))
        sys.stdout.flush()
        return 1 if self.faults else 0
