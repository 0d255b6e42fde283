"""A process that decodes pictures, for one thread. It is killed when it takes too long, and started when needed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from storage.thumbnails.decode import LENGTH_BYTES

PROGRAM = Path(__file__).with_name("decode.py")
# A PNG of 50 million pixels takes 2 s of a quiet machine. The process has a low priority.
DECODE_SECONDS = 15.0
# 480 x 480 pixels as RGBA have 921,600 bytes.
MAX_THUMBNAIL_BYTES = 2**20
# What an interpreter needs to find itself and its libraries. The rest of our environment holds secrets.
PASSED = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG")


class NoThumbnail(Exception):
    """No small copy can be made of this content: it is no picture, or takes too long or too much memory."""


class Decoder:
    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False
        self._working = threading.Lock()

    @property
    def process_id(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def shrink(self, content: bytes) -> bytes:
        """A small WebP of a picture. Raises `NoThumbnail`."""
        with self._working:
            try:
                is_kept, began = self._process is not None, time.monotonic()
                small = self._exchange(content)
                # A kept process has ended after a rest. Another try of a picture that took too long takes as long.
                if small is None and is_kept and time.monotonic() - began < DECODE_SECONDS:
                    small = self._exchange(content)
            except (OSError, RuntimeError) as error:  # no process, or no thread for the timer
                raise NoThumbnail(str(error)) from error
        if not small:
            raise NoThumbnail("it cannot be decoded within its bounds")
        return small

    def close(self) -> None:
        """End the process, and what it decodes. Any thread may call it."""
        self._is_closed = True
        if (process := self._process) is not None:
            process.kill()
        with self._working:
            self._end()

    def _exchange(self, content: bytes) -> bytes | None:
        """The answer of the process. None: it has ended without one."""
        if self._is_closed:
            return None
        process = self._process = self._process or _started()
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(DECODE_SECONDS, process.kill)
        timer.start()
        try:
            process.stdin.write(len(content).to_bytes(LENGTH_BYTES, "big") + content)
            process.stdin.flush()
            if len(head := process.stdout.read(LENGTH_BYTES)) == LENGTH_BYTES:
                size = int.from_bytes(head, "big")
                if size <= MAX_THUMBNAIL_BYTES and len(small := process.stdout.read(size)) == size:
                    return small
        except BrokenPipeError:
            pass
        finally:
            timer.cancel()
        self._end()
        return None

    def _end(self) -> None:
        if (process := self._process) is not None:
            self._process = None
            process.kill()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # it would write what is left in its buffer
                    pipe.close()  # type: ignore[union-attr]
            process.wait()


def _started() -> subprocess.Popen[bytes]:
    environment = {name: os.environ[name] for name in PASSED if name in os.environ}
    command, pipe = [sys.executable, "-P", str(PROGRAM)], subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment)  # noqa: S603 - our own words
