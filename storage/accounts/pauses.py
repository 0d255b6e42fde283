"""Creates that the provider refuses for the account's sake, or for one model's: paused, with one trial a minute.

    refused (key, balance, permission) ─▶ row, `account.paused` ─▶ tasks wait in their queue ─▶ trial ─┐
                                           ▲                                              refused ──────┤
                                           └────────────────────────────────────────────────┘           │
                                                       made: row deleted, `account.resumed` ◀───────────┘

The rows are shared by all processes. Locks: a pause before any task. Callers own the transactions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import delete, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import Session, col

from storage.database.clock import db_now, db_now_once
from storage.errors import AccountRefused, ModelRefused
from storage.rows.events import EventName, record
from storage.rows.models import AccountPause

log = structlog.get_logger()

# A person tops up an account or corrects a key within minutes; a refused create a minute costs the provider nothing.
TRIAL_SECONDS = 60.0
# The row of the whole account.
EVERY_MODEL = ""


@dataclass(frozen=True)
class Gate:
    """Which queued tasks may be sent now. `is_closed`: none. `held_back`: none of these models."""

    is_closed: bool = False
    held_back: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Trial:
    """What a create may do. `refusal`: it may not be sent, and why. `of`: the pauses that it tries for everybody."""

    refusal: AccountRefused | None = None
    of: tuple[AccountPause, ...] = ()


def of_account(session: Session, provider: str) -> list[AccountPause]:
    """The account's own pause first, then those of models by name."""
    found = select(AccountPause).where(col(AccountPause.provider) == provider).order_by(col(AccountPause.model))
    return list(session.scalars(found))


def every(session: Session) -> list[AccountPause]:
    """The pauses of all accounts."""
    return list(session.scalars(select(AccountPause).order_by(col(AccountPause.provider), col(AccountPause.model))))


def gate(session: Session, provider: str) -> Gate:
    """What may leave the queue: nothing whose trial is not due. Locks nothing."""
    waits = _waiting(session, provider)
    names = frozenset(pause.model for pause in waits)
    return Gate(EVERY_MODEL in names, names - {EVERY_MODEL})


def refusal(session: Session, provider: str, model: str | None) -> AccountRefused | None:
    """Why a new create of this model is not sent now, in the provider's words; None: it may be. Locks nothing."""
    waits = [pause for pause in _waiting(session, provider) if pause.model in (EVERY_MODEL, model)]
    return as_refusal(waits[0]) if waits else None


def _waiting(session: Session, provider: str) -> Sequence[AccountPause]:
    waits = (col(AccountPause.provider) == provider, col(AccountPause.trial_at) > db_now_once())
    return session.scalars(select(AccountPause).where(*waits).order_by(col(AccountPause.model))).all()


def as_refusal(pause: AccountPause) -> AccountRefused:
    """The provider's answer that began the pause, or the last that went on with it."""
    kind = ModelRefused if pause.model else AccountRefused
    return kind(line(pause), code=pause.code, http_status=pause.http_status, said=pause.said)


def begin(session: Session, provider: str, model: str | None) -> Trial:
    """Right before a create is sent: whether it may be. One a minute may for each pause, whichever process it is in."""
    names = [EVERY_MODEL, model] if model else [EVERY_MODEL]
    mine = (col(AccountPause.provider) == provider, col(AccountPause.model).in_(names))
    rows = session.scalars(select(AccountPause).where(*mine).order_by(col(AccountPause.model)).with_for_update()).all()
    if not rows:
        return Trial()
    now = session.execute(select(db_now())).scalar_one()
    for pause in rows:
        if pause.trial_at > now:
            return Trial(as_refusal(pause))
    session.execute(update(AccountPause).where(*mine).values(trial_at=db_now(TRIAL_SECONDS)))
    return Trial(of=tuple(rows))


def give_back(session: Session, trial: Trial) -> None:
    """A trial that never reached the provider is none: the next create may be one."""
    for pause in trial.of:
        session.execute(update(AccountPause).where(_is(pause.provider, pause.model)).values(trial_at=db_now()))


def pause(session: Session, provider: str, model: str | None, error: AccountRefused) -> None:
    """Pause the account's creates, or those of `model` where the refusal is the model's; or go on pausing."""
    name = (model or EVERY_MODEL) if isinstance(error, ModelRefused) else EVERY_MODEL
    said = error.said or str(error)
    values = {"code": error.code, "http_status": error.http_status, "said": said, "trial_at": db_now(TRIAL_SECONDS)}
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    first: Any = dialect.insert(AccountPause).values(provider=provider, model=name, since=db_now(), **values)
    is_new = session.execute(first.on_conflict_do_nothing().returning(col(AccountPause.provider))).first() is not None
    if not is_new:
        locked = select(AccountPause.code).where(_is(provider, name)).with_for_update()  # type: ignore[call-overload]
        codes = session.scalars(locked).all()
        session.execute(update(AccountPause).where(_is(provider, name)).values(**values))
        if codes in ([], [error.code]):  # resumed meanwhile, or the fault that is known
            return
    facts = {"provider": provider, "model": name or None, "code": error.code, "reason": said}
    record(session, EventName.ACCOUNT_PAUSED, None, facts)
    log.error("account.paused", **facts, trial_seconds=TRIAL_SECONDS)


def resume(session: Session, trial: Trial, *, keys_alone: bool = False) -> None:
    """A trial was answered otherwise: its pauses are over, and what waited goes on.

    `keys_alone`: the request was refused for its own sake, which proves that the key is right and no more.
    """
    for paused in trial.of:
        if keys_alone and paused.http_status != 401:
            continue
        gone = delete(AccountPause).where(_is(paused.provider, paused.model))
        if session.execute(gone.returning(col(AccountPause.provider))).first() is not None:
            facts = {"provider": paused.provider, "model": paused.model or None, "code": paused.code}
            record(session, EventName.ACCOUNT_RESUMED, None, {**facts, "reason": paused.said})
            log.warning("account.resumed", **facts)


def _is(provider: str, model: str) -> Any:
    return (col(AccountPause.provider) == provider) & (col(AccountPause.model) == model)


def line(pause: AccountPause) -> str:
    """One line for people, with the provider's words."""
    what = f"model {pause.model} of {pause.provider}" if pause.model else f"account {pause.provider}"
    code = "" if pause.code is None else f"code {pause.code}: "
    times = f"since {pause.since:%Y-%m-%d %H:%M:%S}, next try at {pause.trial_at:%H:%M:%S} UTC"
    return f"{what} is paused {times}: {code}{pause.said}"
