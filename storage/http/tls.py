"""TLS over a socket that does not block, in steps of a bounded length.

OpenSSL reads until content comes. A host that sends handshake messages (HelloRequest, session tickets) faster than they
are handled kept it within one call, whatever the deadline: with 40 Mbit/s it held a thread and a processor for as long
as it wanted. Here OpenSSL gets at most RECEIVED_BYTES at a time, and the caller looks at its deadline in between.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from select import POLLIN, POLLOUT
from typing import TypeVar

from storage.http.thread_memory import thread_memory

T = TypeVar("T")

# As many session tickets as fit take OpenSSL some 10 ms. The socket is read as seldom as by OpenSSL itself.
RECEIVED_BYTES = 64 * 1024


class TlsSocket:
    """The client's side of a connection. Its methods raise SSLWantReadError or SSLWantWriteError if they cannot go on:
    the caller calls them again once the socket is readable or writable.
    """

    def __init__(self, connection: socket.socket, context: ssl.SSLContext, host: str | None) -> None:
        self._socket = connection
        self._received, self._sent = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._unsent = memoryview(b"")
        self._is_encrypted = False  # the block that is being sent
        self._fault: OSError | None = None  # met behind content that was read
        self.object = context.wrap_bio(self._received, self._sent, server_hostname=host)

    @property
    def is_idle(self) -> bool:
        """Whether everything that was received has been read, and none of it was at fault."""
        return not self._received.pending and not self.has_content and self._fault is None

    @property
    def has_content(self) -> bool:
        """Whether OpenSSL holds bytes of a record that was read in part."""
        return self.object.pending() > 0

    def shake_hands(self, wait: Callable[[int], None]) -> None:
        """`wait`: until the socket is readable (POLLIN) or writable (POLLOUT)."""
        is_done = False
        while not is_done:
            try:
                self.object.do_handshake()
                is_done = True
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                with suppress(OSError):
                    self._flush()  # the host learns why
                raise
            while not self._has_flushed():
                wait(POLLOUT)
            if not is_done:
                wait(POLLIN)
                with suppress(ssl.SSLWantReadError):
                    self._receive()

    def recv_into(self, buffer: memoryview) -> int:
        """Read what has arrived, as much as fits; 0 at the end of the connection."""
        return self._once_received(partial(self._decrypt_into, buffer))

    def send(self, block: memoryview) -> int:
        """Write all of a block. If it is called again, it goes on with the same block."""
        if not self._is_encrypted:
            self._once_received(partial(self.object.write, block))
            self._is_encrypted = True
        self._flush()
        self._is_encrypted = False
        return len(block)

    def _once_received(self, step: Callable[[], T]) -> T:
        """The result of a step, with what has arrived if it needs more."""
        try:
            return step()
        except ssl.SSLWantReadError:
            with suppress(BrokenPipeError, ConnectionResetError):  # what the host said before it left is still there
                self._flush()  # answers of OpenSSL to messages of the protocol itself
            self._receive()
        return step()

    def _decrypt_into(self, buffer: memoryview) -> int:
        if self._fault is not None:  # OpenSSL itself then says that the connection ended
            raise self._fault
        count = 0
        try:
            while count < len(buffer) and (more := int(self.object.read(len(buffer) - count, buffer[count:]))):
                count += more
        except ssl.SSLEOFError:
            pass  # ended without a word; only a length shows whether the content is whole
        except ssl.SSLWantReadError:
            if not count:
                raise
        except OSError as error:
            if not count:
                raise
            self._fault = error
        return count

    def _receive(self) -> None:
        room = _room_to_receive()
        try:
            count = self._socket.recv_into(room)
        except BlockingIOError:
            raise ssl.SSLWantReadError from None
        if count:
            self._received.write(room[:count])
        else:
            self._received.write_eof()

    def _flush(self) -> None:
        if not self._has_flushed():
            raise ssl.SSLWantWriteError

    def _has_flushed(self) -> bool:
        """Send what OpenSSL has made. Returns whether that was all."""
        while self._unsent or self._sent.pending:
            self._unsent = self._unsent or memoryview(self._sent.read())
            try:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
            except BlockingIOError:
                return False
        return True


_room_to_receive = thread_memory(RECEIVED_BYTES)
