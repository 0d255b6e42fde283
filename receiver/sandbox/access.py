"""Who may use the API, and which hosts the sandbox may call."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from urllib.parse import urlsplit

import jwt

from receiver.sandbox.answers import Refused
from receiver.sandbox.knobs import Knobs


def check_credentials(authorization: str | None, knobs: Knobs, *, jwt_allowed: bool = True) -> None:
    """Accept a known API key or JWT. Raises Refused 1000…1004 otherwise, with Kling's distinctions.

    `jwt_allowed`: False on `/tasks`, which answers a JWT with 1002.
    """
    scheme, _, credential = (authorization or "").partition(" ")
    credential = credential.strip()
    if not scheme or (scheme.lower() == "bearer" and not credential):
        raise Refused(1001)
    if scheme.lower() != "bearer":
        raise Refused(1002)
    if any(hmac.compare_digest(credential.encode(), key.encode()) for key in knobs.api_keys):
        return
    if credential.count(".") != 2 or not jwt_allowed:
        raise Refused(1002)
    _check_jwt(credential, knobs)


def _check_jwt(token: str, knobs: Knobs) -> None:
    try:
        jwt.decode(
            token,
            knobs.secret_key,
            algorithms=["HS256"],
            issuer=knobs.access_key,
            options={"require": ["iss", "exp"]},
        )
    except jwt.ImmatureSignatureError:
        raise Refused(1003) from None
    except jwt.ExpiredSignatureError:
        raise Refused(1004) from None
    except jwt.PyJWTError as error:
        raise Refused(1000, f"Authentication failed: {error}") from None


def is_own_request(host: str, origin: str | None, own_name: str) -> bool:
    """Whether a request for the sandbox's controls comes from a program or from a page of its own.

    A page elsewhere may send to loopback: its browser names it in `Origin`. One whose name resolves to this machine
    (DNS rebinding) has its own name in `Host`, so a name counts only if it is `own_name` or localhost.
    """
    try:
        name = (urlsplit(f"//{host}").hostname or "").lower()
        page = host if origin is None else urlsplit(origin).netloc
    except ValueError:
        return False
    is_named = name in ("localhost", own_name.lower()) or _is_address(name)
    return is_named and page.lower() == host.lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether every address of `host` (a name or an address) is on this machine. Asks DNS. False if it knows none."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(ipaddress.ip_address(str(entry[4][0])).is_loopback for entry in found)
