"""`/console/deliveries`: every stored callback, its verdict, its body as received, replays and dismissals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sqlmodel import Session
from starlette.exceptions import HTTPException
from starlette.responses import Response

from receiver.base import visible
from receiver.base.forms import came_from
from receiver.base.visible import cut, short
from receiver.console.installation import Installation, note_act
from receiver.console.pages.tasks import DELIVERY_KINDS, path_of
from receiver.console.visit import Visit
from receiver.tasks.changes import Tally
from storage.filters import DeliveryFilter, is_number, read_filter
from storage.operations.counted import counted
from storage.operations.lists import newest_deliveries, outcome_of_replay, task_of
from storage.rows.models import Callback
from storage.rows.task_conditions import DISMISSED
from storage.states import CallbackState

HOME = "/console/deliveries"
# One form replays or dismisses at most this many, and says so. The next form takes the next ones.
MAX_REPLAY = 500
# The longest part of a body that is shown, twice: a page has less than 100 kB. A report of nine pictures has 5 kB.
MAX_SHOWN_BYTES = 20_000


class Deliveries:
    """The pages and their actions."""

    def __init__(self, of: Installation) -> None:
        self._of = of

    def table(self, visit: Visit) -> Response:
        wanted = read_filter(DeliveryFilter, visit.query, provider=self._of.providers)
        with self._of.database.read() as session:
            page = newest_deliveries(session, wanted, visit.query.get("before"))
        return visit.page(
            "deliveries.html", wanted=wanted, rows=page, states=DeliveryFilter.CHOICES["state"], kinds=DELIVERY_KINDS,
            most=MAX_REPLAY, providers=self._of.providers,
        )  # fmt: skip

    def show(self, visit: Visit) -> Response:
        with self._of.database.read() as session:
            row = self._row(session, visit.path("id"))
            task = task_of(session, row)
        is_open = row.state is CallbackState.UNMATCHED and not (row.reason or "").startswith(DISMISSED)
        pretty, start = visible.pretty(row.body), row.body[:MAX_SHOWN_BYTES]
        raw = visible.raw(start) if visit.session.may_act else visible.guarded(start) if pretty is None else None
        return visit.page(
            "delivery.html", row=row, task=task, kinds=DELIVERY_KINDS, path_of=path_of, size=len(row.body),
            raw=None if raw is None else cut(raw, MAX_SHOWN_BYTES), is_open=is_open, result=self._result(visit),
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
        if (result := self._result(visit)) is not None:
            return visit.page("replay.html", result=result)
        wanted = read_filter(DeliveryFilter, visit.query, provider=self._of.providers)
        if not wanted.is_set:
            raise HTTPException(400, "none_chosen")
        with self._of.database.read() as session:
            page = newest_deliveries(session, wanted, None, limit=MAX_REPLAY)
        return visit.page("replay.html", wanted=wanted, count=len(page.rows), further=page.further, result=None)

    def _result(self, visit: Visit) -> Counter[tuple[str, CallbackState]] | None:
        """What became of the deliveries of the replay whose row the address names. Raises HTTPException 404."""
        if not (number := visit.query.get("of")):
            return None
        with self._of.database.read() as session:
            found = outcome_of_replay(session, int(number)) if is_number(number) else None
        if found is None:
            raise HTTPException(404)
        return found

    def replay(self, visit: Visit) -> Response:
        """Replay one delivery, or all that match the form's filter. The page behind it says what that changed."""
        rows, one = self._chosen(visit)
        tally = self._of.operator.replay([row.id for row, *_ in rows]) if rows else Tally()
        before = {row.id: row.state for row, *_ in rows if str(row.id) not in tally.left}
        number = self._note(visit, "replay", "replay.done", rows, tally, once={"before": before})
        shown = came_from(visit.request.headers).partition("?")[2]
        to = f"{one or HOME + '/replay'}?of={number}&{'' if one else shown}"
        return visit.redirect(to) if number else visit.back(one or HOME)

    def dismiss(self, visit: Visit) -> Response:
        """End the alarm of one unmatched delivery, or of all that match the form's filter. They are kept."""
        rows, one = self._chosen(visit)
        if reason := visit.form.get("reason", "").strip():
            tally = self._of.operator.dismiss_deliveries([row.id or 0 for row, *_ in rows], reason)
            self._note(visit, "dismiss", "delivery.dismissed_done", rows, tally, reason=reason)
        else:
            visit.say(visit.text("act.reason_missing"), bad=True)
        return visit.back(one or HOME)

    def _note(self, visit: Visit, action: str, said: str, rows: Sequence[Any], tally: Tally, **data: Any) -> int | None:
        """Say to how many it was done, and why not to others, and store those it was done to. Returns the row's id."""
        done = {row.id: task_id for row, *_, task_id in rows if str(row.id) not in tally.left}
        visit.say(visit.text(said, n=len(done)), bad=not done)
        visit.say_left(tally)
        subject = f"{counted(len(done), 'delivery', 'deliveries')} from {min(done, default='')}"
        return note_act(self._of, visit.session.name, action, subject, set(done.values()), **data) if done else None

    def _chosen(self, visit: Visit) -> tuple[Sequence[Any], str]:
        """The deliveries that a form is about, and the page of the only one."""
        if number := visit.form.get("delivery"):
            with self._of.database.read() as session:
                row = self._row(session, number)
                task = task_of(session, row)
            return [(row, task and task.id)], f"{HOME}/{row.id}"
        given = {name: value for name, value in visit.form.items() if name not in ("csrf", "reason")}
        wanted = read_filter(DeliveryFilter, given, provider=self._of.providers)
        if not wanted.is_set:
            raise HTTPException(400, "none_chosen")
        with self._of.database.read() as session:
            return newest_deliveries(session, wanted, None, limit=MAX_REPLAY).rows, ""

    def _row(self, session: Session, number: str) -> Callback:
        found = session.get(Callback, int(number)) if is_number(number) else None
        if found is None or found.source != "push":
            raise HTTPException(404)
        return found
