"""A store with faults: some answers are 500 or 503, slow, lost, or the connection is reset mid-body."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler

from receiver.local_store.seaweed import Seaweed
from tests.chaos.plan import STORE_FAULTS
from tests.fault_proxy import Answer, FaultProxy, Forward, Request, handler_for

FAULT_SHARE = 0.25
# The probe of a new worker is some fifteen requests, all of which must succeed.
PROBE_FAULT_SHARE = 0.02
SLOW_SECONDS = (0.3, 2.0)
ERROR = b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code><Message>a bad day</Message></Error>'
RESET_AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: the close is a reset


class ChaosStore(FaultProxy):
    """Each fault happens once early on, then by chance. `counts`: how often each did."""

    def __init__(self, store: Seaweed, seed: int) -> None:
        super().__init__(store, self._spoil)
        self.counts: Counter[str] = Counter()
        self.is_calm = False
        self._rng = random.Random(f"store {seed}")
        self._first = self._rng.sample(STORE_FAULTS, len(STORE_FAULTS))
        self._lock = threading.Lock()
        self._server.RequestHandlerClass = resetting(handler_for(self), self)

    def draws(self, kind: str | None, path: str) -> str:
        """The fault for this request; "" = none. `kind`: the only possible one now, None = any other."""
        with self._lock:
            if self.is_calm:
                return ""
            probing = ".receiver-probe" in path
            possible = [name for name in STORE_FAULTS if (name == kind if kind else name != "store reset mid-body")]
            first = next((name for name in self._first if name in possible and not probing), "")
            share = (PROBE_FAULT_SHARE if probing else FAULT_SHARE) * len(possible) / len(STORE_FAULTS)
            fault = first or (self._rng.choice(possible) if self._rng.random() < share else "")
            if fault:
                self.counts[fault] += 1
                self._first = [name for name in self._first if name != fault]
            return fault

    def _spoil(self, request: Request, forward: Forward) -> Answer | None:
        fault = self.draws(None, request.path)
        if fault in ("store 500", "store 503"):
            code = b"InternalError" if fault == "store 500" else b"SlowDown"
            return Answer(int(fault[-3:]), {"content-type": "application/xml"}, ERROR % code)
        if fault == "store request lost":
            return None
        if fault == "store slow":
            time.sleep(self._rng.uniform(*SLOW_SECONDS))
        try:
            answer = forward(request)
        except (OSError, http.client.HTTPException):  # the worker is stopped
            return None
        return None if fault == "store answer lost" else answer


def resetting(handler: type[BaseHTTPRequestHandler], store: ChaosStore) -> type[BaseHTTPRequestHandler]:
    """The handler, which resets some uploads after half of the body."""

    class Resetting(handler):  # type: ignore[valid-type, misc]
        def do_PUT(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            if length > 1 and store.draws("store reset mid-body", self.path):
                self.rfile.read(length // 2)
                self.close_connection = True
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_ONCE)
                self.connection.close()
                return
            super().do_PUT()

        def handle(self) -> None:
            with contextlib.suppress(OSError, ValueError):  # the client died, or its connection was reset
                super().handle()

        def finish(self) -> None:
            with contextlib.suppress(OSError, ValueError):
                super().finish()

    return Resetting
