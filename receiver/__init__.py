"""Our conversation with the provider: ask, listen, ask again.

From Python: `Receiver()`, and `AsyncReceiver(receiver)` around it for async code; see `receiver.app.library`.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["AsyncReceiver", "Fact", "File", "NotArchived", "Receiver", "Result"]

if TYPE_CHECKING:
    from receiver.app.library import AsyncReceiver, Fact, File, NotArchived, Receiver, Result


def __getattr__(name: str) -> Any:
    """Import the library when it is first asked for: the command line's `--help` needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from receiver.app import library

    return getattr(library, name)
