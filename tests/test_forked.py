"""The forked commands of the tests end like `subprocess.Popen`'s."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.forked import Forked


def test_every_thread_that_asks_gets_the_exit_code(tmp_path: Path) -> None:
    """Before, one of two threads got 255, as if the process had ended by itself."""

    def asked(process: Forked) -> int:
        while (code := process.poll()) is None:
            pass
        return code

    for _ in range(10):
        process = Forked(("--help",), dict(os.environ), tmp_path, out=tmp_path / "out")
        with ThreadPoolExecutor(4) as threads:
            codes = [threads.submit(process.wait, 20), *(threads.submit(asked, process) for _ in range(3))]
            process.kill()
        assert len({code.result() for code in codes}) == 1
