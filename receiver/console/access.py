"""Access to the console: keys, sessions in signed cookies, one-time links, CSRF tokens.

    cookie = base64url( expires 8 bytes │ nonce 16 bytes │ HMAC-SHA256(secret of the key, purpose, expires, nonce) )

No session is stored before it is ended. Its MAC is made with a secret that is derived from the person's key, so it ends
when the key is removed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from receiver.base.console_keys import ConsoleKey
from storage.accounts.used_tokens import UsedTokens
from storage.database.sessions import Database

COOKIE = "receiver_console"
SESSION_SECONDS = 12 * 3_600
ONCE_SECONDS = 600
SESSION, ONCE = "session", "once"
NONCE_BYTES, HEAD_BYTES, MAC_BYTES = 16, 24, 32
# Base64 of HEAD_BYTES + MAC_BYTES; longer text is not decoded.
TOKEN_CHARS = 75
# Wrong keys per address and minute. Keys have at least 24 characters, so this bounds work rather than guessing.
FAILURES, FAILURE_SECONDS = 10, 60.0
# Addresses that this process remembers.
REMEMBERED = 10_000


@dataclass(frozen=True)
class Session:
    """One person's login. `head`: expiry and nonce. `csrf`: the token in all of that person's forms."""

    name: str
    may_act: bool
    head: bytes = field(repr=False)
    csrf: str = field(repr=False)


class Access:
    """Checks keys and tokens. `now`: Unix seconds. `database`: see `UsedTokens`."""

    def __init__(
        self, keys: Sequence[ConsoleKey], now: Callable[[], float] = time.time, database: Database | None = None
    ) -> None:
        self._people = [(key.name, key.may_act, *_derived(key)) for key in keys]
        self._now = now
        self.used = UsedTokens(database, now)  # heads by purpose and person

    def log_in(self, key: str) -> str | None:
        """A session token for the holder of this key; None for a wrong key."""
        shown = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        secret = None
        for _, _, digest, own in self._people:  # no early return, so that the time does not depend on which key matched
            secret = own if hmac.compare_digest(shown, digest) else secret
        return self._token(secret, SESSION, SESSION_SECONDS) if secret else None

    def session(self, token: str | None) -> Session | None:
        """The session of a cookie; None if it is invalid, expired or ended, or its key was removed."""
        return self._read(token, SESSION)[0]

    def end(self, session: Session) -> None:
        """End a session, and copies of its cookie: here at once, and in other processes when they catch up."""
        self.used.use_up(f"{SESSION} {session.name}", session.head)

    def redeem(self, token: str | None) -> str | None:
        """A session token for a one-time link, which is used up by it; None for an invalid or used one."""
        found, secret = self._read(token, ONCE)
        is_first = found is not None and self.used.use_up(f"{ONCE} {found.name}", found.head)
        return self._token(secret, SESSION, SESSION_SECONDS) if is_first else None

    def is_open(self, token: str | None) -> Session | None:
        """The session of the one-time link's owner; None if it is invalid. The link is not used up."""
        return self._read(token, ONCE)[0]

    def _token(self, secret: bytes, purpose: str, seconds: float) -> str:
        head = int(self._now() + seconds).to_bytes(8, "big") + secrets.token_bytes(NONCE_BYTES)
        return base64.urlsafe_b64encode(head + _mac(secret, purpose, head)).rstrip(b"=").decode()

    def _read(self, token: str | None, purpose: str) -> tuple[Session | None, bytes]:
        """The session, and the secret that its token was made with."""
        raw = _decoded(token)
        if raw is None:
            return None, b""
        head, mac = raw[:HEAD_BYTES], raw[HEAD_BYTES:]
        whose = None
        for name, may_act, _, secret in self._people:
            if hmac.compare_digest(mac, _mac(secret, purpose, head)):
                whose = (name, may_act, secret)
        if whose is None or int.from_bytes(head[:8], "big") <= self._now():
            return None, b""
        name, may_act, secret = whose
        if self.used.has(f"{purpose} {name}", head):
            return None, b""
        return Session(name, may_act, head, _mac(secret, "csrf", head).hex()[:32]), secret


def one_time_token(key: ConsoleKey) -> str:
    """A token that logs in once within ten minutes."""
    return Access([key])._token(_derived(key)[1], ONCE, ONCE_SECONDS)


def _derived(key: ConsoleKey) -> tuple[bytes, bytes]:
    """The key's hash for comparison, and the secret of its sessions. The role is part of both, so a change of role ends
    the sessions.
    """
    raw = key.key.get_secret_value().encode()
    role = b"act" if key.may_act else b"read"
    return hashlib.sha256(raw).digest(), hmac.digest(raw, b"receiver console " + role + key.name.encode(), "sha256")


def _mac(secret: bytes, purpose: str, head: bytes) -> bytes:
    return hmac.digest(secret, purpose.encode() + b"\0" + head, "sha256")


def _decoded(token: str | None) -> bytes | None:
    if token is None or len(token) != TOKEN_CHARS or not token.isascii():
        return None
    try:
        raw = base64.urlsafe_b64decode(token + "=")
    except (binascii.Error, ValueError):
        return None
    return raw if len(raw) == HEAD_BYTES + MAC_BYTES else None


class LoginThrottle:
    """Refuses an address for a minute after ten wrong keys. All clients behind a proxy have its address."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def wait_seconds(self, address: str) -> int:
        """How long this address has to wait; 0 = it may try."""
        with self._lock:
            times = self._failures.get(address, deque())
            while times and times[0] <= self._now() - FAILURE_SECONDS:
                times.popleft()
            return int(times[0] + FAILURE_SECONDS - self._now()) + 1 if len(times) >= FAILURES else 0

    def failed(self, address: str) -> None:
        with self._lock:
            self._failures.setdefault(address, deque(maxlen=FAILURES)).append(self._now())
            self._failures.move_to_end(address)
            while len(self._failures) > REMEMBERED:
                self._failures.popitem(last=False)
