"""Pauses of creates that the provider refuses because of the account or of a model, with one trial a minute.

    refused (key, balance, permission) ─▶ row, `account.paused` ─▶ tasks wait in their queue ─▶ trial ─┐
                                           ▲                                              refused ──────┤
                                           └────────────────────────────────────────────────┘           │
                          made: `account.resumed`, row kept for `CAREFUL_SECONDS` with `trial_at` < `since` ◀───┘

Creates that are under way when an account is refused for the first time cannot be recalled. From then on a minute has
at most `CAREFUL_CREATES` refused ones: while the account is paused there is one trial, and for an hour after it resumes
no more creates are under way at once. A refused create is under way until its pause is committed, so none takes its
place.

The rows are shared by all processes. Locks: a pause before the account and any task. Callers own the transactions.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import structlog
from sqlalchemy import ColumnElement, Select, bindparam, delete, exists, func, or_, select, update
from sqlmodel import Session, col

from storage.database.clock import db_now, db_now_once
from storage.database.prepared import execute, unattached
from storage.database.sessions import insert_or_ignore
from storage.errors import AccountRefused, ModelRefused
from storage.rows.events import EventName, record
from storage.rows.models import AccountPause, Task
from storage.states import Step

log = structlog.get_logger()

# A person tops up an account or corrects a key within minutes. One refused create a minute costs the provider nothing.
TRIAL_SECONDS = 60.0
# An account with a small top-up runs empty again soon. Four creates of a second each still make 14,000 tasks an hour.
CAREFUL_SECONDS, CAREFUL_CREATES = 3_600.0, 4
# The name of the row for the whole account.
EVERY_MODEL = ""
_STANDS = col(AccountPause.trial_at) >= col(AccountPause.since)
_IS_CAREFUL = ~_STANDS & (col(AccountPause.since) > db_now_once(-CAREFUL_SECONDS))


@dataclass(frozen=True)
class Gate:
    """The queued tasks that may be sent now. `is_closed`: none. `held_back`: none of these models. `room`: at most this
    many.
    """

    is_closed: bool = False
    held_back: frozenset[str] = frozenset()
    room: int | None = None


@dataclass(frozen=True)
class Trial:
    """What a create may do. `refusal`: why it may not be sent. `of`: the pauses whose trial it is.

    `is_early`: it waits until another create of the account has its answer.
    """

    refusal: AccountRefused | None = None
    of: tuple[AccountPause, ...] = ()
    is_early: bool = False


def every(session: Session) -> list[AccountPause]:
    """The pauses of all accounts."""
    found = select(AccountPause).where(_STANDS).order_by(col(AccountPause.provider), col(AccountPause.model))
    return list(session.scalars(found))


def holding(session: Session, task: Task) -> list[AccountPause]:
    """The pauses that hold a queued task: of its account, and of its model."""
    found = every(session) if task.queued_at is not None else ()
    return [each for each in found if each.provider == task.provider and each.model in (EVERY_MODEL, task.model)]


def gate(session: Session, provider: str) -> Gate:
    """The queued tasks that may be sent: none whose pause has no trial due. Locks nothing."""
    waits = _waiting(session, provider)
    names = frozenset(pause.model for pause in waits)
    if session.execute(_careful(provider)).first() is None:
        return Gate(EVERY_MODEL in names, names - {EVERY_MODEL})
    admitted = or_(col(Task.lease).is_not(None), col(Task.due_at) <= db_now_once())
    room = max(CAREFUL_CREATES - _count_creates(session, provider, admitted), 0)
    return Gate(room == 0, names - {EVERY_MODEL}, room)


def _is(provider: Any, model: str) -> Any:
    return (col(AccountPause.provider) == provider) & (col(AccountPause.model) == model)


def _careful(provider: Any) -> Select[Any]:
    """The row of an account that was refused lately and has resumed."""
    return select(col(AccountPause.provider)).where(_is(provider, EVERY_MODEL), _IS_CAREFUL)


_LOCK_CAREFUL = _careful(bindparam("of")).with_for_update()


def _count_creates(session: Session, provider: str, *conditions: Any) -> int:
    creates = (col(Task.step) == Step.CREATE, col(Task.due_at).is_not(None), col(Task.provider) == provider)
    return int(session.execute(select(func.count()).where(*creates, *conditions)).scalar_one())


def is_careful(session: Session, provider: str) -> bool:
    """Whether the account was refused lately and has resumed. If so, locks its pause."""
    return bool(execute(session, _LOCK_CAREFUL, {"of": provider}).rows)


def has_room(session: Session, provider: str, task_id: uuid.UUID) -> bool:
    """Whether one more create of an account that was refused lately may be under way."""
    others = (col(Task.id) != task_id, col(Task.lease).is_not(None), col(Task.sent_at).is_not(None))
    return _count_creates(session, provider, *others) < CAREFUL_CREATES


def refusal(session: Session, provider: str, model: str | None) -> AccountRefused | None:
    """Why a new create of this model is not sent now, with the provider's message; None: it may be. Locks nothing."""
    waits = [pause for pause in _waiting(session, provider) if pause.model in (EVERY_MODEL, model)]
    return as_refusal(waits[0]) if waits else None


_PAUSES = AccountPause.__table__  # type: ignore[attr-defined]
_WAITING = select(_PAUSES).where(
    _PAUSES.c.provider == bindparam("of"),
    # A trial further ahead than TRIAL_SECONDS was set before the clock was set back. It may be made now.
    _PAUSES.c.trial_at > db_now_once(),
    _PAUSES.c.trial_at <= db_now_once(TRIAL_SECONDS),
)
_WAITING = _WAITING.order_by(_PAUSES.c.model)


def _waiting(session: Session, provider: str) -> list[AccountPause]:
    return unattached(AccountPause, execute(session, _WAITING, {"of": provider}))


def as_refusal(pause: AccountPause) -> AccountRefused:
    """The provider's answer that began the pause, or the last one that extended it."""
    kind = ModelRefused if pause.model else AccountRefused
    return kind(line(pause), code=pause.code, http_status=pause.http_status, said=pause.said)


def begin(session: Session, task: Task) -> Trial:
    """Decide right before a create is sent whether it may be. Each pause has one trial a minute among all processes."""
    names = [EVERY_MODEL, task.model] if task.model else [EVERY_MODEL]
    mine = (col(AccountPause.provider) == task.provider, col(AccountPause.model).in_(names))
    found = select(AccountPause).where(*mine).order_by(col(AccountPause.model)).with_for_update()
    lately = session.scalars(found).all()
    rows = [pause for pause in lately if pause.trial_at >= pause.since]
    if not rows:
        careful = bool(lately) and is_careful(session, task.provider)
        return Trial(is_early=careful and not has_room(session, task.provider, task.id))
    now = session.execute(select(db_now())).scalar_one()
    for pause in rows:
        if now < pause.trial_at <= now + timedelta(seconds=TRIAL_SECONDS):
            return Trial(as_refusal(pause))
    session.execute(update(AccountPause).where(*mine, _STANDS).values(trial_at=db_now(TRIAL_SECONDS)))
    return Trial(of=tuple(rows))


def is_any_known(provider: str, model: str | None) -> ColumnElement[bool]:
    """The condition that creates of this model were refused because of the account, now or in the last hour."""
    mine = (col(AccountPause.provider) == provider, col(AccountPause.model).in_([EVERY_MODEL, model or EVERY_MODEL]))
    return exists(select(col(AccountPause.provider)).where(*mine))


def give_back(session: Session, trial: Trial) -> None:
    """Give back a trial that never reached the provider. The next create may be the trial."""
    for pause in trial.of:
        this = (_is(pause.provider, pause.model), _STANDS)
        session.execute(update(AccountPause).where(*this).values(trial_at=db_now()))


def learned_nothing(session: Session, trial: Trial, *, of_model: bool = True) -> None:
    """End a trial whose request itself was refused, which proves only that the key is right. The next create may be the
    trial; otherwise a sender of refused requests would keep the account paused for all others.

    `of_model` False: the request was refused because of its model, so only the account's own pause ends or is given
    back.
    """
    mine = Trial(of=tuple(each for each in trial.of if of_model or each.model == EVERY_MODEL))
    resume(session, mine, keys_alone=True)
    give_back(session, mine)


def pause(session: Session, provider: str, model: str | None, error: AccountRefused) -> None:
    """Begin or extend the pause of the account's creates, or of `model` if the refusal concerns the model."""
    name = (model or EVERY_MODEL) if isinstance(error, ModelRefused) else EVERY_MODEL
    said = error.said or str(error)
    values = {"code": error.code, "http_status": error.http_status, "said": said, "trial_at": db_now(TRIAL_SECONDS)}
    first = {"provider": provider, "model": name, "since": db_now(), **values}
    if not insert_or_ignore(session, AccountPause, first):
        locked = select(col(AccountPause.code), _STANDS).where(_is(provider, name)).with_for_update()
        known = session.execute(locked).one_or_none()
        is_over = known is not None and not known[1]
        since = {"since": db_now()} if is_over else {}
        session.execute(update(AccountPause).where(_is(provider, name)).values(**values, **since))
        if not is_over and (known is None or known[0] == error.code):  # resumed meanwhile, or the known fault
            return
    facts = {"provider": provider, "model": name or None, "code": error.code, "reason": said}
    record(session, EventName.ACCOUNT_PAUSED, None, facts)
    log.error("account.paused", **facts, trial_seconds=TRIAL_SECONDS)


def resume(session: Session, trial: Trial, *, keys_alone: bool = False) -> None:
    """End the pauses of a trial that was answered, and continue the tasks that waited.

    `keys_alone`: the answer proves only that the key is right.
    """
    for paused in trial.of:
        if keys_alone and paused.http_status != 401:
            continue
        this = (_is(paused.provider, paused.model), _STANDS)
        ended: Any = delete(AccountPause).where(*this)
        if paused.model == EVERY_MODEL:
            ended = update(AccountPause).where(*this).values(since=db_now(), trial_at=db_now(-1))
        if session.execute(ended.returning(col(AccountPause.provider))).first() is not None:
            facts = {"provider": paused.provider, "model": paused.model or None, "code": paused.code}
            record(session, EventName.ACCOUNT_RESUMED, None, {**facts, "reason": paused.said})
            log.warning("account.resumed", **facts)


def line(pause: AccountPause) -> str:
    """One line for people, with the provider's message."""
    what = f"model {pause.model} of {pause.provider}" if pause.model else f"account {pause.provider}"
    code = "" if pause.code is None else f"code {pause.code}: "
    times = f"since {pause.since:%Y-%m-%d %H:%M:%S}, next try at {pause.trial_at:%H:%M:%S} UTC"
    return f"{what} is paused {times}: {code}{pause.said}"
