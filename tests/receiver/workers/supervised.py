"""`python -m`: a supervisor whose workers do what a test wants. Each leaves its process id in a folder.

Arguments: the number of workers, their grace time in seconds, the folder, what they do.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from receiver.base import telemetry
from receiver.workers.supervisor import Supervisor


def fork_once_refused() -> Callable[[], int]:
    """An `os.fork` that fails once for lack of memory, as after the kernel killed a worker."""
    fork, refused = os.fork, [OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))]

    def tried() -> int:
        if refused:
            raise refused.pop()
        return fork()

    return tried


def work(folder: Path, behaviour: str) -> None:
    if behaviour == "ends slowly":
        signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), os._exit(0)))
    elif behaviour == "is deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / str(os.getpid())).write_text(str(random.random()))
    if behaviour == "dies":
        time.sleep(0.3)
        os._exit(9)
    while behaviour != "watches" or os.read(0, 1):
        time.sleep(0.05)


def main(count: str, grace: str, folder: str, behaviour: str) -> None:
    telemetry.configure("info", "json")
    if behaviour == "starts late":
        os.fork = fork_once_refused()
    if Supervisor(int(count), grace_seconds=float(grace)).run():
        work(Path(folder), behaviour)


if __name__ == "__main__":
    main(*sys.argv[1:])
