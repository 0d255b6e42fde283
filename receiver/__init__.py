"""The receiver: submits requests to a provider, takes its callbacks, and archives the pictures.

From Python: `Receiver()`, and `AsyncReceiver(receiver)` around it for async code; see `receiver.app.library`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"  # .dev0 until it is released
__all__ = [
    "AsyncReceiver", "Conflict", "DatabaseUnavailable", "Fact", "File", "NotArchived", "Receiver", "RequestInvalid",
    "Result", "SchemaBehind", "SettingsInvalid", "StoreUnavailable",
]  # fmt: skip

if TYPE_CHECKING:
    from receiver.app.library import AsyncReceiver, Fact, File, NotArchived, Receiver, Result
    from receiver.app.process import SchemaBehind
    from receiver.base.config import SettingsInvalid
    from receiver.providers.base import RequestInvalid
    from receiver.tasks.submit import Conflict
    from storage.errors import DatabaseUnavailable, StoreUnavailable

_RAISED = {
    "Conflict": "receiver.tasks.submit",
    "DatabaseUnavailable": "storage.errors",
    "RequestInvalid": "receiver.providers.base",
    "SchemaBehind": "receiver.app.process",
    "SettingsInvalid": "receiver.base.config",
    "StoreUnavailable": "storage.errors",
}


def __getattr__(name: str) -> Any:
    """Import the library at its first use: the command line's `--help` needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_RAISED.get(name, "receiver.app.library")), name)
