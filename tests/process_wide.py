"""What holds for all tests of a process: what would cost each of them again is made once."""

from __future__ import annotations

import signal
import ssl
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import certifi
import httpx
import pytest
import structlog
from pydantic_settings.sources import PydanticBaseEnvSettingsSource
from structlog.dev import ConsoleRenderer, plain_traceback

from storage.thumbnails import decoder
from tests import store_clients
from tests.statements import compile_once, describe_server_once, hear_prepared_statements


@contextmanager
def process_wide(folder: Path) -> Iterator[None]:
    """All of this module. `folder`: for a file of its own.

    Each test opens engines of its own, and each engine would compile all statements again: 6.1 of 24.6 s of CPU for
    180 tests of tasks and claims, and 1.2 of 17.2 s with one cache. The commands that a test forks ask the server
    themselves. Tests count the statements of all ways to the database. Tests and commands open some two thousand
    clients of the store.
    """
    compile_once()
    describe_server_once()
    hear_prepared_statements()
    store_clients.read_once()
    plain_tracebacks()
    heed_sigint()
    with few_roots(folder), cheap_requests(), no_search_for_no_variables(), patient_decoders(), idle_at_the_end():
        yield


@contextmanager
def few_roots(folder: Path) -> Iterator[None]:
    """No test speaks TLS to public hosts. Reading all 140 roots for every HTTP client would be a quarter of the run.

    An HTTP client takes 22 ms of CPU with all of them, wherever they are, and 0.4 with one.
    """
    whole = Path(certifi.where()).read_text()
    end = "-----END CERTIFICATE-----\n"
    first = folder / "first.pem"
    first.write_text(whole[: whole.index(end) + len(end)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certifi, "where", lambda: str(first))
        for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):  # httpx would read these otherwise
            patch.delenv(name, raising=False)
        yield


@contextmanager
def cheap_requests() -> Iterator[None]:
    """`httpx.get` and the like make a client for each request: 0.7 of its 1.3 ms of CPU for TLS and proxies, which no
    server of a test has.
    """
    context = ssl.create_default_context(cafile=certifi.where())

    def client(**options: Any) -> httpx.Client:
        return httpx.Client(**{**options, "verify": context, "trust_env": False})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(httpx._api, "Client", client)
        yield


@contextmanager
def no_search_for_no_variables() -> Iterator[None]:
    """Most tests give their settings as arguments, without a variable or `.env`. pydantic-settings would then look for
    each field's variable twice: 2.3 of the 2.9 ms of CPU of loading them.
    """
    read = PydanticBaseEnvSettingsSource.__call__

    def read_if_any(source: PydanticBaseEnvSettingsSource) -> dict[str, Any]:
        prefix = source.env_prefix.lower()
        return read(source) if any(name.lower().startswith(prefix) for name in source.env_vars) else {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PydanticBaseEnvSettingsSource, "__call__", read_if_any)
        yield


@contextmanager
def patient_decoders() -> Iterator[None]:
    """Processes that decode thumbnails have a low priority, and a busy machine may leave them nothing for 15 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "DECODE_SECONDS", 120.0)
        yield


def plain_tracebacks() -> None:
    """Print plain tracebacks: structlog adds all local variables, which takes a second of CPU for each exception."""
    [renderer] = [each for each in structlog.get_config()["processors"] if isinstance(each, ConsoleRenderer)]
    renderer.exception_formatter = plain_traceback


def heed_sigint() -> None:
    """A shell starts background processes with SIGINT ignored, and our processes would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def idle_at_the_end() -> Iterator[None]:
    """No test may leave a busy thread behind. One such thread once took half of the run's processor time."""
    yield
    for _ in range(20):
        before = time.process_time()
        time.sleep(0.25)
        if time.process_time() - before < 0.05:
            return
    frames = sys._current_frames()
    raise AssertionError("".join("".join(traceback.format_stack(frame, 3)) for frame in frames.values()))
