"""Actions on a task or a file. Each is a POST, is logged with the person's name, and reports its result."""

from __future__ import annotations

import threading

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route

from receiver.console.application import Guard
from receiver.console.installation import Installation, note_act, row_of
from receiver.console.pages.tasks import path_of
from receiver.console.visit import Visit
from receiver.tasks.changes import Tally
from storage.archive import delete
from storage.bucket.store_errors import NoSuchObject
from storage.rows import events
from storage.rows.models import Asset, Task
from storage.states import TaskState

# Each verification reads a whole object. Two at once leave most of the store's bandwidth to the workers.
VERIFYING = 2


class Actions:
    """The commands of `receiver` as buttons."""

    def __init__(self, of: Installation) -> None:
        self._of = of
        self._verifying = threading.BoundedSemaphore(VERIFYING)
        self._deleting = threading.Lock()  # a second press says what the first one left

    def routes(self, guard: Guard) -> list[Route]:
        verbs = {
            "retry": self.retry, "read": self.read, "dismiss": self.dismiss, "delete": self.delete,
            "file-retry": self.retry_file, "verify": self.verify,
        }  # fmt: skip
        return [guard.action(f"/console/act/{name}", verb) for name, verb in verbs.items()]

    def retry(self, visit: Visit) -> Response:
        task = self._task(visit)
        tally = self._of.operator.retry(task.external_task_id)
        return self._done(visit, task, "retry", tally)

    def read(self, visit: Visit) -> Response:
        task = self._task(visit)
        tally, _ = self._of.operator.reconcile([task.external_task_id])
        return self._done(visit, task, "read", tally)

    def dismiss(self, visit: Visit) -> Response:
        task, reason = self._task(visit), visit.form.get("reason", "").strip()
        if not reason:
            visit.say(visit.text("act.reason_missing"), bad=True)
            return visit.back(path_of(task))
        with events.by(visit.session.name):
            tally = self._of.operator.dismiss(task.external_task_id, reason)
        if tally.counts["dismissed_before"]:
            visit.say(visit.text("act.dismissed_before"), bad=True)
            return visit.back(path_of(task))
        return self._done(visit, task, "dismiss", tally, reason=reason)

    def delete(self, visit: Visit) -> Response:
        task = self._task(visit)
        if visit.form.get("typed", "") != task.external_task_id:
            visit.say(visit.text("act.typed_wrong"), bad=True)
            return visit.back(path_of(task))
        try:
            with self._deleting:
                done = delete.delete(self._of.database, self._of.bucket, task.external_task_id)
        except delete.Refused as error:
            visit.say(visit.cause(str(error), 300), bad=True)
            return visit.back(path_of(task))
        visit.say(visit.text("act.deleted_before" if done.again else "act.deleted", n=done.objects))
        if done.again and not done.objects:
            return visit.back(path_of(task))
        return self._done(visit, task, "delete", Tally(), quiet=True)

    def retry_file(self, visit: Visit) -> Response:
        """Retry one file. `accept`: archive it although its structure check fails."""
        asset, task = self._file(visit)
        accept = visit.form.get("accept") == "1"
        tally = self._of.operator.retry(str(asset.id), accept_unverified=accept)
        return self._done(visit, task, "accept" if accept else "retry", tally)

    def verify(self, visit: Visit) -> Response:
        """Read an object back and hash it."""
        asset, task = self._file(visit)
        if not asset.key or not asset.sha256:
            raise HTTPException(404)
        with self._verifying:
            try:
                digest = self._of.bucket.sha256(asset.key)
                found = "good" if digest == asset.sha256 else "differs"
            except NoSuchObject:
                digest, found = "", "gone"
        visit.say(visit.text(f"verify.{found}", sha=digest[:12]), bad=found != "good")
        return self._done(visit, task, "verify", Tally(), quiet=True, found=found)

    def _task(self, visit: Visit) -> Task:
        with self._of.database.read() as session:
            return row_of(session, Task, visit.form.get("task", ""))

    def _file(self, visit: Visit) -> tuple[Asset, Task]:
        with self._of.database.read() as session:
            asset = row_of(session, Asset, visit.form.get("file", ""))
            return asset, session.get_one(Task, asset.task_id)

    def _done(self, visit: Visit, task: Task, verb: str, tally: Tally, *, quiet: bool = False, **data: str) -> Response:
        """Store what the person did and report the result."""
        refused = {"refused": next(iter(tally.left.values()))[:300]} if tally.left else {}
        note_act(self._of, visit.session.name, verb, task.external_task_id, [task.id], **data, **refused)
        visit.say_left(tally)
        if tally.is_good and not quiet:
            said = "reread" if verb == "retry" and task.state is TaskState.FAILED else verb
            visit.say(visit.text(f"act.{said}_done"))
        return visit.back(path_of(task))
