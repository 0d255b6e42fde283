"""Logs and metrics: the metrics' definitions, the set-up of the logs, and the removal of secrets from log lines."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import select
import stat
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Literal, TextIO

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from receiver.base.visible import visible
from storage.forks import renew_in_children
from storage.url_parts import without_queries

REGISTRY = CollectorRegistry()
DELIVERIES = Counter("receiver_deliveries", "Callback requests by outcome", ["outcome"], registry=REGISTRY)
EVENTS = Counter("receiver_events", "Events recorded since this process began to count", ["event"], registry=REGISTRY)
# Name and help of each gauge, by the field of `storage.operations.measures.Measures` that it shows. A scrape reads the
# database.
WORK = {
    field: Gauge(f"receiver_{name}", words, registry=REGISTRY)
    for field, (name, words) in {
        "due": ("due_rows", "Rows that wait for a worker now"),
        "overdue": ("overdue_rows", "Rows that have waited for a worker for more than a minute"),
        "oldest_due_seconds": ("oldest_due_seconds", "Time since the oldest waiting row became due"),
        "failed_assets": (
            "failed_assets",
            "Files given up and not dismissed; receiver retry makes them due again",
        ),
        "unmatched": ("unmatched_callbacks", "Deliveries without a known task, not dismissed"),
        "deadline_near": (
            "deadline_near_tasks",
            "Tasks whose files the provider deletes soon and that are not all archived",
        ),
        "unusable_files": (
            "unusable_files",
            "Files whose hosts answer with something that is no file; they are tried again",
        ),
        "unusable_seconds": ("oldest_unusable_seconds", "Time since the first such answer for the oldest of them"),
        "incomplete_open": (
            "open_incomplete_tasks",
            "Tasks reported incomplete because of such files; a later try may complete them",
        ),
        "callbacks_expected": (
            "callbacks_expected",
            "Tasks that ended in the last 24 h, at least five minutes ago, and had asked for a callback",
        ),
        "callbacks_lost": ("callbacks_lost", "Those of them whose end no callback reported"),
        "callbacks_late": (
            "callbacks_late",
            "Tasks of the last 24 h whose callback came after a read had reported their end",
        ),
        "late_seconds": ("callback_max_delay_seconds", "The longest such delay"),
        "events_open": (
            "events_open",
            "Events that are not delivered yet, counted per sink; without a number: once. Without clients' callbacks",
        ),
        "oldest_event_seconds": ("oldest_event_seconds", "Age of the oldest of them"),
        "events_dead": (
            "events_dead",
            "Events that a sink never accepted; receiver events redeliver sends them again. Without clients' callbacks",
        ),
        "waiting_files": (
            "waiting_files",
            "Files that the store or the spool folder refused at their last try, up to 2,000",
        ),
        "waiting_tasks": ("waiting_tasks", "Tasks whose last call to the provider failed, up to 4,000"),
        "audit_faults": ("audit_faults", "Faults that the continuous audit found and that still exist"),
        "audit_hashed": ("audit_hashed_files", "Files hashed in the current round of the audit"),
        "audit_share": ("audit_progress_ratio", "Completed part of the current round, 0 to 1"),
        "audit_late": ("audit_late", "1 while the round takes longer than RECEIVER_AUDIT_DAYS"),
        "audit_age_seconds": ("audit_age_seconds", "Time since the last complete round ended; NaN: none has"),
        "callback_loss_rate": ("callback_loss_ratio", "Lost callbacks divided by expected ones, 0 to 1"),
    }.items()
}
# Names of 0.1.0 that this release still serves, with their successors. The next release drops them.
SUCCESSORS = {
    "due": "receiver_due_rows",
    "overdue": "receiver_overdue_rows",
    "archived_day": 'increase(receiver_events_total{event="task.archived"}[24h])',
    "incomplete_day": 'increase(receiver_events_total{event="task.incomplete"}[24h])',
    "failed_day": 'increase(receiver_events_total{event="task.failed"}[24h])',
    "unmatched": "receiver_unmatched_callbacks",
    "deadline_near": "receiver_deadline_near_tasks",
    "late_seconds": "receiver_callback_max_delay_seconds",
    "audit_hashed": "receiver_audit_hashed_files",
    "audit_share": "receiver_audit_progress_ratio",
    "callback_loss_rate": "receiver_callback_loss_ratio",
}
DEPRECATED = {
    field: Gauge(f"receiver_{field}", f"Deprecated, use {successor}", registry=REGISTRY)
    for field, successor in SUCCESSORS.items()
}


def _gauges(label: str, prefix: str, texts: Mapping[str, str]) -> dict[str, Gauge]:
    return {name: Gauge(f"receiver_{prefix}{name}", text, [label], registry=REGISTRY) for name, text in texts.items()}


# The gauges of each account and each sink.
WORK_OF_EACH = {
    "accounts": _gauges(
        "account",
        "",
        {
            "slots_held": "Pictures in progress, by our own count",
            "slot_limit": "How many may be in progress now; NaN: no limit of our own",
            "tasks_queued": "Tasks waiting for slots",
            "account_paused": "1 while the provider refuses the account's key or balance: nothing is sent but trials",
            "models_paused": "Models that the provider does not let the account use",
        },
    ),
    "sinks": _gauges(
        "sink",
        "sink_",
        {
            "events_open": "Events on their way to it",
            "oldest_event_seconds": "How long the oldest of them has been on its way",
            "events_dead": "Events that it never accepted",
        },
    ),
}


def update_work_gauges(measures: Mapping[str, Any] | None) -> None:
    """Set the gauges. None: the database is down. They become NaN, because no number is better than an old one."""
    for name, gauge in (*WORK.items(), *DEPRECATED.items()):
        _set(gauge, measures[name] if measures else None)
    for group, gauges in WORK_OF_EACH.items():
        found = measures[group] if measures else {}
        for name, gauge in gauges.items():
            for label, numbers in found.items():
                _set(gauge.labels(label), numbers[name])
            shown = {value for each in gauge.collect() for sample in each.samples for value in sample.labels.values()}
            for gone in shown - found.keys():
                gauge.remove(gone)


def _set(gauge: Gauge, number: float | None) -> None:
    gauge.set(float("nan") if number is None else number)


# The last defence: tokens in paths and in headers are cut from every message, beside the queries of addresses. The
# patterns have no word boundaries, because in quoted text the character before may be the n of an escaped line break.
# The last also matches what has no secret, and keeps it: otherwise each `eyJ` is searched to the end of the text.
SECRET_SHAPES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"(/(?:callbacks/[a-z0-9_-]+|assets)/)[A-Za-z0-9_-]{20,}"), r"\1…"),
    (re.compile(r"(Bearer\s+)\S+", re.IGNORECASE), r"\1…"),
    (re.compile(r"(://[^\s:/@\"']*:)[^\s/@\"']+@"), r"\1…@"),
    (re.compile(r"whsec_[A-Za-z0-9+/=]+"), "whsec_…"),
    (
        re.compile(r"eyJ[A-Za-z0-9_-]{8,}+(\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*)?"),
        lambda found: "eyJ…" if found[1] else found[0],
    ),
)


def scrub(text: str) -> str:
    """`text` without anything that has the form of a secret."""
    text = without_queries(text)
    for shape, kept in SECRET_SHAPES:
        text = shape.sub(kept, text)
    return text


def _scrubbed(_logger: Any, _method: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor: scrub every value at any depth. Objects become the scrubbed text of their `repr`."""
    return {name: value if name in ("_record", "_from_structlog") else _plain(value) for name, value in fields.items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {scrub(str(name)): _plain(held) for name, held in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(held) for held in value]
    return scrub(value if isinstance(value, str) else repr(value))


def _visible(_logger: Any, _method: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """For a terminal: ids and texts of others in one line each; tracebacks keep their lines."""

    def shown(name: str, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        lines = value.split("\n") if name in ("exception", "stack") else [value]
        return "\n".join(map(visible, lines))

    return {name: shown(name, value) for name, value in fields.items()}


class LogStream:
    """Standard error for log lines. What it does not take at once waits in memory for a thread that writes it.

    Neither a full disk behind it nor a log collector that has ended, stopped reading or fallen behind may end, stop or
    delay the work: an acknowledgement would wait for the log, too. A line beyond `MAX_WAITING_BYTES`, or one whose
    write fails, is dropped and counted in `dropped`.
    """

    MAX_WAITING_BYTES = 2**20  # some 4,000 lines
    END_SECONDS = 1.0  # how long the process' end waits for the reader

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_torn = False  # whether the last line was cut, by a full disk
        try:
            self._descriptor: int | None = stream.fileno()
            self._is_pipe = hasattr(os, "RWF_NOWAIT") and stat.S_ISFIFO(os.fstat(self._descriptor).st_mode)  # on Linux
        except OSError:  # it is in memory
            self._descriptor = None
        self.begin_in_child()
        renew_in_children(self)

    def begin_in_child(self) -> None:
        """Begin without lines that wait: the parent's thread writes its own."""
        self.dropped = 0
        self._waiting: deque[tuple[bytes, int]] = deque()  # lines, and the number of dropped ones that each names
        self._bytes = 0
        self._change = threading.Condition()
        self._writer: threading.Thread | None = None

    def write(self, text: str) -> None:
        try:
            if self._descriptor is None:
                self._stream.write(text)
            elif not self._writes_at_once(line := text.encode(self._stream.encoding or "utf-8", "backslashreplace")):
                self._hand_over(line)
                return
        except (OSError, ValueError, RuntimeError):  # ValueError: it was closed. RuntimeError: no thread can be started
            self.dropped += 1
        else:
            self.dropped = 0

    def msg(self, line: str) -> None:
        self.write(line + "\n")

    # It is the logger that structlog calls. Structlog's own has a lock, on which a forked child could wait for ever.
    debug = info = warning = error = critical = msg

    def flush(self) -> None:
        """Nothing to do: a line is written or waits for the thread. See `drain`."""

    def drain(self) -> None:
        """Wait a limited time until no line waits. Call it before the process ends."""
        with self._change:
            self._change.wait_for(lambda: not self._waiting, self.END_SECONDS)

    def _writes_at_once(self, line: bytes) -> bool:
        """Write the line if that does not block. The event loop leaves each write to the thread: a disk may be slow."""
        if self._waiting or len(line) > select.PIPE_BUF or _is_event_loop():
            return False
        descriptor = self._descriptor or 0
        if self._is_pipe:  # a look is not enough: another process that shares it may take the room meanwhile
            try:
                os.pwritev(descriptor, [line], -1, os.RWF_NOWAIT)  # a pipe takes all of a line this long, or nothing
            except BlockingIOError:
                return False
            except OSError:  # its reader is gone, or an older kernel cannot
                self._is_pipe = False
            else:
                return True
        if not self._is_ready(0):
            return False
        self._put(line)
        return True

    def _is_ready(self, milliseconds: int | None) -> bool:
        ready = select.poll()
        ready.register(self._descriptor or 0, select.POLLOUT)
        return bool(ready.poll(milliseconds))

    def _put(self, line: bytes) -> None:
        rest = b"\n" * self._is_torn + line
        while rest:
            try:
                rest = rest[os.write(self._descriptor or 0, rest) :]
            except BlockingIOError:  # a program that shares the terminal or pipe has made it non-blocking
                self._is_ready(None)
            self._is_torn = bool(rest)

    def _hand_over(self, line: bytes) -> None:
        with self._change:
            if self._bytes + len(line) > self.MAX_WAITING_BYTES:
                self.dropped += 1
                return
            if self._writer is None:
                writer = threading.Thread(target=self._write_waiting, name="log", daemon=True)
                writer.start()
                self._writer = writer  # started: another line tries again
            self._waiting.append((line, self.dropped))
            self._bytes += len(line)
            self.dropped = 0
            self._change.notify_all()

    def _write_waiting(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting)
                line, named = self._waiting[0]
            lost = 0
            try:
                self._put(line)
            except (OSError, ValueError):
                lost = named + 1
            with self._change:
                self._waiting.popleft()
                self._bytes -= len(line)
                self.dropped += lost
                self._change.notify_all()


class LogHandler(logging.StreamHandler[LogStream]):
    """The standard library's log lines to a `LogStream`. `logging.shutdown`, which runs at exit, drains it."""

    def close(self) -> None:
        self.stream.drain()
        super().close()


def _is_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def configure(
    level: str = "info", output: Literal["auto", "console", "json"] = "auto", *, is_library: bool = False
) -> None:
    """Send structured logs to standard error. `auto`: readable lines on a terminal, otherwise JSON.

    `is_library`: leave the standard library's log to the program, and all of it if the program has set up structlog.
    Without a set-up structlog prints on standard output, with the local variables of a traceback.
    """
    if is_library and structlog.is_configured():
        return
    console = output == "console" or (output == "auto" and sys.stderr.isatty())
    stream = LogStream(sys.stderr)

    def with_gap(_logger: Any, _method: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        if stream.dropped:
            fields["lines_dropped"] = stream.dropped
        return fields

    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        _scrubbed,
        with_gap,
    ]
    if console:
        shared.append(_visible)
    renderer: Any = structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=lambda *_: stream,
        cache_logger_on_first_use=True,
    )
    if is_library:
        return
    handler = LogHandler(stream)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=shared))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    for name in ("httpx", "httpcore", "botocore", "boto3", "urllib3"):  # at debug level they log headers and whole URLs
        logging.getLogger(name).setLevel(logging.WARNING)
