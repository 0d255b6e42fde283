"""An address on loopback that leads to a port, and later to another, like a managed database's name."""

from __future__ import annotations

import contextlib
import socket
import threading

from tests.loopback import Listener


class MovingAddress:
    """Forwards connections while it is entered. `move` closes open connections; new ones go to the new port."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._open: set[socket.socket] = set()
        self._listener = Listener(self._forward)
        self.port = self._listener.port

    def __enter__(self) -> MovingAddress:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self.move(0)

    def move(self, target: int) -> None:
        self._target = target
        for each in list(self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _forward(self, ours: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", self._target), timeout=10) as theirs:
            theirs.settimeout(None)
            ends = {ours, theirs}
            self._open |= ends
            back = threading.Thread(target=self._copy, args=(theirs, ours), daemon=True)
            back.start()
            self._copy(ours, theirs)
            back.join()
            self._open -= ends

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
