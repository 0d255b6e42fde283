"""`/console/events`: sinks, waiting and dead events, and sending them again."""

from __future__ import annotations

from itertools import islice
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from receiver.base.visible import short
from receiver.console.installation import Installation, note_act
from receiver.console.visit import Visit
from receiver.tasks.changes import change
from storage.filters import Fault, FilterInvalid, is_number, read_page, understood
from storage.operations import outbox
from storage.operations.measures import SinkMeasures
from storage.states import DispatchState

HOME = "/console/events"
# "All" redelivers at most this many, in pages of PAGE.
MAX_REDELIVER, PAGE = 10_000, 200


class EventsOut:
    """The page and its actions."""

    def __init__(self, of: Installation, measured: Any) -> None:
        self._of = of
        self._measured = measured

    def show(self, visit: Visit) -> Response:
        given = understood(visit.query, "sink", state=list(DispatchState))
        state, sink = given["state"], given["sink"]
        with self._of.database.read() as session:
            if sink and sink not in self._of.sinks and not outbox.is_known(session, sink):
                raise FilterInvalid(Fault("sink", "absent"))
            rows = outbox.newest(session, state, sink, before=read_page(visit.query, "before"))
            disabled = outbox.disabled(session)
        found: dict[str, SinkMeasures] = self._measured().measures.sinks
        names = sorted({*self._of.sinks, *found, *disabled})
        sinks = [(name, found.get(name, SinkMeasures()), disabled.get(name), name in self._of.sinks) for name in names]
        return visit.page("events.html", rows=rows, sinks=sinks, state=state, sink=sink, states=list(DispatchState))

    def redeliver(self, visit: Visit) -> Response:
        """Redeliver one (`id`), the chosen ones, or every dead one of a sink (`sink`)."""
        ids = [int(each) for each in visit.chosen if is_number(each)][:PAGE]
        sink = visit.form.get("sink") or None
        if not ids and not sink:
            raise HTTPException(400, "none_chosen")
        count, of_tasks = 0, set[Any]()
        for rows in islice(outbox.pages_to_redeliver(self._of.database, ids, sink, PAGE), MAX_REDELIVER // PAGE):
            with change(self._of.database, dry_run=False) as session:
                count += outbox.redeliver(session, rows)
            of_tasks |= {row.task_id for row in rows}
        if count:
            note_act(self._of, visit.session.name, "redeliver", sink or ",".join(map(str, ids[:20])), of_tasks)
        visit.say(visit.text("events.redelivered" if count else "events.none_redelivered", n=count), bad=not count)
        return visit.back(HOME)

    def disable(self, visit: Visit) -> Response:
        name = self._known(visit)
        reason = f"by {visit.session.name}: {short(visit.form.get('reason') or 'by hand', 200)}"
        with self._of.database.write() as session:
            outbox.disable(session, name, reason)
        count = outbox.end_disabled(self._of.database)
        note_act(self._of, visit.session.name, "disable", name)
        visit.say(visit.text("events.disabled", sink=name, n=count))
        return visit.back(HOME)

    def enable(self, visit: Visit) -> Response:
        name = self._known(visit)
        with self._of.database.write() as session:
            done = outbox.enable(session, name)
        if done:
            note_act(self._of, visit.session.name, "enable", name)
        visit.say(visit.text("events.enabled", sink=name), bad=not done)
        return visit.back(HOME)

    def _known(self, visit: Visit) -> str:
        """A sink that exists. A misspelt name would disable nothing and raise an alarm."""
        name = visit.form.get("sink", "")
        with self._of.database.read() as session:
            if name not in self._of.sinks and not outbox.is_known(session, name):
                raise HTTPException(404)
        return name
