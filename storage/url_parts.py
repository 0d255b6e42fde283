"""Secrets in URLs: the password in a setting's URL, and the signatures in texts of others."""

from __future__ import annotations

import re
from urllib.parse import SplitResult, urlsplit

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
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


def is_on_loopback(url: str) -> bool:
    return (urlsplit(url).hostname or "") in LOOPBACK_HOSTS


def host_and_port(url: str) -> str:
    """Without user and password, for messages."""
    return urlsplit(url).netloc.rpartition("@")[2]


# A URL's scheme, and the rest without user name and query. Line ends in a URL are ignored, as every client does.
_URL = re.compile(r"[\x00-\x20]*(https?):(?://)?(?:[^/?#]*@)?([^?#]*)", re.I)
# An address without a query matches too, or a long one would be read again from each `http` in it.
_URL_IN_TEXT = re.compile(r"(https?://[^\s\"'<>?]*+)(\?[^\s\"'<>]+)?", re.I)
_LINE_ENDS = dict.fromkeys(map(ord, "\t\r\n"))
# A word with a question mark, plain or percent-encoded. It is tried where a word begins, so a long one is read once.
_WORD = re.compile(r"(?<![^\s\"'<>])[^\s\"'<>?%]*+[?%][^\s\"'<>]*+")
_QUERY = re.compile(r"\?|%(?:25)*3f", re.I)
_IS_ADDRESS = re.compile(r"//|\\\\|\\/\\/|(?:%(?:25)*2f){2}", re.I)
_IS_PATH = re.compile(r"[/\\.]|%(?:25)*2f", re.I)
_EQUALS = r"(?:=|%(?:25)*3d|\\+(?:u003|x3)d|&(?:#61|#x3d|equals);)"
_IS_VALUE = re.compile(_EQUALS, re.I)
# Parameters that sign a link at CloudFront, S3 and stores like it, Google, Azure, OSS, COS, and at CDNs with a key of
# their own. Azure's short names count only beside another parameter, because a prompt may have them.
_PARAMETER = re.compile(
    r"((?:signature|credential|token|expires|key-pair-id|auth_?key|accesskeyid|googleaccessid|sig"
    r"|x-(?:amz|goog|oss|cos|obs|tos)-[a-z0-9-]{1,40}|q-(?:sign|ak|key|header|url)[a-z-]{0,30}"
    r"|(?:(?<![a-z0-9])|(?<=26)|(?<=3f))(?:sign|(?:(?<=[?&;])|(?<=26)|(?<=3f)|(?=[^\s&=]{2,5}=[^\s&]{0,99}&))"
    r"(?:s[eprtv]|spr|skoid|sktid|skt|ske|sks|skv)))" + _EQUALS + r")[^\s&\"'<>]+",
    re.I,
)


def address_of(text: str) -> str:
    """A text that is a URL as a whole, cut before its query; another text as it is."""
    found = _URL.match(text.translate(_LINE_ENDS).strip()) if "://" in text else None
    return f"{found[1].lower()}://{found[2]}" if found else text


def without_queries(foreign: str) -> str:
    """`foreign` without the queries of addresses and paths, and without the values of parameters that sign a link.

    For texts in which an address may stand anywhere, also without its scheme or percent-encoded. Other texts stay as
    they are. Takes linear time.
    """
    if not ("=" in foreign or "%" in foreign or "?" in foreign or "&" in foreign or "\\" in foreign):  # as most texts
        return foreign
    return _PARAMETER.sub(r"\1…", _WORD.sub(_without_query, foreign))


def urls_without_queries(own: str) -> str:
    """A caller's own text without the queries of its http(s) URLs. All else is kept: a prompt may say `token=gold`."""
    return _URL_IN_TEXT.sub(lambda found: found[1] + "?…" * bool(found[2]), own) if "://" in own else own


def _without_query(found: re.Match[str]) -> str:
    word = found[0]
    query = _QUERY.search(word)
    if query is None or query.end() == len(word):
        return word
    path = word[: query.start()]
    is_one = _IS_ADDRESS.search(path) or (_IS_PATH.search(path) and _IS_VALUE.search(word, query.end()))
    return f"{word[: query.end()]}…" if is_one else word
