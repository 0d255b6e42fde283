"""How many functions run for one callback, from the POST to the manifest; `-s` prints ours by file, and all in numbers.

A reader follows the same path. The bounds keep it from growing unseen. The table in tests/bench/README.md says what the
lines are for.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from types import CodeType, FrameType
from typing import Any

import httpx
import pytest

from receiver.app.wiring import Parts
from receiver.sandbox import Sandbox
from receiver.tasks.task_view import is_over
from receiver.workers.worker import Worker
from tests.harness import ROOT, wait_until
from tests.pipeline import Web, assert_archived, task_of

# The last counts, and some for what runs only at times: on a busy machine connections idle too long and are opened
# again. Lower them when the path gets shorter.
MAX_FUNCTIONS, MAX_FILES = 286, 54
# Lines of code of these functions, run or not: up to the 200, and in all.
MAX_LINES_TO_200, MAX_LINES = 502, 2_091
COMPREHENSIONS = ("<listcomp>", "<genexpr>", "<setcomp>", "<dictcomp>", "<lambda>")

# The sandbox answers in these.
SANDBOX_THREADS = ("sandbox", "AnyIO worker")

pytestmark = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)


class Path:
    """The functions that any thread but the sandbox's entered while `is_on`. `is_sending`: the main thread posts."""

    def __init__(self) -> None:
        self.is_on = self.is_sending = False
        self._codes: set[CodeType] = set()

    def profile(self, frame: FrameType, event: str, _argument: Any) -> None:
        if self.is_on and event == "call":
            thread = threading.current_thread()
            is_senders = self.is_sending and thread is threading.main_thread()
            if not is_senders and not thread.name.startswith(SANDBOX_THREADS):
                self._codes.add(frame.f_code)

    def _of_ours(self) -> Iterator[tuple[str, CodeType]]:
        for code in list(self._codes):
            file = code.co_filename.removeprefix(f"{ROOT}/")
            if file.startswith(("receiver/", "storage/")) and not file.startswith("receiver/sandbox/"):
                yield file, code

    def with_libraries(self) -> tuple[int, int]:
        """Functions and lines of code, those of Python and of the libraries included."""
        codes = [code for code in list(self._codes) if not code.co_filename.startswith(f"{ROOT}/tests/")]
        lines = {(code.co_filename, line) for code in codes for _, _, line in code.co_lines() if line}
        return sum(code.co_name not in COMPREHENSIONS for code in codes), len(lines)

    def by_file(self) -> dict[str, list[str]]:
        found = defaultdict(list)
        for file, code in self._of_ours():
            if code.co_name not in COMPREHENSIONS:
                found[file].append(code.co_qualname)
        return {file: sorted(found[file]) for file in sorted(found)}

    def lines(self) -> Counter[str]:
        """Lines of code of these functions, by file."""
        found = {(file, line) for file, code in self._of_ours() for _, _, line in code.co_lines() if line}
        return Counter(file for file, _ in sorted(found))


@pytest.fixture
def path() -> Iterator[Path]:
    """Comes before the web server, because a thread is profiled from its start or not at all."""
    counted = Path()
    threading.setprofile(counted.profile)
    sys.setprofile(counted.profile)
    yield counted
    sys.setprofile(None)
    threading.setprofile(None)


def _is_over(worker: Worker, parts: Parts, path: Path, name: str) -> bool:
    path.is_on = name == "counted"
    worker.run_until_idle()
    path.is_on = False  # the check itself is not on the path
    return is_over(task_of(parts, name))


def test_one_callback_runs_few_functions_in_few_files(path: Path, web: Web, parts: Parts, sandbox: Sandbox) -> None:
    worker = parts.worker()  # one for both, because starting a process and building its statements is not on the path
    for name in ("warm-up", "counted"):
        sandbox.set(callback_drop_rate=1)
        request = {"model_name": "kling-image-o1", "prompt": name, "n": 1}
        parts.submitter.submit(request, external_task_id=name)
        task = task_of(parts, name)
        record = parts.kling.read(provider_task_id=task.provider_task_id, external_task_id=name)
        assert record is not None
        head = f"POST /callbacks/kling/{parts.tokens.sign('kling', task.id)} HTTP/1.1\r\n"
        head += f"Host: receiver\r\nContent-Length: {len(record.body)}\r\n\r\n"
        address = httpx.URL(web.url)
        path.is_on, path.is_sending = name == "counted", True
        with socket.create_connection((address.host, address.port)) as connection:
            connection.sendall(head.encode() + record.body)  # in one piece, as most deliveries arrive
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
            path.is_sending = False
            lines_to_200 = path.lines()
        wait_until(partial(_is_over, worker, parts, path, name))
        assert_archived(parts, sandbox, task_of(parts, name))
    functions, lines = path.by_file(), path.lines()
    for file, names in functions.items():
        sys.stdout.write(f"{file}, {lines[file]} lines ({lines_to_200[file]} to the 200): {', '.join(names)}\n")
    count, in_all, to_200 = sum(map(len, functions.values())), lines.total(), lines_to_200.total()
    words = f"{count} functions in {len(functions)} files, {in_all} lines, {to_200} to the 200"
    sys.stdout.write(f"{words}\n{'{} functions, {} lines'.format(*path.with_libraries())} with libraries\n")
    assert count <= MAX_FUNCTIONS and len(functions) <= MAX_FILES, words
    assert in_all <= MAX_LINES and to_200 <= MAX_LINES_TO_200, words
