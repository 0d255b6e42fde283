"""An event row as a CloudEvent (CloudEvents 1.0.2, JSON event format). Pure.

`id` is the event's own for ever: made from what the row says, so that a restored backup that counts on from an old
number gives another id to another fact. `sequence` (the documented extension) sorts as text.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from storage.rows.models import Event

MEDIA_TYPE = "application/cloudevents+json"
EVENT_NAMESPACE = uuid.UUID("8a1e5d0c-7f43-4a0e-9d58-5b1f1c7f2d36")
# As many digits as a 64-bit number has at most.
SEQUENCE_DIGITS = 19


def event_id(event: Event) -> str:
    """The same for the same fact, whenever and wherever it is told."""
    return str(uuid.uuid5(EVENT_NAMESPACE, f"{event.id}/{event.name}/{event.at.astimezone(UTC).isoformat()}"))


@dataclass(frozen=True)
class Envelope:
    """What all events of one installation share. `source`: its public URL. `bucket`: where the keys in `data` are."""

    source: str
    bucket: str

    def wrap(self, event: Event, external_task_id: str | None) -> dict[str, Any]:
        """The event as a JSON object. `subject`, and `external_task_id` in `data`: left out where no task is known."""
        told = {
            "specversion": "1.0",
            "id": event_id(event),
            "source": self.source,
            "type": event.name,
            "time": _timestamp(event.at),
            "sequence": str(event.seq).zfill(SEQUENCE_DIGITS),
            "datacontenttype": "application/json",
            "data": self._data(event, external_task_id),
        }
        return told if external_task_id is None else {**told, "subject": external_task_id}

    def encode(self, event: Event, external_task_id: str | None) -> bytes:
        """The same as one line. ASCII alone: SQS refuses some characters, a lone surrogate has no UTF-8."""
        return json.dumps(self.wrap(event, external_task_id), separators=(",", ":")).encode()

    def _data(self, event: Event, external_task_id: str | None) -> dict[str, Any]:
        known = {"external_task_id": external_task_id} if external_task_id is not None else {}
        ids = {"task_id": str(event.task_id)} if event.task_id is not None else {}
        where = {"bucket": self.bucket} if {"key", "manifest"} & event.data.keys() else {}
        return {**known, **ids, **where, **event.data}


def _timestamp(moment: datetime) -> str:
    """RFC 3339, UTC."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
