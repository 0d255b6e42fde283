"""An event row as a CloudEvent (CloudEvents 1.0.2, JSON event format). Pure functions.

The `id` is made from the contents of the row. So a restored backup that reuses a number gives another event another id.
`sequence` (the documented extension) sorts as text.
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
# The most digits that a 64-bit number has.
SEQUENCE_DIGITS = 19


def event_id(event: Event) -> str:
    """The id of an event: the same for the same fact at any time and on any host."""
    return str(uuid.uuid5(EVENT_NAMESPACE, f"{event.id}/{event.name}/{event.at.astimezone(UTC).isoformat()}"))


@dataclass(frozen=True)
class Envelope:
    """What all events of an installation share. `source`: its public URL. `bucket`: the bucket of the keys in
    `data`.
    """

    source: str
    bucket: str

    def wrap(self, event: Event, external_task_id: str | None) -> dict[str, Any]:
        """The event as a JSON object, without `subject` and `data.external_task_id` if no task is known."""
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
        """The event as one line of ASCII. SQS refuses some characters, and a lone surrogate has no UTF-8."""
        return json.dumps(self.wrap(event, external_task_id), separators=(",", ":")).encode()

    def _data(self, event: Event, external_task_id: str | None) -> dict[str, Any]:
        known = {"external_task_id": external_task_id} if external_task_id is not None else {}
        ids = {"task_id": str(event.task_id)} if event.task_id is not None else {}
        where = {"bucket": self.bucket} if {"key", "manifest"} & event.data.keys() else {}
        return {**known, **ids, **where, **event.data}


def _timestamp(moment: datetime) -> str:
    """RFC 3339, UTC."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
