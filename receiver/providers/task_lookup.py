"""Find one task at the provider: by its own read call, or in the account's list where there is no such call."""

from __future__ import annotations

from datetime import datetime, timedelta

from receiver.providers.base import NoSuchCall, Provider, Record
from storage.accounts.rate_limit import ReadRateLimit
from storage.states import Report

# Kling lists up to 500 a page, newest first (KLING §3). Twenty pages are 10,000 newer tasks.
PAGE_SIZE = 500
MAX_PAGES = 20
# Tasks that are older than ours by this much end the search. No clock differs by more.
SLACK = timedelta(hours=1)


def read_task(
    provider: Provider,
    limit: ReadRateLimit,
    *,
    provider_task_id: str | None,
    external_task_id: str,
    made_at: datetime | None = None,
) -> Record | None:
    """Read one task within the rate limit that all processes share. None: the provider does not know it.

    `made_at`: when our row was made. Older tasks in the list are not it. Raises what the provider's calls raise, and
    `TooManyReads`.
    """
    limit.wait(provider.name)
    try:
        return provider.read(provider_task_id=provider_task_id, external_task_id=external_task_id)
    except NoSuchCall:
        return _listed(provider, limit, {provider_task_id, external_task_id} - {None}, made_at)


def is_namesake(report: Report, external_task_id: str) -> bool:
    """Whether it is of another task whose own id is our external id: the provider's read takes either id."""
    has_other_name = report.external_task_id not in (None, external_task_id)
    return has_other_name and report.provider_task_id == external_task_id


def _listed(
    provider: Provider, limit: ReadRateLimit, names: set[str | None], made_at: datetime | None
) -> Record | None:
    for page in range(1, MAX_PAGES + 1):
        limit.wait(provider.name)
        records = provider.list_page(page, PAGE_SIZE)
        for record in records:
            if names & {record.report.external_task_id, record.report.provider_task_id}:
                return record
        if not records or (made_at is not None and _is_older(records[-1], made_at - SLACK)):
            return None
    return None


def _is_older(record: Record, than: datetime) -> bool:
    made_at = record.report.created_at
    return made_at is not None and made_at < than
