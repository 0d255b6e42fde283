"""`/console/archive` and `/console/settings`: the store, the audit, the workers and the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from starlette.responses import Response

from receiver.base.visible import short
from receiver.console.installation import CheckLine, Installation, note_act
from receiver.console.visit import Visit
from storage.archive import continuous_audit
from storage.errors import DatabaseUnavailable, StoreUnavailable
from storage.operations import heartbeats
from storage.operations.sample_audit import SAMPLE, SampleAudit
from storage.rows import events

SHOWN_FINDINGS = 100
SHOWN_ACTS = 25


class StandingPages:
    """The two pages."""

    def __init__(self, of: Installation) -> None:
        self._of = of
        self._sample = SampleAudit(of.database, of.bucket)

    def archive(self, visit: Visit) -> Response:
        with self._of.database.read() as session:
            audit = continuous_audit.standing(session)
        problem, capabilities = "", {}
        try:
            capabilities = asdict(self._of.bucket.capabilities())
        except (DatabaseUnavailable, StoreUnavailable) as error:
            problem = short(str(error), 300)
        return visit.page(
            "archive.html", audit=audit, capabilities=capabilities, problem=problem, sample=self._sample,
            bucket=f"s3://{self._of.bucket.name}/{self._of.bucket.prefix}", findings=audit.findings[-SHOWN_FINDINGS:],
        )  # fmt: skip

    def sample(self, visit: Visit) -> Response:
        if began := self._sample.start(visit.session.name):
            note_act(self._of, visit.session.name, "audit", f"{SAMPLE} files")
        visit.say(visit.text("audit.began" if began else "audit.running"), bad=not began)
        return visit.redirect("/console/archive")

    def check(self, visit: Visit) -> Response:
        """The lines of `receiver check`. It writes and removes small objects, so it is an action."""
        note_act(self._of, visit.session.name, "check", "")
        return self.settings(visit, self._of.check())

    def settings(self, visit: Visit, checked: Sequence[CheckLine] | None = None) -> Response:
        with self._of.database.read() as session:
            workers = heartbeats.alive(session)
            acts = events.newest_acts(session, SHOWN_ACTS)
        people = [(key.name, key.may_act) for key in self._of.keys]
        return visit.page(
            "settings.html", workers=workers, settings=self._of.settings, people=people, checked=checked, acts=acts
        )
