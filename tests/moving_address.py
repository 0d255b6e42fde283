"""An address on loopback that leads to a port, and later to another: what a managed database's name does."""

from __future__ import annotations

import contextlib
import socket
import threading


class MovingAddress:
    """Forwards connections while it is entered. `move` ends those there are; new ones go to the new port."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        self._open: set[socket.socket] = set()
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> MovingAddress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.move(0)
        self._thread.join(20)

    def move(self, target: int) -> None:
        self._target = target
        for each in list(self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._forward, args=(self._listening.accept()[0],), daemon=True).start()

    def _forward(self, ours: socket.socket) -> None:
        with ours, contextlib.suppress(OSError):
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
