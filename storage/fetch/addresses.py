"""Which URLs may be fetched and which addresses dialled. Pure: no resolution, no sockets, no clock.

The table replaces `ipaddress.is_global`, which changes between Python patch levels. It follows the two IANA
special-purpose registries (iana-ipv4-special-registry, iana-ipv6-special-registry). It is stricter where no file host
can be: IPv6 outside 2000::/3 (but for NAT64) and blocks that serve one protocol only (AS112, AMT, PCP and TURN anycast)
are refused.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import NamedTuple
from urllib.parse import quote

import idna

from storage.errors import FetchRefused

Address = IPv4Address | IPv6Address

# Signed URLs have up to about 2,000 characters. Servers commonly accept up to 8,192.
MAX_URL_CHARACTERS = 8_192
# Hosts whose check is kept: results come from few. Checking one takes 0.01 ms.
KEPT_HOSTS = 64
DEFAULT_PORTS = {"https": 443, "http": 80}


class Row(NamedTuple):
    """One refused block. `listed`: may be dialled for a host on RECEIVER_PRIVATE_RESULT_HOSTS."""

    network: IPv4Network | IPv6Network
    what: str
    source: str
    listed: bool = False


def _row(network: str, what: str, source: str, *, listed: bool = False) -> Row:
    return Row(ipaddress.ip_network(network), what, source, listed)


# The first match gives the reason, so single addresses come before the blocks that contain them.
IPV4_ROWS = (
    _row("169.254.169.254/32", "cloud metadata", "AWS, Azure, Google, OpenStack instance metadata"),
    _row("169.254.170.2/32", "cloud metadata", "AWS ECS task credentials"),
    _row("169.254.170.23/32", "cloud metadata", "AWS EKS pod identity"),
    _row("169.254.42.42/32", "cloud metadata", "Scaleway instance metadata"),
    _row("168.63.129.16/32", "cloud platform", "Azure wire server"),
    _row("192.0.0.192/32", "cloud metadata", "Oracle Cloud classic metadata"),
    _row("100.100.100.200/32", "cloud metadata", "Alibaba Cloud instance metadata"),
    _row("0.0.0.0/8", "this network", "RFC 791 §3.2, RFC 1122 §3.2.1.3"),
    _row("10.0.0.0/8", "private use", "RFC 1918", listed=True),
    _row("100.64.0.0/10", "shared address space", "RFC 6598", listed=True),
    _row("127.0.0.0/8", "loopback", "RFC 1122 §3.2.1.3", listed=True),
    _row("169.254.0.0/16", "link-local", "RFC 3927"),
    _row("172.16.0.0/12", "private use", "RFC 1918", listed=True),
    _row("192.0.0.0/24", "IETF protocol assignments", "RFC 6890 §2.1"),
    _row("192.0.2.0/24", "documentation", "RFC 5737"),
    _row("192.31.196.0/24", "AS112", "RFC 7535"),
    _row("192.52.193.0/24", "AMT relay", "RFC 7450"),
    _row("192.88.99.0/24", "6to4 relay", "RFC 7526"),
    _row("192.168.0.0/16", "private use", "RFC 1918", listed=True),
    _row("192.175.48.0/24", "AS112", "RFC 7534"),
    _row("198.18.0.0/15", "benchmarking", "RFC 2544"),
    _row("198.51.100.0/24", "documentation", "RFC 5737"),
    _row("203.0.113.0/24", "documentation", "RFC 5737"),
    _row("224.0.0.0/4", "multicast", "RFC 5771"),
    _row("255.255.255.255/32", "broadcast", "RFC 919, RFC 8190"),
    _row("240.0.0.0/4", "reserved", "RFC 1112 §4"),
)
IPV6_ROWS = (
    _row("fd00:ec2::254/128", "cloud metadata", "AWS instance metadata"),
    _row("fd00:ec2::23/128", "cloud metadata", "AWS EKS pod identity"),
    _row("fd20:ce::254/128", "cloud metadata", "Google Cloud metadata"),
    _row("fd00:42::42/128", "cloud metadata", "Scaleway instance metadata"),
    _row("fd00:c1::a9fe:a9fe/128", "cloud metadata", "Oracle Cloud metadata"),
    _row("::/128", "unspecified", "RFC 4291 §2.5.2"),
    _row("::1/128", "loopback", "RFC 4291 §2.5.3", listed=True),
    _row("::ffff:0:0/96", "IPv4-mapped", "RFC 4291 §2.5.5.2"),
    _row("::ffff:0:0:0/96", "IPv4-translated", "RFC 2765 §2.1"),
    _row("::/96", "IPv4-compatible", "RFC 4291 §2.5.5.1"),
    _row("64:ff9b:1::/48", "local-use NAT64", "RFC 8215"),
    _row("100::/64", "discard only", "RFC 6666"),
    _row("100:0:0:1::/64", "dummy prefix", "RFC 9780"),
    _row("2001::/32", "Teredo", "RFC 4380"),
    _row("2001:2::/48", "benchmarking", "RFC 5180, erratum 1752"),
    _row("2001:10::/28", "ORCHID", "RFC 4843"),
    _row("2001:20::/28", "ORCHIDv2", "RFC 7343"),
    _row("2001::/23", "IETF protocol assignments", "RFC 2928"),
    _row("2001:db8::/32", "documentation", "RFC 3849"),
    _row("2002::/16", "6to4", "RFC 3056, RFC 7526"),
    _row("2620:4f:8000::/48", "AS112", "RFC 7534"),
    _row("3ffe::/16", "6bone", "RFC 3701"),
    _row("3fff::/20", "documentation", "RFC 9637"),
    _row("5f00::/16", "segment routing", "RFC 9602"),
    _row("fc00::/7", "unique-local", "RFC 4193", listed=True),
    _row("fe80::/10", "link-local", "RFC 4291 §2.5.6"),
    _row("fec0::/10", "site-local", "RFC 3879"),
    _row("ff00::/8", "multicast", "RFC 4291 §2.7"),
)
GLOBAL_UNICAST = IPv6Network("2000::/3")
# Behind DNS64 a host that has IPv4 alone resolves to such an address (RFC 6052 §2.1). The IPv4 address in it decides.
NAT64 = IPv6Network("64:ff9b::/96")
NOT_GLOBAL_UNICAST = _row("::/0", "not global unicast", "RFC 4291 §2.4: IANA assigns from 2000::/3 only")

# Names that never resolve to a public host. Refusing them saves a lookup every 15 minutes.
PRIVATE_NAMES = {
    "localhost": "RFC 6761 §6.3",
    "local": "RFC 6762",
    "internal": "reserved by ICANN, 2024",
    "home.arpa": "RFC 8375",
    "onion": "RFC 7686",
}


def forbidden(address: Address) -> str | None:
    """Why `address` must not be dialled; None = it may. Also checks an IPv4 address embedded in IPv6."""
    row = _refusing_row(address)
    if row is not None:
        return _reason(address, row)
    hidden = hidden_ipv4(address)
    if hidden is None:
        return None
    reason = forbidden(hidden)
    return f"hides {hidden}: {reason}" if reason else None


def forbidden_even_listed(address: Address) -> str | None:
    """As `forbidden` for a host on RECEIVER_PRIVATE_RESULT_HOSTS: private and loopback addresses may be dialled."""
    row = _refusing_row(address)
    return None if row is not None and row.listed else forbidden(address)


def hidden_ipv4(address: Address) -> IPv4Address | None:
    """The IPv4 address embedded in an IPv6 address, None if there is none.

    Mapped, compatible, translated, NAT64 (RFC 6052; inside 64:ff9b:1::/48 as its own /48 or as a /96), 6to4 (RFC 3056),
    Teredo (RFC 4380: the client's address, inverted) and ISATAP (RFC 5214: any prefix).
    """
    if isinstance(address, IPv4Address):
        return None
    bits = int(address)
    low = bits & 0xFFFF_FFFF
    if address.teredo:
        return address.teredo[1]
    if address.sixtofour:
        return address.sixtofour
    if address in IPv6Network("64:ff9b:1::/48") and (bits >> 64) & 0xFFFF:
        return IPv4Address(((bits >> 64) & 0xFFFF) << 16 | (bits >> 40) & 0xFFFF)
    if (bits >> 32) & 0xFDFF_FFFF == 0x0000_5EFE:
        return IPv4Address(low)
    carriers = ("::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "::/96")
    carried = any(address in IPv6Network(network) for network in carriers)
    return IPv4Address(low) if carried and bits > 1 else None


def _refusing_row(address: Address) -> Row | None:
    if isinstance(address, IPv4Address):
        return next((row for row in IPV4_ROWS if address in row.network), None)
    row = next((row for row in IPV6_ROWS if address in row.network), None)
    if row is None and (not (address in GLOBAL_UNICAST or address in NAT64) or address.scope_id):
        return NOT_GLOBAL_UNICAST
    return row


def _reason(address: Address, row: Row) -> str:
    hidden = hidden_ipv4(address)
    carrying = f" carrying {hidden}" if hidden else ""
    return f"{row.what}{carrying} ({row.source})"


@dataclass(frozen=True)
class AddressPolicy:
    """Decides which hosts may serve results.

    `result_hosts`: empty = any public https host, else a host must equal one of these or be a subdomain of one.
    `private_hosts`: (host, port) pairs that may use plain http, another port than 443, or a private address; hosts in
    lower case, IPv6 without brackets. They need not be in `result_hosts`. `private_setting`: the name of that setting
    in error messages. `sinks`: hosts, as `host_of` gives them, that are refused because our own events go there.
    """

    result_hosts: tuple[str, ...] = ()
    private_hosts: frozenset[tuple[str, int]] = frozenset()
    private_setting: str = "RECEIVER_PRIVATE_RESULT_HOSTS"
    sinks: frozenset[str] = frozenset()

    def allows(self, host: str) -> bool:
        if not self.result_hosts:
            return True
        suffixes = [suffix.lower().removeprefix("*").strip(".") for suffix in self.result_hosts]
        return any(host == suffix or host.endswith(f".{suffix}") for suffix in suffixes if suffix)

    def refuses(self, address: Address, host: str, port: int) -> str | None:
        """Why `address`, to which `host` resolves, must not be dialled on `port`; None = it may."""
        if self.sinks and _one_spelling(str(address)) in self.sinks:
            return "events go there"
        return forbidden_even_listed(address) if (host, port) in self.private_hosts else forbidden(address)


@dataclass(frozen=True)
class Target:
    """A checked URL. `host`: lower-case ASCII, IPv6 without brackets. `url`: rebuilt, without fragment.

    `authority`: host and port as in a URL and in the Host header.
    """

    scheme: str  # http or https
    host: str
    port: int
    authority: str
    url: str = field(repr=False)
    path: str = field(repr=False)  # with the query, as in the request line


URL_PARTS = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?P<query>\?[^#]*)?"
)
AUTHORITY = re.compile(r"(?P<host>\[[^\[\]]*\]|[^:\[\]]*)(?::(?P<port>[0-9]{0,5}))?")
LABEL = re.compile(r"[a-z0-9_-]{1,63}")
NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
CONTROLS = re.compile(r"[\x00-\x1f\x7f\\]")
# Printable ASCII stays unchanged, because a signature covers the bytes of the URL. A space is sent as %20.
ASCII_PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))


def check_url(url: str, policy: AddressPolicy) -> Target:
    """Parse a URL and refuse every form that must not be fetched. Nothing is resolved here.

    Returns the `Target` to request. It is rebuilt from the checked parts, so no second parser can read the URL
    differently. Raises `FetchRefused`, whose message never holds path, query or userinfo.
    """
    scheme, sent, path = _split(url)
    host, port, authority = _checked_host(scheme, sent, policy)
    return Target(scheme, host, port, authority, f"{scheme}://{authority}{path}", path)


@lru_cache(maxsize=KEPT_HOSTS)
def _checked_host(scheme: str, sent: str, policy: AddressPolicy) -> tuple[str, int, str]:
    """Host, port and authority, of the authority `sent` in a URL. Raises `FetchRefused`."""
    host, port = _host_and_port(scheme, sent)
    if policy.sinks and _one_spelling(host) in policy.sinks:
        raise FetchRefused(f"{host} receives events, so no client is called back there: name another host")
    if (host, port) not in policy.private_hosts:
        _refuse_unlisted(scheme, host, port, policy)
    address = _literal(host)
    reason = policy.refuses(address, host, port) if address is not None else None
    if reason:
        raise FetchRefused(f"{host} may not be dialled: {reason}")
    bracketed = f"[{host}]" if ":" in host else host
    return host, port, bracketed if port == DEFAULT_PORTS[scheme] else f"{bracketed}:{port}"


def tidy(url: str) -> str:
    """Strip blanks and line ends around a URL, as every client does. A space inside is allowed and sent as %20.

    Raises `FetchRefused` for characters that parsers read differently: control characters and the backslash.
    """
    url = url.strip(" \t\r\n")
    if CONTROLS.search(url):
        raise FetchRefused("URL holds a control character or a backslash")
    return url


def host_of(url: str) -> str:
    """The host of a URL, in the one spelling in which `AddressPolicy.sinks` lists it. Raises `FetchRefused`."""
    scheme, sent, _ = _split(url)
    return _one_spelling(_host_and_port(scheme, sent)[0])


def host_name(text: str) -> str:
    """A host name or address, in brackets or not, as `AddressPolicy` wants it. Raises `FetchRefused`."""
    return _host(f"[{text.strip('[]')}]" if ":" in text else text)


def _one_spelling(host: str) -> str:
    """`localhost` for every own name of this machine, and the IPv4 address for an IPv6 address that embeds it."""
    address = _literal(host)
    if address is None:
        return "localhost" if host.endswith(".localhost") else host
    address = hidden_ipv4(address) or address
    return "localhost" if address.is_loopback or address.is_unspecified else str(address)


def _split(url: str) -> tuple[str, str, str]:
    """Scheme, authority as sent, and path with query."""
    if len(url) > MAX_URL_CHARACTERS:
        raise FetchRefused(f"URL is longer than {MAX_URL_CHARACTERS} characters")
    parts = URL_PARTS.match(tidy(url))
    if parts is None:
        raise FetchRefused("not an absolute http(s) URL")
    try:
        path = quote((parts["path"] or "/") + (parts["query"] or ""), safe=ASCII_PRINTABLE)
    except UnicodeEncodeError:
        raise FetchRefused("URL holds a lone surrogate") from None
    return parts["scheme"].lower(), parts["authority"], path


def _host_and_port(scheme: str, authority: str) -> tuple[str, int]:
    if scheme not in DEFAULT_PORTS:
        raise FetchRefused("scheme is neither https nor http")
    if "@" in authority:
        raise FetchRefused("URL holds user information")
    if "%" in authority:
        raise FetchRefused("host is percent-encoded or has a zone id")
    place = AUTHORITY.fullmatch(authority)
    if place is None:
        raise FetchRefused("host and port are malformed")
    port = int(place["port"] or DEFAULT_PORTS[scheme])
    if not 0 < port < 65_536:
        raise FetchRefused("port is out of range")
    return _host(place["host"]), port


def _host(text: str) -> str:
    if text.startswith("["):
        try:
            return str(IPv6Address(text[1:-1]))
        except ValueError:
            raise FetchRefused("host is not an IPv6 address") from None
    if not text.isascii():  # full-width letters, ideographic dots and so on are mapped (UTS 46) before any check
        try:
            text = idna.encode(text, uts46=True, std3_rules=True).decode("ascii")
        except (idna.IDNAError, UnicodeError):
            raise FetchRefused("host is not a valid international domain name") from None
    host = text.lower().removesuffix(".")
    labels = host.split(".")
    if len(host) > 253 or not all(LABEL.fullmatch(label) for label in labels):
        raise FetchRefused("host is not a domain name")
    if NUMBER.fullmatch(labels[-1]) and _literal(host) is None:
        raise FetchRefused("host is an IPv4 address in an unusual spelling")
    return host


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _refuse_unlisted(scheme: str, host: str, port: int, policy: AddressPolicy) -> None:
    if scheme != "https":
        raise FetchRefused(f"{host} is not https and not on {policy.private_setting}")
    if port != DEFAULT_PORTS["https"]:
        raise FetchRefused(f"{host}: port {port} is not 443 and not on {policy.private_setting}")
    if not policy.allows(host):
        raise FetchRefused(f"{host} is not on RECEIVER_RESULT_HOSTS")
    if _literal(host) is not None:
        return
    for name, source in PRIVATE_NAMES.items():
        if host == name or host.endswith(f".{name}"):
            raise FetchRefused(f"{host} is a private name ({source})")
    if "." not in host:
        raise FetchRefused(f"{host} is a name without a domain")
