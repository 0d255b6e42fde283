"""The console of this process, from its parts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import SecretStr

from receiver.base.config import PREFIX, Settings
from receiver.batch.batch import Batches
from receiver.console.console import Console
from receiver.console.installation import CheckLine, Installation
from receiver.local_store import serve_store
from receiver.providers.kling import prices
from receiver.tasks.operate import Operator
from storage.operations import deadlines

if TYPE_CHECKING:
    from receiver.app.wiring import Parts

PASTED_ELSEWHERE = "run `receiver check` on the server: it prints what to paste, which is a secret"


def make_console(parts: Parts) -> Console:
    """Make the console from these parts."""
    settings, database = parts.settings, parts.database
    return Console(
        Installation(
            database=database,
            bucket=parts.bucket,
            operator=Operator(database, parts.providers, parts.schedule),
            batches=Batches(database, parts.submitter, parts.schedule),
            submitter=parts.submitter,
            slots=parts.slots,
            keys=settings.console_people,
            estimate=lambda requests: parts.kling.estimate(requests, None),
            check=lambda: _check(settings),
            settings=shown_settings(settings),
            sinks=[each.sink for each in parts.subscriptions],
            providers=list(parts.providers),
            deadline_seconds=deadlines.lead_seconds(settings.result_lifetime_seconds),
            usd_per_unit=float(prices.KLING.usd_per_unit),
            has_made_key=serve_store.has_made_key(settings),
            is_secure=(settings.public_url or "").startswith("https://"),
            thumbnail_folder=settings.console_thumbnail_dir or _own_folder(),
            thumbnail_bytes=settings.console_thumbnail_bytes,
        )
    )


def _check(settings: Settings) -> Sequence[CheckLine]:
    """The results of `receiver check` without `--verbose` and without the lines to paste, which may be secrets."""
    from receiver.app import checks  # imports the wiring

    return [
        CheckLine(each.name, each.status, each.line, PASTED_ELSEWHERE if each.paste else each.advice)
        for each in checks.run(settings)
        if not each.detail
    ]


def shown_settings(settings: Settings) -> Mapping[str, str]:
    """Every setting by its variable. A secret shows only whether it is set, or its default."""
    found = {}
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        is_secret = field.repr is False or _holds_secret(value) or "Secret" in str(field.annotation)
        is_hidden = is_secret and value != field.get_default()
        found[f"{PREFIX}{name.upper()}"] = ("…" if value else "") if is_hidden else _words(value)
    return found


def _holds_secret(value: object) -> bool:
    return isinstance(value, SecretStr) or (isinstance(value, tuple) and any(map(_holds_secret, value)))


def _words(value: object) -> str:
    if isinstance(value, SecretStr):  # a default
        return value.get_secret_value()
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _own_folder() -> Path:
    """A folder below the system's temporary folder that only this user can open. Where no folder of that kind can be
    written, as on a read-only root, it cannot be made, and no thumbnail is kept.
    """
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError:
        folder = "/tmp"  # noqa: S108 - nothing can be written there
    return Path(folder) / f"receiver-thumbnails-{os.getuid()}"
