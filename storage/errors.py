"""Every error here is a decision about the work that met it. Only the code that settles a claim reads them.

Retry(after)          the same work may succeed later
├── ProviderUnavailable   the provider is down, slow or answered nonsense
├── ProviderThrottled     the provider asks us to slow down (1302, 429)
│   ├── ProviderFull          too many of the account's pictures are in progress (1303)
│   └── AccountRefused        it refuses the account (key, balance), whatever the request: its creates pause
│       └── ModelRefused          the account may not use this model: the model's creates pause
├── NoSlots               the same by our own count: nothing was asked
├── NoRoom                the disk has no room for the callback of a new task: nothing was asked
├── FetchInterrupted      the transfer broke, or the file host said "later" (408 425 429 5xx)
│   ├── FetchCut              it broke inside the body; at the same byte three times it counts as unusable
│   └── FetchUnusable         an answer came and is not a file to keep: a redirect we do not follow, other 4xx, an odd
│       │                     part or coding, no HTTP. Tried again on a schedule over the file's life, then given up
│       ├── NotAnAsset            the bytes are no picture, video or audio (an error page)
│       └── AssetDamaged          an asset by its first bytes, broken inside (cut without a length)
├── AddressRefused        a name resolved to an address we may not dial; DNS may be right again in 15 minutes
├── StoreUnavailable      the bucket is down or refuses us
│   ├── ObjectRefused         it refuses this one object, for its size or an argument: no outage
│   └── ObjectForbidden       403: perhaps this one object, perhaps every one
├── DatabaseUnavailable   the database is down or refuses us
│   ├── SessionReplaced       an old session refused to write; a new one may
│   └── FileChanged           the SQLite file, its log or its index is not the one that is open
└── SpoolUnavailable      the folder for large downloads cannot be used
    └── DiskFull              no room in it
Refresh               the URL died; read the task again for a new one
└── FetchExpired          401 403 404 410 on a result URL
GiveUp(reason)        it will not by itself; kept, shown, `receiver retry` brings it back
├── ProviderRejected      the provider refused the request for good
├── ReportUnreadable      a callback body that is no task record
├── FetchRefused          a URL we may not fetch, for its form
├── FetchTooLarge         more bytes than RECEIVER_MAX_ASSET_BYTES
└── ObjectConflict        another object is stored under our key
LostClaim             the row is not ours any more: change nothing
UserError             wrong as it was asked; the command line shows the message without a traceback
└── NoSuchTask            no task has this external id
anything else         a bug: retried with a cap, logged with its traceback, counted

Messages are shown to people and stored in rows: they never hold a URL's query, a token or a key.
"""

from __future__ import annotations


class Retry(Exception):
    """The same work may succeed later. `after`: seconds to wait as the other side asked, None for our own backoff.

    `is_outage`: whether the other side as a whole is down or refuses us, for a circuit; None = unknown.
    """

    is_outage: bool | None = True

    def __init__(self, message: str, *, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


class ProviderUnavailable(Retry):
    pass


class ProviderThrottled(Retry):
    """Slow down: nothing was made. `code`, `http_status`, `said`: as of `ProviderRejected`."""

    def __init__(
        self,
        message: str,
        *,
        after: float | None = None,
        code: int | None = None,
        http_status: int | None = None,
        said: str = "",
    ) -> None:
        super().__init__(message, after=after)
        self.code, self.http_status, self.said = code, http_status, said


class ProviderFull(ProviderThrottled):
    """The account has too many pictures in progress for this task to be made."""


class AccountRefused(ProviderThrottled):
    """The provider refuses the account. This says nothing about the request, and nothing was made."""


class ModelRefused(AccountRefused):
    """The provider refuses the account one model."""


class NoSlots(Retry):
    """All of the account's slots are held, by our own count. Nothing was sent and no row was written."""


class NoRoom(Retry):
    """The callback of a new task could not be stored. Nothing was sent and no row was written."""


class FetchInterrupted(Retry):
    pass


class FetchCut(FetchInterrupted):
    """The message names the byte, by which a file that is cut at its host differs from a bad path."""


class FetchUnusable(FetchInterrupted):
    """The host answered with something that cannot be archived. It may be a passing state of the CDN or permanent,
    which nobody can tell, so the file is tried less and less often while the provider has it.
    """


class NotAnAsset(FetchUnusable):
    pass


class AssetDamaged(FetchUnusable):
    pass


class AddressRefused(Retry):
    """One bad DNS answer must not cost paid work, so the name is resolved again every 15 minutes."""

    def __init__(self, message: str) -> None:
        super().__init__(message, after=900)


class StoreUnavailable(Retry):
    pass


class ObjectRefused(StoreUnavailable):
    is_outage = False


class ObjectForbidden(StoreUnavailable):
    is_outage = None


class DatabaseUnavailable(Retry):
    pass


class SessionReplaced(DatabaseUnavailable):
    """An old session refused to write, like those of a demoted primary. Nothing was committed, and a second try gets a
    new session.
    """


class FileChanged(DatabaseUnavailable):
    """The SQLite file, its log or its index was removed or replaced while it was open. The message says what to do."""


class SpoolUnavailable(Retry):
    pass


class DiskFull(SpoolUnavailable):
    pass


class Refresh(Exception):
    """The URL died; the task must be read again for a new one."""


class FetchExpired(Refresh):
    pass


class GiveUp(Exception):
    """It will not work by itself."""


class ProviderRejected(GiveUp):
    """The provider refused for good. `code`: the provider's own error code, None if it gave none.

    `said`: its own message, safe to show; our message contains it too.
    """

    def __init__(
        self, message: str, *, code: int | None = None, http_status: int | None = None, said: str = ""
    ) -> None:
        super().__init__(message)
        self.code, self.http_status, self.said = code, http_status, said


class ReportUnreadable(GiveUp):
    pass


class FetchRefused(GiveUp):
    pass


class FetchTooLarge(GiveUp):
    pass


class ObjectConflict(GiveUp):
    pass


class UserError(Exception):
    """A wrong name, setting or field. The message says what is wrong, and what to do if anything can be done.

    Each is raised on purpose. A plain ValueError or LookupError is a bug.
    """


class NoSuchTask(UserError, LookupError):
    def __init__(self, external_task_id: str) -> None:
        super().__init__(f"no task {external_task_id!r} here; `receiver status` lists the newest")
        self.external_task_id = external_task_id

    def __reduce__(self) -> tuple[type[NoSuchTask], tuple[str]]:
        return NoSuchTask, (self.external_task_id,)


class LostClaim(Exception):
    """Another worker owns the row now: change no row, leave no second object."""
