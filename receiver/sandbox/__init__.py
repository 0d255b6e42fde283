"""A stand-in for the provider: a real HTTP server that speaks Kling's protocol, with knobs for its failures.

It is an independent second party: it imports nothing of the receiver or of storage.
"""

from receiver.sandbox.knobs import Knobs
from receiver.sandbox.ledger import Ledger
from receiver.sandbox.server import Sandbox, build_app

__all__ = ["Knobs", "Ledger", "Sandbox", "build_app"]
