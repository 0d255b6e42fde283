"""Logs and metrics. One canonical line per unit of work; nothing here ever sees a URL's query, a token or a key."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any, Literal

import structlog
from prometheus_client import CollectorRegistry, Counter

REGISTRY = CollectorRegistry()
DELIVERIES = Counter("receiver_deliveries", "Callback requests by what became of them", ["outcome"], registry=REGISTRY)

# The last line of defence: whatever a message quotes, a signed URL's query and a token in a path do not get out.
SECRET_SHAPES = (
    (re.compile(r"(https?://[^\s?\"'<>]+)\?[^\s\"'<>]*"), r"\1?…"),
    (re.compile(r"(/(?:callbacks/[a-z0-9_-]+|assets)/)[A-Za-z0-9_-]{20,}"), r"\1…"),
    (re.compile(r"\b(Bearer\s+)\S+", re.IGNORECASE), r"\1…"),
    (re.compile(r"\bwhsec_[A-Za-z0-9+/=]+"), "whsec_…"),
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*"), "eyJ…"),
)


def scrub(text: str) -> str:
    """`text` with everything that has the shape of a secret cut short."""
    for shape, kept in SECRET_SHAPES:
        text = shape.sub(kept, text)
    return text


def _scrubbed(_logger: Any, _method: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {name: scrub(value) if isinstance(value, str) else value for name, value in fields.items()}


def configure(level: str = "info", output: Literal["auto", "console", "json"] = "auto") -> None:
    """Send structured logs to standard error. `auto`: for eyes on a terminal, JSON elsewhere."""
    console = output == "console" or (output == "auto" and sys.stderr.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        _scrubbed,
    ]
    renderer: Any = structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=shared))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    for name in ("httpx", "httpcore", "botocore", "boto3", "urllib3"):  # at debug they print headers and whole URLs
        logging.getLogger(name).setLevel(logging.WARNING)
