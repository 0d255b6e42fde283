"""A provider to try things against: a real HTTP server that speaks Kling's protocol, with knobs for its failures.

It is an independent second party: nothing of the receiver or of storage is imported here.
"""

from receiver.sandbox.knobs import Knobs
from receiver.sandbox.ledger import Ledger
from receiver.sandbox.server import Sandbox, build_app

__all__ = ["Knobs", "Ledger", "Sandbox", "build_app"]
