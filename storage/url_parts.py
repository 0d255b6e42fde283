"""The URL of a setting, which may contain a password: no message repeats a part of it."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit

ENCODE = "percent-encode special characters in user and password (%2F for /, %23 for #, %40 for @)"


def split_url(url: str) -> SplitResult:
    """The parts of a URL whose port is valid. Raises ValueError, which says what to do and shows nothing of the URL.

    An `@` behind the host is refused. The text before it is most often a password with `/`, `?` or `#` in it, cut in
    two. Its first half would be taken for a host or a port, and shown.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:  # the parser's message quotes the port or the whole authority
        raise ValueError(f"is not a valid URL: {ENCODE}") from None
    if parts.netloc and "@" in parts.path + parts.query + parts.fragment:
        raise ValueError(f"has an @ behind the host: {ENCODE}")
    return parts
