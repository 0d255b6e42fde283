"""`/console/deliveries`: every stored callback, its verdict, its body as received, and replays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import func
from sqlmodel import Session, col, select
from starlette.exceptions import HTTPException
from starlette.responses import Response

from receiver.base import visible
from receiver.base.visible import cut, short
from receiver.console.installation import Installation, note_act
from receiver.console.pages.tasks import DELIVERY_KINDS, path_of
from receiver.console.visit import Visit, is_number
from receiver.tasks.changes import Tally
from storage.filters import DeliveryFilter, read_filter
from storage.operations.lists import newest_deliveries, task_of
from storage.rows.events import PERSON_ACTED
from storage.rows.models import Callback, Event
from storage.states import CallbackState

HOME = "/console/deliveries"
# One form replays at most this many, and says so. The next form replays the next ones.
MAX_REPLAY = 500
# The longest part of a body that is shown, twice: a page has less than 100 kB. A report of nine pictures has 5 kB.
MAX_SHOWN_BYTES = 20_000


class Deliveries:
    """The pages and their actions."""

    def __init__(self, of: Installation) -> None:
        self._of = of

    def table(self, visit: Visit) -> Response:
        wanted = self._wanted(visit.query)
        with self._of.database.read() as session:
            page = newest_deliveries(session, wanted, visit.query.get("before"))
        return visit.page(
            "deliveries.html", wanted=wanted, rows=page, states=["refused", *CallbackState], kinds=DELIVERY_KINDS,
            providers=self._of.providers,
        )  # fmt: skip

    def show(self, visit: Visit) -> Response:
        with self._of.database.read() as session:
            row = self._row(session, visit.path("id"))
            task = task_of(session, row)
        pretty, start = visible.pretty(row.body), row.body[:MAX_SHOWN_BYTES]
        raw = visible.raw(start) if visit.session.may_act else visible.guarded(start) if pretty is None else None
        return visit.page(
            "delivery.html", row=row, task=task, kinds=DELIVERY_KINDS, path_of=path_of, size=len(row.body),
            raw=None if raw is None else cut(raw, MAX_SHOWN_BYTES),
            pretty=cut(pretty or "", MAX_SHOWN_BYTES), is_cut=len(row.body) > MAX_SHOWN_BYTES,
            headers={short(name, 80): short(str(value), 400) for name, value in row.headers.items()},
        )  # fmt: skip

    def body(self, visit: Visit) -> Response:
        """The bytes as received, as a download. They contain signed links, so read-only keys do not get them."""
        if not visit.session.may_act:
            raise HTTPException(403, "reader")
        with self._of.database.read() as session:
            row = self._row(session, visit.path("id"))
        name = f'attachment; filename="delivery-{row.id}.bin"'
        headers = {"Content-Disposition": name, "Content-Security-Policy": "default-src 'none'; sandbox"}
        return Response(row.body, media_type="application/octet-stream", headers=headers)

    def ask_replay(self, visit: Visit) -> Response:
        """Show how many deliveries a replay of all matching ones would put back, and its button. `of`: the kept row of
        an earlier replay, whose deliveries are counted by state.
        """
        if number := visit.query.get("of"):
            return visit.page("replay.html", result=self._result(number), kinds=DELIVERY_KINDS)
        wanted = self._wanted(visit.query)
        rows, further = self._matching(wanted)
        return visit.page("replay.html", wanted=wanted, count=len(rows), further=further, result=None)

    def _result(self, number: str) -> list[tuple[CallbackState, int]]:
        """How many of a replay's deliveries are in which state now. Raises HTTPException 404."""
        with self._of.database.read() as session:
            act = session.get(Event, int(number)) if is_number(number) else None
            if act is None or act.name != PERSON_ACTED or not (ids := act.data.get("deliveries")):
                raise HTTPException(404)
            found = select(Callback.state, func.count()).where(col(Callback.id).in_(ids)).group_by(Callback.state)
            return [(state, count) for state, count in session.execute(found)]

    def replay(self, visit: Visit) -> Response:
        """Replay one delivery, or all that match the form's filter."""
        if one := visit.form.get("delivery"):
            with self._of.database.read() as session:
                before = self._row(session, one)
            self._replay(visit, [before])
            return visit.redirect(f"{HOME}/{before.id}")
        wanted = self._wanted(visit.form)
        if not wanted.is_set:
            raise HTTPException(400, "none_chosen")
        rows, _ = self._matching(wanted)
        number = self._replay(visit, rows)
        return visit.redirect(f"{HOME}/replay?of={number}" if rows else HOME)

    def _wanted(self, given: Mapping[str, str]) -> DeliveryFilter:
        return read_filter(DeliveryFilter, given, provider=self._of.providers)

    def _matching(self, wanted: DeliveryFilter) -> tuple[list[Callback], bool]:
        """The newest matching deliveries, and whether there may be more."""
        with self._of.database.read() as session:
            page = newest_deliveries(session, wanted, None, limit=MAX_REPLAY)
        return [row for row, *_ in page.rows], page.further is not None

    def _replay(self, visit: Visit, rows: Sequence[Callback]) -> int:
        """Replay and report. Returns the id of the kept row, which names the deliveries."""
        ids = [row.id or 0 for row in rows]
        tally = self._of.operator.replay(ids) if ids else Tally()
        visit.say(visit.text("replay.done", n=tally.counts["replayed"]), bad=not tally.counts["replayed"])
        for why in list(dict.fromkeys(tally.left.values()))[:3]:
            visit.say(short(why, 200), bad=True)
        subject = f"{len(ids)} deliveries from {min(ids, default=0)}"
        return note_act(self._of, visit.session.name, "replay", subject, {row.task_id for row in rows}, deliveries=ids)

    def _row(self, session: Session, number: str) -> Callback:
        found = session.get(Callback, int(number)) if is_number(number) else None
        if found is None or found.source != "push":
            raise HTTPException(404)
        return found
